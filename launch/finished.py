"""Whether a start has anything left to do: told from the run directory, before a rank is started or a file written.

What is asked of a run that has been stopped or has failed is not decided here: it goes on.

    if (why := nothing_left(run, config, follow_up=True)): ...
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from harness.rundir import RunDir
from launch import jobs
from launch.saved import checkpoints, step_of
from launch.stop import stopped_by_user

if TYPE_CHECKING:
    from harness.config import Config

DECIDES = ("eval", "data")
"""What decides besides the mathematics how far a run goes, or what it trains on."""


def nothing_left(
    run: RunDir, config: Config, *, follow_up: bool, environ: Mapping[str, str] = os.environ
) -> str | None:
    """Why a start ends at once; None where it has work to do. `follow_up`: it is a later job of a chain.

    Jobs that come by themselves, those of a chain and those that Slurm starts again, respect that somebody has stopped
    the run. Raises ConfigError where the frozen config cannot be read.
    """
    from harness.batch import length_field

    job = jobs.job_of(environ)
    by_itself = follow_up or (job is not None and bool(job["restarts"]))
    if by_itself and (by := stopped_by_user(run)) is not None:
        return f"{run.root} was stopped ({by}): this job ends; go on with: harness submit {shlex.quote(str(run.root))}"
    if config.train.steps is None and not by_itself:
        return None  # epochs of a data set that may have grown, which only ranks see
    if (step := finished(run, config)) is None:
        return None
    return f"{run.root} is finished: nothing to train after step {step}; a higher {length_field(config)} goes on"


def finished(run: RunDir, config: Config) -> int | None:
    """The step at which a run has finished with this config; None where it has not, or ranks must see to it.

    They must where the config differs in what is computed or for how long, where a config has been frozen since, and
    where the last checkpoint is not the newest any more (`harness ckpt rollback`).
    """
    from harness.config import MATHEMATICS
    from harness.frozen import compare
    from harness.resolve import resolve

    status = run.read_status()
    step, ended = status.get("step"), status.get("time")
    if status.get("state") != "finished" or not isinstance(step, int) or not isinstance(ended, (int, float)):
        return None
    steps, saved = config.train.steps, checkpoints(run.checkpoints)
    if steps is not None and not (isinstance(status.get("steps"), int) and status["steps"] >= steps):
        return None  # whatever the clocks of two hosts say below
    if not saved or step_of(saved[-1]) != step:
        return None
    frozen_at = float("inf")
    with suppress(OSError):
        frozen_at = os.stat(run.config).st_mtime
    if frozen_at > ended or compare(resolve(run.config).config, config, under=(*MATHEMATICS, *DECIDES)):
        return None
    return step
