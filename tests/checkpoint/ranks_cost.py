"""Ranks that count what their saves ask of the file system and of each other, for `test_cost.py`.

mpirun -np 2 python tests/checkpoint/ranks_cost.py FOLDER TENSORS ELEMENTS
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint import Manager, State, ballot, keep_last
from harness.checkpoint.comm import Comm, Mpi, Single

CALLS = {
    "open": "opens", "pwrite": "writes", "fsync": "syncs", "fdatasync": "syncs", "listdir": "listings",
    "mkdir": "names", "rename": "names", "unlink": "names", "rmdir": "names", "ftruncate": "names",
}  # fmt: skip


def count(folder: Path, comm: Comm, tensors: int, elements: int) -> dict[str, int]:
    """What this rank has asked for in the fourth save, by the fields of `cost.Operations`."""
    found: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found[CALLS[name]] += 1
            return real(*arguments, **options)

        return call

    def start(self: Any, data: Any, *rest: Any) -> None:
        found["sent"] += 1
        found["message_bytes"] += len(data)
        send(self, data, *rest)

    state = State(tensors={f"t{index:05}": np.full(elements, index, np.float32) for index in range(tensors)})
    manager = Manager(folder, comm, keep=keep_last(1))
    for step in range(3):
        manager.save(step, state, wait=True)
    real = {name: getattr(os, name) for name in CALLS}
    send = ballot._ByMpi._start
    try:
        for name, call in real.items():
            setattr(os, name, counted(name, call))
        ballot._ByMpi._start = start  # type: ignore[method-assign]
        comm.barrier()
        manager.save(3, state, wait=True)
        comm.barrier()
    finally:
        for name, call in real.items():
            setattr(os, name, call)
        ballot._ByMpi._start = send  # type: ignore[method-assign]
    manager.close()
    return dict(found)


def main() -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    comm = Mpi(world) if world.size > 1 else Single()
    told = []
    for number, argument in enumerate(sys.argv[2:]):
        tensors, elements = map(int, argument.split("x"))
        told.append(comm.all_gather(dict(count(Path(sys.argv[1]) / str(number), comm, tensors, elements))))
    if comm.rank == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
