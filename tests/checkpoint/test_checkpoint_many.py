"""A job saves very often: no save hangs, none is lost. What the ranks do is in `ranks_many.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import needs_mpirun, ranks

from harness.checkpoint import Single
from harness.checkpoint.engines.mpio import unavailable

SCRIPT = str(Path(__file__).with_name("ranks_many.py"))
JOBS = [
    ("direct", 4, "mpirun"),
    ("mpio", 4, "mpirun"),
    ("mpio-collective", 4, "mpirun"),
    ("direct", 2, "horovodrun-gloo"),
]


def save(directory: Path, engine: str, size: int, launcher: str, saves: int, timeout: float) -> None:
    if engine.startswith("mpio") and unavailable(Single()) is not None:
        pytest.skip("there is no MPI")
    world = "gloo" if launcher.endswith("gloo") else "mpi"
    done = ranks(size, [SCRIPT, str(directory), world, engine, str(saves)], launcher=launcher, timeout=timeout)
    assert done.returncode == 0 and "all saves done" in done.stdout, done.stdout[-4000:] + done.stderr[-8000:]
    print(done.stdout)
    assert sum(map(int, re.findall(r"(\d+) saves", done.stdout))) == saves


@pytest.mark.mpi
@needs_mpirun
@pytest.mark.parametrize(("engine", "size", "launcher"), [job for job in JOBS if job[0] != "mpio-collective"])
def test_a_hundred_saves(engine: str, size: int, launcher: str, tmp_path: Path) -> None:
    save(tmp_path, engine, size, launcher, 100, 280)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(3600)
@needs_mpirun
@pytest.mark.parametrize(("engine", "size", "launcher"), JOBS)
def test_a_thousand_saves(engine: str, size: int, launcher: str, tmp_path: Path) -> None:
    save(tmp_path, engine, size, launcher, 1000, 3500)
