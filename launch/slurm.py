"""The batch script of a run, for Slurm. Not here: submitting it (`submit.py`), requeueing (`requeue.py`).

Every word of the script's commands is quoted for the shell; header lines take no value that could end the line or
open a quote, because sbatch reads them by rules of its own.

    print(render(config, ["harness", "run", "configs/charlm.yaml", "train.steps=500"]))
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from harness.config import Config

TEMPLATE = "job.sh.j2"
_HEADER = re.compile(r"[ !%&()*+,./0-9:;<=>?@A-Z\[\]^_a-z{|}~#-]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]{0,40}")
_FORBIDDEN = ("wrap", "export-file", "parsable", "test-only", "wait", "help", "usage", "version")


def render(
    config: Config,
    command: Sequence[str],
    *,
    cwd: str | None = None,
    output: str = "%x-%j.log",
    tasks: Sequence[str] = (),
    arguments: bool = False,
) -> str:
    """The text of the batch script whose last line runs `command`.

    tasks: for an array, the argument that each task's command gets. arguments: the script hands on its own.
    Raises ConfigError for values sbatch cannot take.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["q"] = _quote
    environment.filters["header"] = _header
    environment.filters["comment"] = lambda text: re.sub(r"[^ -~]", "?", str(text))
    for line in config.slurm.setup:
        if "\0" in line:
            raise ConfigError("slurm.setup holds a zero byte")
    return environment.get_template(TEMPLATE).render(
        name=config.name,
        options=options(config, cwd or os.getcwd(), output=output, tasks=len(tasks)),
        tasks=list(tasks),
        arguments=arguments or bool(tasks),
        modules=config.slurm.modules,
        setup=config.slurm.setup,
        command=list(command),
    )


def options(config: Config, cwd: str, *, output: str = "%x-%j.log", tasks: int = 0) -> list[tuple[str, str | None]]:
    """sbatch's options in the order they are written. Raises ConfigError where the numbers do not fit."""
    slurm = config.slurm
    found: list[tuple[str, str | None]] = [("job-name", config.name), ("chdir", cwd), ("nodes", str(slurm.nodes))]
    found += _tasks(config)
    if slurm.cpus_per_rank is not None:
        found.append(("cpus-per-task", str(slurm.cpus_per_rank)))
    if slurm.gpus_per_node:
        found.append(("gpus-per-node", str(slurm.gpus_per_node)))
    found.append(("time", _time(slurm.time)))
    for name, value in (
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("mem", slurm.memory),
    ):
        if value is not None:
            found.append((name, value))
    margin = math.ceil(slurm.margin)
    if margin >= slurm.time:
        raise ConfigError(
            f"slurm.margin ({margin} s) is not shorter than slurm.time ({slurm.time:.0f} s)", hint="lower slurm.margin"
        )
    # B: only to the batch shell, which is the harness; it tells the ranks. Appending, because a requeue truncates.
    found += [("signal", f"B:{slurm.signal}@{margin}")]
    found += [("output", output), ("open-mode", "append"), ("requeue", None)]
    if tasks:
        found.append(("array", f"0-{tasks - 1}"))
    taken = {name for name, _ in found}
    for name, extra in slurm.extra.items():
        if not _OPTION.fullmatch(name) or name in _FORBIDDEN:
            raise ConfigError(f"slurm.extra: {name!r} is no option of a batch script", hint="long names, without --")
        if name in taken - {"output", "requeue", "open-mode", "chdir", "array"}:
            raise ConfigError(f"slurm.extra: {name} is set by slurm's own fields already")
        found = [(have, value) for have, value in found if have != name and (have, name) != ("requeue", "no-requeue")]
        found.append((name, None if extra is None else str(extra)))
    for name, value in found:
        _header(value or "", name)
    return found


def template_folder() -> Path:
    """Where the template lies: beside the source tree, or where pip has put it."""
    for folder in (Path(__file__).resolve().parent.parent / "slurm", Path(sys.prefix) / "share" / "harness" / "slurm"):
        if (folder / TEMPLATE).is_file():
            return folder
    raise Unavailable(f"the template {TEMPLATE} of the batch script is not installed", hint="install harness again")


def _tasks(config: Config) -> list[tuple[str, str | None]]:
    slurm, ranks = config.slurm, config.launch.ranks
    if slurm.ranks_per_node is not None:
        slots = slurm.nodes * slurm.ranks_per_node
        if ranks is not None and ranks > slots:
            raise ConfigError(
                f"launch.ranks {ranks} is more than slurm.nodes x slurm.ranks_per_node = {slots}",
                hint="ask for more nodes, or fewer ranks",
            )
        return [("ntasks-per-node", str(slurm.ranks_per_node))]
    if ranks is None:
        return [("ntasks-per-node", str(slurm.gpus_per_node or 1))]
    if ranks < slurm.nodes:
        raise ConfigError(f"launch.ranks {ranks} is less than slurm.nodes {slurm.nodes}: a node would have no rank")
    if ranks % slurm.nodes == 0:
        return [("ntasks-per-node", str(ranks // slurm.nodes))]
    return [("ntasks", str(ranks))]


def _time(seconds: float) -> str:
    minutes, rest = divmod(max(60, math.ceil(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02d}:{minutes:02d}:{rest:02d}"


def _quote(text: str) -> str:
    if "\0" in text:
        raise ConfigError("the command of the batch script holds a zero byte")
    return shlex.quote(text)


def _header(text: str, name: str = "option") -> str:
    if not _HEADER.fullmatch(text) or len(text) > 4096:
        raise ConfigError(
            f"slurm: --{name} cannot be {text!r} in a batch script",
            hint="no quotes, line breaks, $, \\ or control characters",
        )
    return f'"{text}"' if " " in text or "#" in text else text
