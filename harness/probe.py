"""What one rank finds when it starts here: MPI, HDF5, torch, Horovod, GPUs. Run by `harness check` under a launcher.

    mpirun -np 2 python -m harness.probe [FOLDER]

Each step prints a line `HARNESS_PROBE {json}` when it begins and when it has ended, so a step that hangs or crashes
is known by its name. A step that fails says why and the next one runs. FOLDER is where a small file is written and
read back in parallel. This is not a rank of a run: it makes no run directory and trains nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "HARNESS_PROBE "
_LIBRARY = re.compile(r"lib(?:mpi|mpich|mpi_ibm|mpi_cray|mpi_gnu_\d+|mpi_intel|mpi_amd)(?:-[0-9a-f]+)?\.so[\d.]*")
Step = Callable[[], dict[str, Any]]


def main() -> None:
    """All steps in order. Collective where a step is: every rank of COMM_WORLD runs the same steps."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    steps: list[tuple[str, Step]] = [("place", place), ("mpi", mpi), ("hdf5", hdf5)]
    if folder is not None:
        steps.append(("file", lambda: file(folder)))
    steps += [("torch", torch), ("horovod", horovod), ("libraries", libraries)]
    for name, step in steps:
        say(step=name, state="begin")
        try:
            result = step()
        except Exception as error:  # whatever is broken here is what the check is for
            say(step=name, state="failed", error=f"{type(error).__name__}: {error}"[:1500])
        else:
            say(step=name, state="done", **result)


def say(**facts: object) -> None:
    """One line in one write, so that lines of several ranks do not mix."""
    line = MARK + json.dumps({"pid": os.getpid(), **facts}) + "\n"
    os.write(1, line.encode())


def place() -> dict[str, Any]:
    """Who the launcher says this is."""
    from harness.env import identify

    found = identify()
    return {
        "launcher": found.launcher,
        "rank": found.rank,
        "size": found.size,
        "host": found.host,
        "cores": len(os.sched_getaffinity(0)),
        "io": os.environ.get("OMPI_MCA_io"),  # noqa: SIM112 - Open MPI spells it so
    }


def mpi() -> dict[str, Any]:
    """The MPI library, its thread level, and a sum over all ranks that must come out right."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    names = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED", MPI.THREAD_SERIALIZED: "SERIALIZED"}
    total = world.allreduce(world.rank + 1)
    return {
        "library": MPI.Get_library_version().strip("\0\n ").splitlines()[0][:300],
        "standard": ".".join(map(str, MPI.Get_version())),
        "threads": names.get(MPI.Query_thread(), "MULTIPLE"),
        "rank": world.rank,
        "size": world.size,
        "sum_right": total == world.size * (world.size + 1) // 2,
    }


def hdf5() -> dict[str, Any]:
    """Versions, and whether h5py was built with MPI."""
    import h5py

    return {"h5py": h5py.version.version, "hdf5": h5py.version.hdf5_version, "mpi": bool(h5py.get_config().mpi)}


def file(folder: Path) -> dict[str, Any]:
    """Write a file through MPI-IO, each rank its row, and read all of it back on every rank. Collective."""
    import h5py
    import numpy
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if not h5py.get_config().mpi:
        return {"skipped": "h5py has no MPI"}
    if not world.allreduce(int(folder.is_dir() and os.access(folder, os.W_OK)), MPI.MIN):
        raise OSError(f"{folder} cannot be written by every rank")
    path = folder / f"probe-{world.bcast(os.getpid())}.h5"  # ranks that share no world must not share the file
    rows, columns = world.size, 4096
    with h5py.File(path, "w", driver="mpio", comm=world, locking=False) as out:
        out.create_dataset("x", (rows, columns), dtype="i8")[world.rank] = numpy.arange(columns) + world.rank
    world.Barrier()
    with h5py.File(path, "r", driver="mpio", comm=world, locking=False) as back:
        right = numpy.array_equal(back["x"][:], numpy.arange(columns) + numpy.arange(rows)[:, None])
    world.Barrier()
    if world.rank == 0:
        path.unlink()
    if not world.allreduce(int(right), MPI.MIN):
        raise OSError("what was read back is not what was written")
    return {"ranks": rows, "bytes": rows * columns * 8}


def torch() -> dict[str, Any]:
    """torch and the GPUs it sees."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


def horovod() -> dict[str, Any]:
    """What Horovod was built with, and an average over all ranks. Collective."""
    import horovod.torch as hvd
    import torch

    built = {name: bool(getattr(hvd, f"{name}_built")()) for name in ("mpi", "gloo", "nccl", "cuda")}
    if "mpi4py.MPI" in sys.modules and built["mpi"]:
        from mpi4py import MPI

        hvd.init(comm=MPI.COMM_WORLD)
    else:
        hvd.init()
    mean = hvd.allreduce(torch.full((1000,), float(hvd.rank())), name="harness.probe")
    facts = {
        "version": hvd_version(),
        **built,
        "mpi_enabled": bool(hvd.mpi_enabled()),
        "gloo_enabled": bool(hvd.gloo_enabled()),
        "threads": bool(hvd.mpi_threads_supported()) if hvd.mpi_enabled() else None,
        "rank": hvd.rank(),
        "size": hvd.size(),
        "local_size": hvd.local_size(),
        "mean_right": bool(torch.allclose(mean, torch.full((1000,), (hvd.size() - 1) / 2))),
    }
    hvd.shutdown()
    return facts


def hvd_version() -> str:
    """Horovod's version."""
    import horovod

    return str(horovod.__version__)


def libraries() -> dict[str, Any]:
    """The MPI libraries mapped into this process; more than one means that two MPIs are mixed."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    return {"mpi": sorted({os.path.realpath(path) for path in paths if _LIBRARY.fullmatch(os.path.basename(path))})}


if __name__ == "__main__":
    main()
