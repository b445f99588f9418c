"""A parameter server that loses a worker under the real mpirun: the servers save, and a restart loses no step."""

from __future__ import annotations

from pathlib import Path

import pytest
from disturbed import launch
from support import needs_mpirun


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(900)
def test_servers_save_without_the_worker_that_died(tmp_path: Path) -> None:
    """There is no checkpoint before: all that a restart can go on from is what the two servers saved alone."""
    run = launch(
        tmp_path,
        *("--restarts", "1", "parallel.strategy=parameter_server", "parallel.servers=2"),
        *("checkpoint.every=null", "eval.every=null", "log.every=4", "watchdog.silence=60s"),
        ranks=4,
        plan=[("step", "kill", 8, 3)],
    )
    try:
        code, said = run.wait()
        assert code == 0, said
        assert "resumed from the checkpoint at step 7" in said, said
        assert "worker 3 was lost in step 7; the servers have saved the state without it" in said, said
        assert [attempt.number for attempt in run.attempts] == [1, 2]
        assert (run.dir.checkpoints / "step-00000007").is_dir() and (run.dir.checkpoints / "step-00000012").is_dir()
    finally:
        run.end()
