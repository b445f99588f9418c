"""What a Slurm job does besides running: whether a follow-up has anything left to do, and going back into the queue.

Called before and after a start by `harness run`; outside a job, or where nothing is to be done, neither says anything.

    if (why := nothing_left(run, config, follow_up=True)): ...
    go_on(run, config)          # after exit code 75
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.rundir import RunDir
from launch import jobs
from launch.runs import read_object
from launch.stop import stopped_by_user

if TYPE_CHECKING:
    from harness.config import Config

RUNNING = ("RUNNING", "TIMEOUT")
"""States of a job that may be put back; a cancelled one must not come again, a preempted one Slurm puts back itself."""


def nothing_left(
    run: RunDir, config: Config, *, follow_up: bool, environ: Mapping[str, str] = os.environ
) -> str | None:
    """Why a follow-up job, or a job that Slurm has started again, ends at once; None where it has work to do."""
    job = jobs.job_of(environ)
    if not follow_up and (job is None or not job["restarts"]):
        return None
    if (by := stopped_by_user(run)) is not None:
        return f"{run.root} was stopped ({by}): this job ends; go on with: harness submit {shlex.quote(str(run.root))}"
    status = run.read_status()
    if status.get("state") != "finished":
        return None
    steps, submitted = config.train.steps, read_object(run.root / "submitted.json").get("time")
    if steps is not None and not (isinstance(status.get("steps"), int) and status["steps"] >= steps):
        return None  # it is to go on to a later step
    if isinstance(submitted, (int, float)) and not status.get("time", 0.0) >= submitted:
        return None  # finished before this job was asked for, which may be for more epochs
    return f"{run.root} has finished at step {status.get('step')}: this job has nothing left to do"


def go_on(run: RunDir, config: Config, environ: Mapping[str, str] = os.environ) -> None:
    """After a stop with the state saved: put this job back into the queue, or say what goes on with the run."""
    job = jobs.job_of(environ)
    if job is None or stopped_by_user(run) is not None:
        return
    name = str(job["id"])
    failed = None
    if config.slurm.requeue:
        failed = _requeue(name)
        if failed is None:
            _say(f"job {name} goes back into the queue; it will go on from the saved state")
            return
        _say(f"job {name} could not be put back into the queue: {failed}")
    others = [other for other in map(str, read_object(run.root / "submitted.json").get("jobs") or []) if other != name]
    waiting = [other for other, state in jobs.states(others).items() if jobs.is_queued(state)]
    if waiting:
        _say(f"job {waiting[0]} goes on with it")
    elif failed is not None:
        script = run.root / "job.sh"
        again = (
            f"sbatch {shlex.quote(str(script))}" if script.exists() else f"harness submit {shlex.quote(str(run.root))}"
        )
        _say(f"type, where Slurm's commands are: {again}")


def _requeue(job: str) -> str | None:
    """Put a job back; None, or a sentence on why not."""
    state = jobs.state_of(job)
    if state is not None and state not in RUNNING:
        return f"it is {state}"
    done = jobs.call(["scontrol", "requeue", job])
    return None if done.returncode == 0 else f"{done.stdout}{done.stderr}".strip()[:500] or f"code {done.returncode}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
