"""How the benchmarks start their ranks: one thread each, on whatever cores there are.

subprocess.run(command(2, "train.py", "--quick"), env=environment())
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def command(ranks: int, script: str, *options: str) -> list[str]:
    """A script of this directory on so many ranks."""
    return ["mpirun", "-np", str(ranks), sys.executable, str(HERE / script), *options]


def environment(**more: str) -> dict[str, str]:
    """Of this process, with what `harness run` sets for Open MPI, and `more`."""
    needed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_io": "romio321",  # its own MPI-IO can hang with HDF5
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return {**os.environ, **needed, **more}
