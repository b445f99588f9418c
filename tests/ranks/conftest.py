"""Contract tests: the same on every rank of a real job, started by `tests/test_ranks.py`, not collected otherwise.

    mpirun -np 4 python -m pytest tests/ranks        with HARNESS_RANKS=1

All ranks run the same tests in the same order. A failure on one rank would leave the others in a collective, so it
ends the whole job at once, with the failed test told on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.env import identify

if "HARNESS_RANKS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def world() -> Iterator[object]:
    from harness.config import Horovod
    from harness.data import start_forkserver
    from harness.world import bring_up

    start_forkserver()  # before MPI, as in a real rank
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"  # some tests add their own
    yield bring_up(identify(), Horovod(), Path.cwd())


@pytest.fixture(autouse=True)
def _together(world: object) -> None:
    """No rank begins a test before all have ended the last one."""
    world.comm.barrier()  # type: ignore[attr-defined]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "HARNESS_RANKS" in os.environ:
        from harness.failure import leave

        print(f"rank {identify().rank}: {report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        leave(1)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if "HARNESS_RANKS" in os.environ and exitstatus == 0:
        place = identify()
        print(f"rank {place.rank} of {place.size}: {session.testscollected} passed", file=sys.__stdout__, flush=True)
