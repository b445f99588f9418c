"""How much memory a save takes in flight. Started by `test_checkpoint_behind.py`: python ranks_memory.py DIRECTORY"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mpi4py.MPI
import numpy as np

from harness.checkpoint import Manager, State

MIB = 1 << 20
STATE = 400 * MIB
SLACK = 24 * MIB
"""Imports at the first save, and what the allocator keeps."""


def memory(field: str) -> int:
    """Bytes of resident memory: now (VmRSS), or the most since `reset` (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(directory: Path) -> None:
    arrays = {f"t{index}": np.full(STATE // 8 // 8, float(index)) for index in range(8)}
    manager = Manager(directory, engine="direct", timeout=120.0)
    rank, size = manager.comm.rank, manager.comm.size
    share = STATE // size + 64 * MIB + SLACK
    import h5py  # noqa: F401  (rank 0 needs it at the first save)

    before = memory("VmRSS")
    for step in (1, 2, 3):
        reset()
        manager.save(step, State(arrays=arrays))
        manager.wait()
        used = memory("VmHWM") - before
        print(f"rank {rank}, save {step}: {used / MIB:.0f} MiB", flush=True)
        assert STATE // size * 0.9 < used < share, f"{used} bytes"
    reset()
    found = {name: np.zeros_like(array) for name, array in arrays.items()}
    assert manager.restore(State(arrays=found)) == 3
    used = memory("VmHWM") - before - STATE
    print(f"rank {rank}, restore: {used / MIB:.0f} MiB", flush=True)
    assert used < share, f"{used} bytes"
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    manager.close()
    left = memory("VmRSS") - before - STATE
    print(f"rank {rank}, closed: {left / MIB:.0f} MiB", flush=True)
    assert left < 64 * MIB + SLACK, f"{left} bytes are left"
    manager.comm.barrier()
    if rank == 0:
        print("memory ok", flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        mpi4py.MPI.COMM_WORLD.Abort(1)
