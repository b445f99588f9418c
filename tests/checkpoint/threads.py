"""Ranks as threads of one process: for properties that need many small worlds. Real ones are in `ranks_shards.py`."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

PATIENCE = 20


class Thread:
    """A `Comm`, and what checkpoints use of an MPI communicator."""

    def __init__(self, rank: int, world: World) -> None:
        self.rank, self.size, self._world = rank, world.size, world
        self.mpi: Any = self
        self.bytes = 0

    def all_gather(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._share(json.dumps(value))]

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def barrier(self) -> None:
        self.all_gather(None)

    # MPI

    def Get_size(self) -> int:
        return self.size

    def Get_rank(self) -> int:
        return self.rank

    def Bcast(self, data: Any, root: int) -> None:
        found = self._share(np.array(data))[root]
        assert len(found) == len(data)
        data[:] = found

    def Split_type(self, kind: int) -> Any:
        return self if self._world.near else Thread(0, World(1))

    def Free(self) -> None:
        pass

    def Allgather(self, data: Any, found: Any) -> None:
        found[:] = np.concatenate(self._share(np.array(data)))

    def _share(self, value: Any) -> list[Any]:
        self._world.slots[self.rank] = value
        self._world.barrier.wait(PATIENCE)
        everything = list(self._world.slots)
        self._world.barrier.wait(PATIENCE)
        return everything

    def Isend(self, data: Any, dest: int, tag: int) -> Any:
        assert dest != self.rank
        self.bytes += len(data)
        self._world.letters[self.rank, dest].put((tag, np.array(data)))
        return self

    def Irecv(self, data: Any, source: int, tag: int) -> Any:
        return Letter(self._world.letters[source, self.rank], data, tag)

    def Wait(self) -> None:
        pass


class Letter:
    def __init__(self, letters: queue.Queue[Any], data: Any, tag: int) -> None:
        self.letters, self.data, self.tag = letters, data, tag

    def Wait(self) -> None:
        tag, data = self.letters.get(timeout=PATIENCE)
        assert tag == self.tag and len(data) == len(self.data), "the two sides expect different messages"
        self.data[:] = data


class World:
    """So many ranks; `run` calls a function on each and returns what they return, or raises what the first raises.

    `near`: they are on one node; otherwise each is on its own.
    """

    def __init__(self, size: int, *, near: bool = True) -> None:
        self.size, self.near = size, near
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)
        self.letters = {(a, b): queue.Queue() for a in range(size) for b in range(size)}  # type: ignore[var-annotated]
        self.errors: list[BaseException | None] = [None] * size

    def run(self, work: Callable[[Thread], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = work(Thread(rank, self))
            except BaseException as error:
                self.errors[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(1, self.size)]
        for thread in threads:
            thread.start()
        one(0)
        for thread in threads:
            thread.join()
        failed = [error for error in self.errors if error is not None]
        if failed:
            raise failed[0]
        assert all(letters.empty() for letters in self.letters.values()), "a message that nobody received"
        return results
