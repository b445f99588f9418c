"""What `harness show` and `harness check` print. Plain text when the output is no terminal, so it can be piped.

show(resolve(Path("configs/charlm.yaml")), ["configs/charlm.yaml"])
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.batch import plan_of
from harness.errors import Exit, HarnessError, Unavailable
from harness.parallel.groups import arrange
from harness.resolve import freeze
from launch import hosts
from launch.plan import Plan, default_ranks, make_plan
from launch.slurm import render

if TYPE_CHECKING:
    from harness.config import Config
    from harness.resolve import Resolved
    from launch.findings import Finding

_KEY = re.compile(r"( *)([^\s#:'\"-][^:]*|'[^']*'|\"[^\"]*\"):(?: (.*))?")
_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def show(resolved: Resolved, direct: Sequence[str], arguments: Sequence[str]) -> None:
    """Print all of it to stdout. `direct` are arguments for `python -m harness`, `arguments` those for `harness run`.

    Starts and writes nothing. Raises ConfigError when the batch does not divide or the batch script cannot be made;
    a missing MPI or too few slots here are only told, because the run may be meant for another machine.
    """
    console = Console(highlight=False, soft_wrap=True)
    config = resolved.config
    _head(console, "config")
    for line in annotate(freeze(config).partition("\n")[2], resolved.origins):  # without its line about itself
        console.print(line)
    plan, problem = _plan(config, direct)
    ranks = plan.job.ranks if plan is not None else config.launch.ranks or default_ranks(hosts.find(None, None, {}))
    _head(console, "batch")
    console.print(arithmetic(config, ranks))
    if config.parallel.each > 1 or config.parallel.without_samples or config.parallel.optimizer_shards != "none":
        _head(console, "ranks")
        console.print(who_does_what(config, [name for name, slots in _placed(plan, ranks) for _ in range(slots)]))
    _head(console, "launch")
    if plan is None:
        console.print(f"cannot start here: {problem}", markup=False)
    else:
        for note in plan.notes:
            console.print(f"note: {note}", markup=False)
        console.print(plan.command.shell(), markup=False)
    _head(console, "batch script")
    command = [str(Path(sys.executable).with_name("harness")), "run", *arguments]
    console.print(render(config, command), markup=False, end="")


def annotate(text: str, origins: Mapping[str, str]) -> Iterator[Text]:
    """The lines of a config's YAML, each value with where it comes from as an aligned comment."""
    lines = text.splitlines()
    places = [origins.get(path or "") for path in _paths(lines)]
    width = min(60, max((len(line) for line, place in zip(lines, places, strict=True) if place), default=0))
    for line, place in zip(lines, places, strict=True):
        shown = Text(line)
        if place:
            shown.append(" " * max(2, width + 2 - len(line)))
            shown.append(f"# {place}", style="dim" if place == "default" else "cyan")
        yield shown


def arithmetic(config: Config, ranks: int) -> str:
    """'global batch 512 = 4 ranks x 8 accumulation x 16 samples; lr 0.1 x 512/256 = 0.2'. Raises ConfigError."""
    plan = plan_of(config, ranks)
    optim, ratio = config.optim, config.train.global_batch / config.optim.base_batch
    text = f"{plan}; lr {optim.lr:g}"
    if optim.lr_scaling == "linear":
        return f"{text} x {config.train.global_batch}/{optim.base_batch} = {optim.lr * ratio:g}"
    if optim.lr_scaling == "sqrt":
        return f"{text} x sqrt({config.train.global_batch}/{optim.base_batch}) = {optim.lr * ratio**0.5:g}"
    return text


def who_does_what(config: Config, hosts: Sequence[str], most: int = 32) -> Table:
    """A row for each replica: where it is, the ranks that make up its model, its slice of an optimizer that is cut.

    `hosts`: of every rank. Raises ConfigError where the optimizer cannot be cut over them.
    """
    spread = config.parallel.optimizer_shards
    grid = arrange(hosts, model=config.parallel.model, pipeline=config.parallel.pipeline)
    servers = config.parallel.without_samples
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("replica", justify="right")
    table.add_column("host")
    for stage in range(config.parallel.pipeline):
        what = f"stage {stage}" if config.parallel.pipeline > 1 else "ranks"
        table.add_column(what if config.parallel.model == 1 else f"{what}, by part of its layers")
    if spread != "none":
        table.add_column("optimizer's slice")
    for number, stages in list(enumerate(grid.cells))[:most]:
        on = list(dict.fromkeys(hosts[rank] for parts in stages for rank in parts))
        name = str(number - servers) if number >= servers else f"server {number}"
        cells = [" ".join(map(str, parts)) for parts in stages]
        if spread != "none":  # replicas are single ranks
            shards = grid.shards(stages[0][0], spread)
            cells.append(f"{shards.index(stages[0][0]) + 1} of {len(shards)}")
        table.add_row(name, " ".join(on), *cells)
    if len(grid.cells) > most:
        table.add_row("...", "", f"{len(grid.cells) - most} more replicas")
    return table


def _placed(plan: Plan | None, ranks: int) -> list[tuple[str, int]]:
    return [("localhost", ranks)] if plan is None else [(host.name, host.slots) for host in plan.job.hosts]


def findings(found: Sequence[Finding], *, as_json: bool) -> int:
    """Print the findings of a check; the exit code."""
    failed = sum(finding.state == "FAIL" for finding in found)
    if as_json:
        told = [asdict(finding) | ({"fix": ""} if finding.state == "ok" else {}) for finding in found]
        print(json.dumps({"ok": not failed, "findings": told}, indent=1))
        return int(Exit.UNAVAILABLE) if failed else 0
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        text = Text(finding.text)
        if finding.state != "ok" and finding.fix:
            text.append(f"\nfix: {finding.fix}", style="bold")
        table.add_row(Text(finding.state, style=_COLOURS[finding.state]), finding.name, text)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    warned = sum(finding.state == "warn" for finding in found)
    summary = f"{failed} failed, {warned} warned" if failed or warned else "everything works here"
    console.print(summary, style="red" if failed else "green")
    return int(Exit.UNAVAILABLE) if failed else 0


def _paths(lines: Sequence[str]) -> Iterator[str | None]:
    """The dotted path of the value that each line of block YAML gives, None for lines that give none."""
    stack: list[tuple[int, str]] = []
    for line in lines:
        match = _KEY.fullmatch(line)
        if match is None:
            yield None
            continue
        indent = len(match[1])
        stack = [(depth, key) for depth, key in stack if depth < indent]
        stack.append((indent, match[2].strip("'\"")))
        yield ".".join(key for _, key in stack)


def _plan(config: Config, direct: Sequence[str]) -> tuple[Plan | None, str]:
    try:
        return make_plan(config, direct, probe=False), ""
    except Unavailable as error:
        return None, str(error)
    except HarnessError:
        raise


def _head(console: Console, title: str) -> None:
    console.print(Text(f"\n# {title}" if title != "config" else f"# {title}", style="bold"))
