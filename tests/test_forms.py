"""The benchmark of all forms of training is right about what they compute, send and hold, whatever its times are."""

from __future__ import annotations

import pytest
from support import needs_mpirun, ranks


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(600)
def test_the_table_of_forms() -> None:
    """It fails by itself where losses differ, or bytes; here: that it says so of every form it was asked for."""
    done = ranks(1, ["tests/bench/forms.py", "--quick"], launcher="none", timeout=580)
    if "does not count messages" in done.stderr:
        pytest.skip("this MPI does not count messages")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == [
        "data parallel",
        "optimizer_shards: all",
        "average_every: 8, outer",
        "1 server, synchronous",
        "model: 2, pipeline: 2",
    ]
    sent, told, held = ({row[0]: float(row[at]) for row in rows[2:]} for at in (4, 5, 8))
    assert all(told[name] <= sent[name] for name in told)
    assert 7.9 < told["data parallel"] / told["average_every: 8, outer"] < 8.1
    assert held["model: 2, pipeline: 2"] < 0.26 * held["data parallel"]
