"""How a rank script ends when something in it fails: told, and all ranks with it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def all_or_none(work: Callable[[], None], *, mpi: bool) -> None:
    """Do it; what it raises ends the job. `mpi`: the ranks are joined by MPI, else the launcher sees the exit code."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        if mpi:
            sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(1)
        os._exit(1)
