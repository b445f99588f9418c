"""Runs the contract tests of `ranks/` on 1, 2 and 4 ranks under each launcher that a user may have."""

from __future__ import annotations

import pytest
from support import needs_mpirun, ranks

CASES = [
    ("none", 1, "none"),
    ("mpirun", 1, "mpi"),
    ("mpirun", 2, "mpi"),
    ("mpirun", 4, "mpi"),
    ("horovodrun-mpi", 2, "mpi"),
    ("horovodrun-gloo", 2, "gloo"),
    ("horovodrun-gloo", 4, "gloo"),
]


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.parametrize(("launcher", "count", "controller"), CASES)
def test_contract(launcher: str, count: int, controller: str) -> None:
    done = ranks(
        count,
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=100", "tests/ranks"],
        launcher=launcher,
        env={"HARNESS_RANKS": str(count), "HARNESS_CONTROLLER": controller},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for rank in range(count):
        assert f"rank {rank} of {count}: " in done.stdout
