"""`harness bench train`: how fast a config trains on 1, 2, 4, .. N ranks here, and which of Horovod's settings suit it.

Ranks are started as a run's are, once for each number of them, and measure steps (`harness/bench/steps.py`). Every rank
takes the same micro batches whatever their number (weak scaling), and has the threads that it has among all N; so the
global batch follows the number of ranks. What they need of a run directory is in a hidden folder where runs would be,
which is removed in the end: nothing is left behind, no checkpoint is written.

    code = train(resolve(Path("configs/charlm.yaml")).config, ranks=4, rounds=5)
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.batch import plan_of
from harness.config import Config
from harness.errors import ConfigError, Exit, InternalError
from harness.resolve import freeze
from harness.rundir import RunDir, read_object, storage_errors, write_atomic
from launch import filesystem, processes
from launch.bench_show import show
from launch.plan import Plan, make_plan
from launch.supervise import Requests, handling, say, supervise


def train(config: Config, *, rounds: int, steps: int | None = None, as_json: bool = False) -> int:
    """Measure, and print what was found; the exit code. Raises HarnessError where it cannot start."""
    _refuse(config)
    whole = make_plan(config, [])
    plan_of(config, whole.job.ranks)
    counts = numbers_of_ranks(whole.job.ranks, config.parallel.each)
    found = []
    with _folder(Path(config.directory)) as folder, handling(Requests(asked=True, at_once=True)) as requests:
        for note in whole.notes:
            say(f"note: {note}")
        for count in counts:
            run = RunDir(folder / f"{count}-ranks")
            launch = {"threads": whole.job.threads, "launcher": whole.job.launcher}
            smaller = for_ranks(config, count, of=whole.job.ranks, launch=launch, directory=run.root)
            request = {"rounds": rounds, "steps": steps, "settings": count == counts[-1]}
            code = _measure(smaller, run, request, requests)
            if code:
                return code
            found.append(read_object(run.root / "measured.json"))
    show(config, found, threads=whole.job.threads, as_json=as_json)
    return 0


def numbers_of_ranks(most: int, each: int = 1) -> list[int]:
    """1, 2, 4, .. replicas of `each` ranks, and as many as `most` ranks make.

    >>> numbers_of_ranks(6), numbers_of_ranks(8, each=2)
    ([1, 2, 4, 6], [2, 4, 8])
    """
    found = [each]
    while found[-1] * 2 < most:
        found.append(found[-1] * 2)
    return [*found, most] if most > each else found


def for_ranks(config: Config, count: int, *, of: int, launch: Mapping[str, Any], directory: Path) -> Config:
    """The config on `count` ranks, each of which takes what it takes among `of` ranks. Raises ConfigError.

    launch: what else the section has, as it was found for all ranks.
    """
    share = config.train.global_batch // plan_of(config, of).replicas
    told = config.model_dump()
    told["run_dir"] = str(directory)
    told["train"] |= {"global_batch": share * (count // config.parallel.each)}
    told["launch"] |= {**launch, "ranks": count}
    told["restart"] |= {"min_ranks": None}
    if count != of:
        told["data"] |= {"partition": None}  # it has a part for each of all ranks
    smaller = Config.model_validate(told)
    plan_of(smaller, count)
    return smaller


def _refuse(config: Config) -> None:
    """Raises ConfigError for what cannot be measured in steps that all ranks take together."""
    for wrong, field, hint in (
        (config.launch.elastic, "launch.elastic", "set it to false: the number of ranks must not change"),
        (config.horovod.autotune, "horovod.autotune", "set it to false: it would change settings while they are tried"),
        (config.horovod.timeline, "horovod.timeline", "set it to false: writing it takes time"),
        (
            config.parallel.strategy != "allreduce",
            "parallel.strategy=parameter_server",
            "what is measured is steps in which ranks reduce their gradients",
        ),
    ):
        if wrong:
            raise ConfigError(f"bench train does not go with {field}", hint=hint)


def _measure(config: Config, run: RunDir, request: Mapping[str, Any], requests: Requests) -> int:
    """One start of ranks; the exit code, 0 where RUN/measured.json is there."""
    with storage_errors(run.root):
        run.root.mkdir()
    write_atomic(run.config, freeze(config))
    attempt, run_id = run.new_attempt(), uuid.uuid4().hex
    plan: Plan = make_plan(config, [os.path.abspath(run.root), "--measure", json.dumps(request)], probe=False)
    plan = plan.with_env({"HARNESS_ATTEMPT": str(attempt.number), processes.RUN_ID: run_id})
    ending = supervise(
        plan.command, plan.job.program, run, attempt, run_id=run_id, requests=requests, settings=config.watchdog
    )
    if ending.state != "finished":
        say(ending.text)
        return int(ending.code) or int(Exit.INTERNAL)
    if not (run.root / "measured.json").exists():
        raise InternalError(f"the ranks have ended and left no {run.root / 'measured.json'}")
    return 0


@contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    """A folder that all hosts see, as they would see the run's. Raises StorageError."""
    parent = filesystem.existing(directory)
    with storage_errors(parent):
        made = tempfile.TemporaryDirectory(prefix=".harness-bench-", dir=parent, ignore_cleanup_errors=True)
    with made as name:
        yield Path(name)
