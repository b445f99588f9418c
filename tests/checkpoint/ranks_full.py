"""Ranks on a small file system that fills up. Started by `test_checkpoint_deadlines.py` under a real launcher:

python ranks_full.py DIRECTORY mpi|gloo
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

if sys.argv[2] == "mpi":
    import mpi4py.MPI  # noqa: F401
else:
    import torch  # noqa: F401  (before horovod.torch)

import numpy as np
from ending import all_or_none

from harness.checkpoint import Manager, SaveFailed, State, detect, keep_all, saving, space

MIB = 1 << 20


def main(small: Path, world: str) -> None:
    if world == "gloo":
        import horovod.torch as hvd

        hvd.init()
    comm = detect()
    lines: list[str] = []
    manager = Manager(small / "c", comm, keep=keep_all(), timeout=120.0, log=lines.append)
    filler = small / "filler"

    def state(step: int) -> dict[str, Any]:
        return {"a": np.full(MIB // 2, float(step))}  # 4 MiB

    def fails(step: int) -> str:
        began = time.monotonic()
        words = ""
        try:
            manager.save(step, State(arrays=state(step)))
            manager.wait()
        except SaveFailed as error:
            words = str(error)
        assert time.monotonic() - began < 30, "nobody waits for its deadline"
        told: list[Any] = comm.all_gather(words)
        assert len(set(told)) == 1 and f"step {step} was not saved" in told[0], told
        return words

    def fill(leave: int) -> None:
        """Take all but so many bytes of the file system."""
        if comm.rank == 0:
            filler.unlink(missing_ok=True)
            status = os.statvfs(small)
            descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
            os.posix_fallocate(descriptor, 0, status.f_bavail * status.f_frsize - leave)
            os.close(descriptor)
        comm.barrier()

    def free() -> None:
        if comm.rank == 0:
            filler.unlink()
        comm.barrier()

    def saves(step: int) -> None:
        assert manager.save(step, State(arrays=state(step))) is not None
        manager.wait()
        found = state(0)
        assert manager.restore(State(arrays=found)) == step and (found["a"] == step).all()

    saves(1)
    fill(2 * MIB)
    assert "are needed in" in fails(2) and "free" in fails(3)
    free()
    saves(4)
    # Somebody else takes the space between the look and the write.
    preflight, saving.space.preflight = space.preflight, lambda *_: None
    fill(2 * MIB)
    for step in (5, 6):
        words = fails(step)
        assert "while it wrote its part: No space left on device" in words and "free some space" in words, words
    fill(0)
    words = fails(7)
    assert "No space left on device" in words, words
    free()
    saving.space.preflight = preflight
    saves(8)
    manager.close()
    comm.barrier()
    left = sorted(path.name for path in (small / "c").iterdir())
    assert left == ["lease", *(f"step-{step:08d}" for step in (1, 4, 8))], left
    if comm.rank == 0:
        print("full ok", flush=True)


if __name__ == "__main__":
    all_or_none(lambda: main(Path(sys.argv[1]), sys.argv[2]), mpi=sys.argv[2] == "mpi")
