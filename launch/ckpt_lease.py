"""Before a run is started: does another job save into its directory, which no `harness run` has started?

Not the lock of `harness run` (`lock.py`), which keeps out what comes this way.
"""

from __future__ import annotations

from harness.rundir import RunDir
from launch.supervise import say


def nobody_saves(run: RunDir) -> None:
    """Return once nobody does; nothing of the run has been written then. Raises InUse: who does, since when."""
    if not (run.checkpoints / "lease").is_dir():  # spares the import
        return
    from harness.checkpoint.lease import wait_until_free

    wait_until_free(run.checkpoints, log=say)
