"""Many saves in one job. Started by `test_checkpoint_many.py` under a real launcher:

python ranks_many.py DIRECTORY mpi|gloo ENGINE SAVES

Half of the saves by a manager that skips while one is under way, half by one that waits; shapes change now and then.
"""

from __future__ import annotations

import random
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

from harness.checkpoint import Manager, State, detect, keep_last


def arrays(shape: int, step: int) -> dict[str, Any]:
    """A few tensors, how many and how large is decided by `shape`."""
    return {f"t{index}": np.full((7 + shape, 1000 + 100 * index), float(step)) for index in range(1 + shape)}


def main(root: Path, world: str, engine: Any, saves: int) -> None:
    if world == "gloo":
        import horovod.torch as hvd

        hvd.init()
    comm = detect()
    began = time.monotonic()
    for busy in ("skip", "wait"):
        chance = random.Random(busy)  # the same on all ranks
        done: list[Any] = []
        lines: list[str] = []
        directory = root / busy
        manager = Manager(
            directory,
            comm,
            engine=engine,
            busy=busy,
            keep=keep_last(2),
            timeout=120.0,
            log=lines.append,
            saved=lambda outcome: done.append(outcome.step),  # noqa: B023
        )
        began_here: list[int] = []
        skipped = step = shape = 0
        while len(began_here) < saves // 2:
            step += 1
            if chance.random() < 0.05:
                shape = chance.randrange(4)
            state = State(arrays=arrays(shape, step), extra={"step": step})
            if manager.save(step, state) is None:
                skipped += 1
            else:
                began_here.append(step)
                last = shape
            assert comm.all_gather(step) == [step] * comm.size  # the training goes on meanwhile
            if chance.random() < 0.7:
                manager.wait()
            elif chance.random() < 0.5:
                manager.poll()
        found = {name: np.zeros_like(array) for name, array in arrays(last, 0).items()}
        extra: dict[str, Any] = {}
        assert manager.restore(State(arrays=found, extra=extra)) == began_here[-1] == extra["step"]
        assert all((array == began_here[-1]).all() for array in found.values())
        manager.close()
        comm.barrier()
        assert skipped == 0 or (busy == "skip" and manager.engine.background)
        assert len(set(map(str, comm.all_gather([began_here, skipped])))) == 1, "all ranks skip the same"
        if comm.rank == 0:
            assert done == began_here and len(lines) <= skipped and bool(lines) == bool(skipped), lines
            left = sorted(path.name for path in directory.iterdir())
            assert left == ["lease", *(f"step-{number:08d}" for number in began_here[-2:])], left
            print(
                f"{engine} {busy}: {len(done)} saves, {skipped} skipped, {time.monotonic() - began:.0f} s", flush=True
            )
    comm.barrier()
    if comm.rank == 0:
        print("all saves done", flush=True)


if __name__ == "__main__":
    all_or_none(lambda: main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])), mpi=sys.argv[2] == "mpi")
