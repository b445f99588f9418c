"""A parameter server that loses a worker under the real mpirun: the servers save, and a restart loses no step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support import needs_mpirun
from test_restarts import Run, launch  # noqa: F401 - the fixture


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(600)
def test_servers_save_without_the_worker_that_died(launch: Callable[..., Run]) -> None:  # noqa: F811
    """There is no checkpoint before: all that a restart can go on from is what the two servers saved alone."""
    run = launch(
        *("-n", "4", "--restarts", "1", "task.args.plan=[[step, kill, 8, 3]]"),  # rank 3 dies in its eighth step
        *("parallel.strategy=parameter_server", "parallel.servers=2", "checkpoint.every=null", "eval.every=null"),
        *("log.every=4", "watchdog.silence=60s"),
    )
    code, said = run.wait()
    assert code == 0, said
    assert "resumed from the checkpoint at step 7" in said, said
    assert "worker 3 was lost in step 7; the servers have saved the state without it" in said, said
    assert [attempt.number for attempt in run.attempts] == [1, 2]
    assert (run.dir.checkpoints / "step-00000007").is_dir() and (run.dir.checkpoints / "step-00000012").is_dir()
