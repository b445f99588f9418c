"""What `harness submit` does: freeze the config into the run directory, write its batch script, hand it to sbatch.

What was submitted is what runs: the job goes on with the frozen config, whatever happens to the file meanwhile. No
shell sees a word of it.

    submit([variant], chain=0, dry_run=False)
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.batch import length_field, plan_of
from harness.errors import ConfigError, HarnessError, Unavailable, UsageError
from harness.rundir import RunDir, open_run, storage_errors, write_atomic, write_json
from harness.units import duration
from launch import jobs
from launch.finished import finished
from launch.runs import is_run, look
from launch.slurm import options, render

if TYPE_CHECKING:
    from harness.config import Config

SBATCH = ("sbatch", "--parsable")
FOLLOW_UP = "--follow-up"
MOST_TASKS = 1000
PATIENCE = 120.0
"""Seconds that sbatch may take: a controller with many jobs answers late, and the question cannot be asked twice."""
_LIMITS = "`sinfo -o '%P %l'` lists the partitions' limits"
_HINTS = (
    ("artition", "`sinfo` lists the partitions"),
    ("ccount", "`sacctmgr show associations user=$USER` lists your accounts"),
    ("QOS", "`sacctmgr show qos` lists them"),
    ("ode configuration", "`sinfo -N -l` lists the nodes and what they have"),
    ("ime limit", _LIMITS),
    ("contact", "`scontrol ping` tells whether Slurm's controller is up"),
    ("no answer", "`scontrol ping` tells whether Slurm's controller is up"),
)
_WRITTEN = ("config.yaml", "config.*.yaml", "job.sh", "stop")
"""What a submission writes, or takes away, in a run directory before sbatch answers."""


@dataclass(frozen=True)
class Sweep:
    """One value of each field that is swept over, as overrides, and the name of its run directory."""

    overrides: tuple[str, ...]
    name: str


def sweeps(texts: Sequence[str]) -> list[Sweep]:
    """All combinations of `["optim.lr=1e-3,3e-4", "seed=1,2"]`. Raises UsageError."""
    fields: list[list[str]] = []
    for text in texts:
        key, equals, values = text.partition("=")
        words = [word.strip() for word in values.split(",")]
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not all(words):
            raise UsageError(f"--sweep {text!r} is not of the form key=value,value,...")
        if len(set(words)) != len(words):
            raise UsageError(f"--sweep {text!r} names a value twice")
        fields.append([f"{key}={word}" for word in words])
    found = [Sweep(parts, re.sub(r"[^A-Za-z0-9_.=,+-]", "_", ",".join(parts))) for parts in itertools.product(*fields)]
    if len(found) > MOST_TASKS:
        raise UsageError(f"--sweep makes {len(found)} runs, which is more than {MOST_TASKS}")
    if len({sweep.name for sweep in found}) != len(found):
        raise UsageError("--sweep: two of the values would share a run directory", hint="name them differently")
    return found


def submit(configs: Sequence[Config], *, parent: Path | None = None, chain: int = 0, dry_run: bool = False) -> int:
    """Submit one run, or with `parent` the runs of a sweep below that directory as one array; returns the exit code.

    `chain` follow-up jobs (arrays, for a sweep) start one after the other and end at once when the run has finished.
    `dry_run` prints the script, and on stderr the commands. Raises ConfigError, UsageError where the run has finished,
    Unavailable where it runs already or sbatch is missing or refuses.
    """
    first, folder = configs[0], Path(configs[0].directory) if parent is None else parent
    if any((config.slurm, config.launch.ranks) != (first.slurm, first.launch.ranks) for config in configs):
        raise UsageError("--sweep: all tasks of an array are alike in slurm and launch.ranks", hint="submit them apart")
    for config in configs:
        _check(config)
        try:
            _check_free(config)
        except HarnessError as error:
            if not dry_run:
                raise
            print(f"note: it would be refused now: {error.message}", file=sys.stderr)
    if parent is not None and is_run(parent):
        raise UsageError(f"{parent} is a run itself: a sweep makes runs below it", hint="choose another run_dir")
    output = str(folder / ("slurm-%j.log" if parent is None else "slurm-%A_%a.log"))
    command = [str(Path(sys.executable).with_name("harness")), "run"]
    text = (
        render(first, [*command, str(folder)], output=output, arguments=True)
        if parent is None
        else render(first, command, output=output, tasks=[config.directory for config in configs])
    )
    script, began = folder / "job.sh", time.time()
    print(text, end="", flush=True)
    if dry_run:
        before = [None, *(f"JOB{number}" for number in range(1, chain + 1))]
        commands = [shlex.join([*SBATCH, *_words(script, after)]) for after in before]
        print("\n  ".join(["would submit:", *commands]), file=sys.stderr)
        return 0
    if shutil.which("sbatch") is None:
        raise Unavailable("there is no sbatch on PATH", hint="use a login node, or load Slurm's module")
    _fits(first)
    with _undone([folder, *(Path(config.directory) for config in configs)]):
        for config in configs:
            run = open_run(config)
            with storage_errors(run.root):
                run.stop.unlink(missing_ok=True)  # asked of an earlier job
        write_atomic(script, text)
        ids = [_sbatch(_words(script, None), first)]
    try:
        for _ in range(chain):
            ids.append(_sbatch(_words(script, ids[-1]), first))
    finally:
        for number, config in enumerate(configs):
            mine = ids if parent is None else [f"{job}_{number}" for job in ids]
            write_json(Path(config.directory) / "submitted.json", {"jobs": mine, "time": began})
        then = f", then {', '.join(ids[1:])}" if ids[1:] else ""
        what = f"{len(configs)} runs below {folder}" if parent is not None else str(folder)
        print(f"submitted {what} as job {ids[0]}{then}; see: harness status {shlex.quote(str(folder))}")
    return 0


@contextmanager
def _undone(folders: Sequence[Path]) -> Iterator[None]:
    """Where Slurm refuses the job, the run directories are as they were before."""

    def files() -> dict[Path, bytes]:
        with storage_errors(folders[0]):
            found = [path for folder in folders for pattern in _WRITTEN for path in folder.glob(pattern)]
            return {path: path.read_bytes() for path in found}

    before = files()
    made = {path for folder in folders for path in (folder, *folder.parents) if not path.exists()}
    try:
        yield
    except BaseException:
        now = files()
        for path in before:
            if now.get(path) != before[path]:
                path.write_bytes(before[path])
        for path in now.keys() - before.keys():
            path.unlink()
        for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not made, or somebody else has put something there
                path.rmdir()
        raise


def _check(config: Config) -> None:
    """What would only fail once the job has started."""
    slurm = config.slurm
    options(config, os.getcwd())
    ranks = config.launch.ranks or slurm.nodes * (slurm.ranks_per_node or slurm.gpus_per_node or 1)
    plan_of(config, ranks)
    if slurm.time <= config.stop.margin:
        raise ConfigError(
            f"slurm.time ({slurm.time:g} s) is not longer than stop.margin ({config.stop.margin:g} s):"
            " the run would stop at once",
            hint="ask for more time, or lower stop.margin",
        )


def _check_free(config: Config) -> None:
    """That nobody runs it, and that there is something left to do."""
    path = Path(config.directory)
    if not is_run(path):
        return
    life = look(RunDir(path))
    if life.alive:
        where = f", as job {life.job}" if life.job else f", on {life.host}" if life.host else ""  # started by hand
        raise Unavailable(f"{path} is running already{where}", hint=f"harness stop {shlex.quote(str(path))}")
    if life.state == "queued":
        raise Unavailable(f"{path} waits in the queue already, as job {life.job}", hint=f"scancel {life.job}")
    if (step := finished(RunDir(path), config)) is not None:
        raise UsageError(
            f"{path} has finished at step {step}: there is nothing left to do",
            hint=f"a higher {length_field(config)} goes on with it; another run_dir begins anew",
        )


def _fits(config: Config) -> None:
    """Slurm lets a job wait for ever for nodes that do not exist, and for more time than any job may have."""
    wanted = None if config.slurm.partition is None else set(config.slurm.partition.split(","))
    found: dict[str, int] = {}
    limits: dict[str, float] = {}
    for line in jobs.ask(["sinfo", "--noheader", "--all", "--format=%P|%D|%l"]).splitlines():
        name, count, limit = [*line.strip().split("|"), "", ""][:3]
        if count.isdecimal() and (name.endswith("*") if wanted is None else name.rstrip("*") in wanted):
            found[name.rstrip("*")] = found.get(name.rstrip("*"), 0) + int(count)
            limits[name.rstrip("*")] = math.inf
            with suppress(ValueError):  # infinite, or n/a
                limits[name.rstrip("*")] = duration(limit)
    if limits and math.ceil(config.slurm.time / 60) * 60 > max(limits.values()):
        name = max(limits, key=lambda name: limits[name])
        raise Unavailable(
            f"slurm.time ({config.slurm.time:g} s) is longer than partition {name} allows ({limits[name]:g} s)",
            hint=_LIMITS,
        )
    if found and config.slurm.nodes > max(found.values()):
        name = max(found, key=lambda name: found[name])
        raise Unavailable(
            f"slurm.nodes {config.slurm.nodes} is more than the {found[name]} nodes of partition {name}",
            hint="`sinfo` lists partitions and their nodes",
        )


def _words(script: Path, after: str | None) -> list[str]:
    """What sbatch gets for a job, `after`: for one that goes on after that job, or all tasks of that array."""
    return [str(script)] if after is None else [f"--dependency=afterany:{after}", str(script), FOLLOW_UP]


def _sbatch(words: Sequence[str], config: Config) -> str:
    """Submit; the job's id. Raises Unavailable with what sbatch says."""
    done = jobs.call([*SBATCH, *words], patience=PATIENCE, env=_environment(os.environ, config))
    job = done.stdout.strip().split(";")[0]
    if done.returncode == 0 and job.isdecimal():
        return job
    said = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in done.stderr.splitlines()]
    told = "; ".join(dict.fromkeys(line for line in said if line)) or f"code {done.returncode}"
    hint = next((hint for word, hint in _HINTS if word in told), "`harness submit --dry-run` shows the script")
    raise Unavailable(f"sbatch refused the job: {told}", hint=hint)


def _environment(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """Without what another job has left, and without variables that would come before the script's own options."""
    ours = {f"SBATCH_{name.replace('-', '_').upper()}" for name, _ in options(config, os.getcwd())}
    ours |= {"SBATCH_TIMELIMIT", "SBATCH_JOB_NAME", "SBATCH_ARRAY_INX", "SBATCH_MEM_PER_NODE"}
    inherited = ("SLURM_", "SLURMD_", "SRUN_", "OMPI_COMM_WORLD_", "PMIX_", "PMI_", "HARNESS_")
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not (name in ours or name.startswith(inherited))
    }
