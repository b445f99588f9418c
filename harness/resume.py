"""Where a start goes on: from a step that ranks remember, else from the newest checkpoint, else from the beginning.

Not here: reading a checkpoint (`harness.checkpoint`), and what follows (`loop.py`).

    first = restore(job)
"""

from __future__ import annotations

import os

from harness.checkpoint import State
from harness.checkpoint.state import Misfit
from harness.checkpoint.store import roll_back
from harness.errors import DataError
from harness.job import Job
from harness.rundir import ROLL_BACK


def restore(job: Job) -> int:
    """The step to go on from: 0 on a fresh start. Collective."""
    job.clock.section = "restore"
    extra = job.extra()
    state = job.state(extra)
    found = job.elastic.recall(state, job.world) if job.elastic is not None else None
    told = None if found is None else f"step {found[0]} in the memory of rank {found[1]}"
    if found is None and (step := from_disk(job, state)) is not None:
        found, told = (step, 0), f"the checkpoint at step {step}"
    if found is not None:
        for name in vars(job.progress).keys() & extra.keys():
            setattr(job.progress, name, extra[name])
        if job.update.scaler is not None and extra["scaler"] is not None:
            job.update.scaler.load_state_dict(extra["scaler"])
        job.update.restored(found[0], job.manager.report.loaded)
        job.sinks.say(f"resumed from {told}")
    first = 0 if found is None else found[0]
    job.clock.section = "start"
    job.sinks.record("state", first, state="running")
    return first


def from_disk(job: Job, state: State) -> int | None:
    """Restore the newest checkpoint and return its step, None where there is none. Collective."""
    if job.world.is_root and (name := os.environ.get(ROLL_BACK)):
        roll_back(job.run.checkpoints, job.run.checkpoints / name)  # two starts have failed from a newer one
    try:
        return job.manager.restore(state)
    except Misfit as error:  # its own hint is for programs that call `restore` themselves
        raise DataError(
            error.message, hint="go on with the model and optimizer that it was saved with, or choose another run_dir"
        ) from None
