"""What a Slurm job does after a run that was stopped with its state saved: it goes back into the queue.

Outside a job, or where nothing is to be done, nothing is said. Not here: whether a job has anything left to do
(`finished.py`).

    go_on(run, config)          # after exit code 75
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.rundir import RunDir, read_object
from launch import jobs
from launch.stop import stopped_by_user

if TYPE_CHECKING:
    from harness.config import Config

BY_ITSELF = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REQUEUED", "PENDING")
"""States of a job that Slurm itself puts back."""


def go_on(run: RunDir, config: Config, environ: Mapping[str, str] = os.environ) -> None:
    """After a stop with the state saved: put this job back into the queue, or say what goes on with the run."""
    job = jobs.job_of(environ)
    if job is None or stopped_by_user(run) is not None:
        return
    name = str(job["id"])
    failed = None
    known = jobs.shown(name)
    # a preempted job that ends by itself within its grace time is not put back by Slurm
    if config.slurm.requeue or jobs.is_preempted(known):
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
