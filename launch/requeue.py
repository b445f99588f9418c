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

BY_ITSELF = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REQUEUED", "PENDING")
"""States of a job that Slurm itself puts back."""


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
        known = jobs.shown(name)
        state = known.get("JobState", "RUNNING")
        if state in BY_ITSELF:
            _say(f"job {name} is {state}: Slurm puts it back into the queue")
            return
        if state == "RUNNING" or known.get("Reason") == "TimeLimit":  # a cancelled one must not come again
            _say(f"job {name} goes back into the queue, to go on from the saved state")  # its end may come at once
            done = jobs.call(["scontrol", "requeue", name])
            if done.returncode == 0:
                return
            failed = f"{done.stdout}{done.stderr}".strip()[:500] or f"code {done.returncode}"
            _say(f"job {name} could not be put back into the queue: {failed}")
        else:
            _say(f"job {name} is {state}: it does not go back into the queue")  # a follow-up of a chain still comes
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
