"""No rank waits for ever for another one, and what fails on one is told by all. The checks are in `ranks_faults.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import needs_mpirun, ranks

SCRIPT = str(Path(__file__).with_name("ranks_faults.py"))


@pytest.mark.mpi
@needs_mpirun
def test_three_ranks_under_mpirun(tmp_path: Path) -> None:
    done = ranks(3, [SCRIPT, str(tmp_path), "mpi"])
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.mpi
def test_two_ranks_without_mpi(tmp_path: Path) -> None:
    """The votes travel otherwise; the rest is the same."""
    done = ranks(2, [SCRIPT, str(tmp_path), "gloo", "left_out|comes_late|phase"], launcher="horovodrun-gloo")
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.mpi
@needs_mpirun
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small file system needs root"
)
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_a_full_file_system(launcher: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        script = str(Path(__file__).with_name("ranks_full.py"))
        done = ranks(2, [script, str(small), "gloo" if launcher.endswith("gloo") else "mpi"], launcher=launcher)
        assert done.returncode == 0 and "full ok" in done.stdout, done.stdout[-4000:] + done.stderr[-8000:]
    finally:
        subprocess.run(["umount", str(small)], check=True)
