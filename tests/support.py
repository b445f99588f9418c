"""What several test modules need: starting ranks with a real launcher, and looking for what they leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_io": "romio321",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    "OMP_NUM_THREADS": "1",
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "20",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60",
}

needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun on PATH")


def ranks(
    count: int,
    arguments: Sequence[str],
    *,
    launcher: str = "mpirun",
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` on so many ranks; launcher is mpirun, horovodrun-mpi, horovodrun-gloo or none."""
    python = [sys.executable, *arguments]
    horovodrun = str(Path(sys.executable).with_name("horovodrun"))
    command = {
        "mpirun": ["mpirun", "-np", str(count), *python],
        "horovodrun-mpi": [horovodrun, "-np", str(count), "--mpi", *python],
        "horovodrun-gloo": [horovodrun, "-np", str(count), "--gloo", *python],
        "none": python,
    }[launcher]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, **QUIET, "PATH": path, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
