"""The ranks of a job, as far as checkpoints need them: who am I, and small JSON messages between all.

Three ways to be a job: one process (`Single`), MPI (`Mpi`), and Horovod where there is no MPI (`Horovod`, under
`horovodrun --gloo`). Messages are JSON text, never pickles, and limited in size. This is not the way bulk data travels.

>>> comm = Single()
>>> comm.broadcast({"step": 3}), comm.all_gather("ok")
({'step': 3}, ['ok'])

Every method is collective: all ranks call the same methods in the same order. What one rank cannot encode is an error
on all of them, so that no rank is left waiting.
"""

from __future__ import annotations

import atexit
import itertools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from harness.env import identify
from harness.errors import InternalError, Unavailable

Json: TypeAlias = "bool | int | float | str | list[Any] | dict[str, Any] | None"
Bytes: TypeAlias = "npt.NDArray[np.uint8]"

MAX_MESSAGE = 256 << 20
"""The most bytes of one broadcast, and of all ranks' parts of one gather together."""


class Comm(Protocol):
    """The ranks of a job. `mpi` is a communicator of our own for bulk data and MPI-IO, None where there is no MPI."""

    rank: int
    size: int
    mpi: Any | None

    def broadcast(self, value: Json) -> Json:
        """Rank 0's value, on all ranks; the others' argument is ignored. Collective."""
        ...

    def all_gather(self, value: Json) -> list[Json]:
        """All ranks' values by rank, on all ranks. Collective."""
        ...

    def barrier(self) -> None:
        """Return once all ranks have come here. Collective."""
        ...


class Single:
    """One process."""

    rank = 0
    size = 1
    mpi: Any | None = None

    def broadcast(self, value: Json) -> Json:
        data, length = _encode(value)
        _check([length])
        return _decode(data)

    def all_gather(self, value: Json) -> list[Json]:
        return [self.broadcast(value)]

    def barrier(self) -> None:
        pass


class Mpi:
    """Ranks of an MPI communicator (mpi4py). It is duplicated, so that no message meets anybody else's. Collective."""

    def __init__(self, comm: Any) -> None:
        self._mpi = comm.Dup()
        self.mpi: Any | None = self._mpi
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def broadcast(self, value: Json) -> Json:
        data, length = _encode(value if self.rank == 0 else None)
        lengths = np.array([length], np.int64)
        self._mpi.Bcast(lengths, root=0)
        _check(lengths)
        buffer = data if self.rank == 0 else np.empty(int(lengths[0]), np.uint8)
        self._mpi.Bcast(buffer, root=0)
        return _decode(buffer)

    def all_gather(self, value: Json) -> list[Json]:
        data, length = _encode(value)
        lengths = np.empty(self.size, np.int64)
        self._mpi.Allgather(np.array([length], np.int64), lengths)
        _check(lengths)
        ends = np.cumsum(lengths)
        everything = np.empty(int(ends[-1]), np.uint8)
        self._mpi.Allgatherv(data, (everything, lengths.tolist()))
        return [_decode(part) for part in np.split(everything, ends[:-1])]

    def barrier(self) -> None:
        self._mpi.Barrier()


class Horovod:
    """Ranks of an initialised `horovod.torch`, for jobs without MPI. Make it on all ranks in the same order.

    Horovod matches operations by name. All ours share one running number, so that ranks that do not call the same
    method get an error from Horovod and not each other's data.
    """

    _instances = itertools.count()

    @classmethod
    def begin_anew(cls) -> None:
        """After `hvd.shutdown`: give names from the first on, as ranks do that join now."""
        cls._instances = itertools.count()

    def __init__(self) -> None:
        import horovod.torch as hvd
        import torch

        self._hvd, self._torch = hvd, torch
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self.mpi: Any | None = None
        self._prefix = f"harness.checkpoint.{next(self._instances)}"
        self._number = itertools.count()

    def broadcast(self, value: Json) -> Json:
        data, length = _encode(value if self.rank == 0 else None)
        lengths = self._gather(np.array([length], np.int64))
        _check(lengths[:1])
        buffer = data if self.rank == 0 else np.empty(int(lengths[0]), np.uint8)
        sent = self._hvd.broadcast(self._torch.from_numpy(buffer), 0, name=self._name())
        return _decode(sent.numpy())

    def all_gather(self, value: Json) -> list[Json]:
        data, length = _encode(value)
        lengths = self._gather(np.array([length], np.int64))
        _check(lengths)
        return [_decode(part) for part in np.split(self._gather(data), np.cumsum(lengths)[:-1])]

    def barrier(self) -> None:
        self._gather(np.zeros(1, np.int64))

    def all_to_all(self, data: Bytes, sizes: Sequence[int]) -> list[Bytes]:
        """`data` in parts of these sizes, one to each rank (at most 2 GiB); what each sent to this one. Collective."""
        splits = self._torch.tensor(list(sizes), dtype=self._torch.int32)
        received, counts = self._hvd.alltoall(self._torch.from_numpy(data), splits=splits, name=self._name())
        return np.split(received.numpy(), np.cumsum(counts.numpy())[:-1])

    def _gather(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        gathered: npt.NDArray[Any] = self._hvd.allgather(self._torch.from_numpy(array), name=self._name()).numpy()
        return gathered

    def _name(self) -> str:
        return f"{self._prefix}.{next(self._number)}"


def detect() -> Comm:
    """The ranks this process belongs to, from what the program has already initialised. Collective.

    Horovod over MPI, or mpi4py: `Mpi`. Horovod without MPI: `Horovod`. Neither: `Single`. Raises Unavailable where the
    launcher says that there are several ranks but nothing connects them: each would write a checkpoint of its own.
    """
    hvd, mpi = sys.modules.get("horovod.torch"), sys.modules.get("mpi4py.MPI")
    if hvd is not None and not hvd.is_initialized():
        hvd = None
    if hvd is not None and mpi is None and hvd.size() > 1 and hvd.mpi_enabled():
        from mpi4py import MPI as mpi  # Horovod runs over MPI: join it

        leave_together(sys.modules["mpi4py.MPI"].COMM_WORLD)
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        world = mpi.COMM_WORLD
        if world.Get_size() > 1 and (hvd is None or hvd.size() == world.Get_size()):
            return Mpi(world)
    if hvd is not None and hvd.size() > 1:
        return Horovod()
    environment = identify()
    if environment.size > 1:
        raise Unavailable(
            f"the launcher ({environment.launcher}) started {environment.size} ranks, but neither Horovod nor mpi4py"
            " connects them",
            hint="call hvd.init() or import mpi4py.MPI before making a checkpoint Manager, or give it a comm",
        )
    return Single()


def leave_together(world: Any) -> None:
    """At this process's end, wait a moment for the other ranks to come to theirs. Collective.

    Horovod that began MPI ends it on all ranks once one of them is at its end, in a thread, and MPI then ends HDF5. A
    rank that is not so far would lose the library under its hands, and crash in h5py's own clean-up. Hooks run in
    reverse order: this one after h5py's, which is imported later, and before Horovod's.
    """
    own = world.Dup()

    def wait() -> None:
        if sys.modules["mpi4py.MPI"].Is_finalized() or hasattr(sys, "last_value"):
            return  # all is over, or an exception ends this rank: the others may be waiting for it elsewhere
        request = own.Ibarrier()
        deadline = time.monotonic() + _LEAVING
        while not request.Test() and time.monotonic() < deadline:
            time.sleep(0.001)

    atexit.register(wait)


_FAILED = -1
_LEAVING = 5.0
"""Seconds."""


def _encode(value: Json) -> tuple[Bytes, int]:
    """JSON text and its length; `_FAILED` where the value is not JSON, so that all ranks learn of it."""
    try:
        data = np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8).copy()
    except (TypeError, ValueError, RecursionError):
        return np.empty(0, np.uint8), _FAILED
    return data, len(data)


def _decode(data: Bytes) -> Json:
    value: Json = json.loads(data.tobytes())
    return value


def _check(lengths: Sequence[int] | npt.NDArray[np.int64]) -> None:
    """The same verdict on all ranks: they have the same lengths."""
    for rank, length in enumerate(lengths):
        if length == _FAILED:
            raise InternalError(f"rank {rank} has a message for the other ranks that is not JSON")
    if (total := int(np.sum(lengths))) > MAX_MESSAGE:
        raise InternalError(f"a message between ranks has {total} bytes, more than {MAX_MESSAGE}")
