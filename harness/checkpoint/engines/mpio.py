"""Hyperslabs through h5py's MPI-IO driver, for file systems that are tuned for MPI-IO.

Opening and closing are collective. Writing is independent, so that a rank that fails meets the others again when the
file is closed; or collective, where a rank that has failed or has nothing takes part with empty selections. Main thread
only: HDF5 is not thread-safe here, and its calls would meet the training's.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.checkpoint.comm import Comm
from harness.checkpoint.digest import block_digests
from harness.checkpoint.engines.output import Output
from harness.checkpoint.layout import LARGE, Layout, Piece
from harness.checkpoint.shards import boxes
from harness.checkpoint.staging import LARGE_IMAGE, Image
from harness.checkpoint.tensors import Bytes
from harness.errors import InternalError

PIECE = LARGE_IMAGE
"""Bytes of one transfer at the most: far below 2 GiB, which MPI-IO libraries count in an `int`."""


def unavailable(comm: Comm) -> str | None:
    """Why `mpio` cannot be used, None where it can."""
    try:
        import h5py
    except ImportError as error:
        return f"h5py cannot be imported ({error})"
    if not h5py.get_config().mpi:
        return "this h5py was built without MPI"
    if comm.size > 1 and comm.mpi is None:
        return "there is no MPI between these ranks"
    if comm.size > 1 and "horovod.torch" in sys.modules:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return "MPI was started without MPI_THREAD_MULTIPLE, and Horovod's own thread uses it too"
    return None


class Mpio:
    """See `Engine`. `collective`: tensors of LARGE bytes and more are written by collective transfers.

    Smaller ones never are: each would cost all ranks a synchronisation for less than a page of the file system.
    """

    superblock_first = True
    background = False

    def __init__(self, log: Callable[[str], None], reason: str = "mpio", *, collective: bool = False) -> None:
        from mpi4py import MPI

        self.name = "mpio-collective" if collective else "mpio"
        self.reason = reason
        self._collective = collective
        self._alone = MPI.COMM_SELF
        library = MPI.Get_library_version()
        if library.startswith("Open MPI v4") and not os.environ.get("OMPI_MCA_io"):  # noqa: SIM112
            log("engine mpio: Open MPI 4's own MPI-IO can hang with HDF5; set OMPI_MCA_io=romio321 in the environment")

    def write(self, path: Path, layout: Layout, images: Iterable[Image], comm: Comm) -> dict[int, int]:
        import h5py

        if threading.current_thread() is not threading.main_thread():
            raise InternalError("the checkpoint engine mpio was called outside the main thread")
        mpi = comm.mpi if comm.mpi is not None else self._alone
        with h5py.File(path, "r+", driver="mpio", comm=mpi, libver=("v108", "v108")) as file:
            digests = (_write_together if self._collective else _write_alone)(file.id, layout, images, mpi)
        with Output(path, "buffered", 0) as output:
            output.sync()
        return digests


class _Selection(NamedTuple):
    """h5py's objects: which elements of which data set, and how many there are in memory."""

    dataset: Any
    memory: Any
    space: Any


def _write_alone(file: Any, layout: Layout, images: Iterable[Image], mpi: Any) -> dict[int, int]:
    digests: dict[int, int] = {}
    transfer = _transfer(collective=False)
    for image in images:
        digests.update(enumerate(block_digests(image.data, layout.block), start=image.block))
        for piece, data in _pieces(layout, image):
            _write(file, layout, piece, data, transfer)
    return digests


def _write_together(file: Any, layout: Layout, images: Iterable[Image], mpi: Any) -> dict[int, int]:
    """As `_write_alone`, but transfers of large tensors are collective: as many on each rank, in the same order."""
    from mpi4py import MPI

    digests: dict[int, int] = {}
    mine: dict[int, list[tuple[Piece, Bytes]]] = {}
    failure: Exception | None = None
    alone, together = _transfer(collective=False), _transfer(collective=True)
    try:
        for image in images:
            digests.update(enumerate(block_digests(image.data, layout.block), start=image.block))
            for piece, data in _pieces(layout, image):
                if layout.leaves[piece.leaf].nbytes < LARGE:
                    _write(file, layout, piece, data, alone)
                else:
                    mine.setdefault(piece.leaf, []).append((piece, data))
    except Exception as error:
        failure = error
    calls = np.zeros(len(layout.leaves), np.int32)
    for leaf, parts in mine.items():
        calls[leaf] = len(parts)
    mpi.Allreduce(MPI.IN_PLACE, calls, op=MPI.MAX)
    for leaf in np.flatnonzero(calls).tolist():
        parts = mine.get(leaf, [])
        for number in range(calls[leaf]):
            # What fails before the transfer leaves it to take part in; a transfer that fails has been taken part in.
            try:
                given = parts[number] if failure is None and number < len(parts) else None
                selected = None if given is None else _select(file, layout, given[0])
            except Exception as error:
                failure = failure or error
                given = selected = None
            try:
                if given is None or selected is None:
                    _move(_select_nothing(file, layout, leaf), np.empty(1, np.uint8), together)
                else:
                    _move(selected, given[1], together)
            except Exception as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return digests


def _transfer(*, collective: bool) -> Any:
    from h5py import h5fd, h5p

    made = h5p.create(h5p.DATASET_XFER)
    made.set_dxpl_mpio(h5fd.MPIO_COLLECTIVE if collective else h5fd.MPIO_INDEPENDENT)
    return made


def _pieces(layout: Layout, image: Image) -> Iterable[tuple[Piece, Bytes]]:
    """The parts of tensors in an image with their bytes, at most PIECE bytes each."""
    for at in range(0, len(image.data), PIECE):
        lo, hi = image.offset + at, image.offset + min(at + PIECE, len(image.data))
        for piece in layout.pieces(lo, hi):
            start = piece.offset - image.offset
            yield piece, image.data[start : start + piece.hi - piece.lo]


def _write(file: Any, layout: Layout, piece: Piece, data: Bytes, transfer: Any) -> None:
    _move(_select(file, layout, piece), data, transfer)


def _select(file: Any, layout: Layout, piece: Piece) -> _Selection:
    from h5py import h5d, h5s

    leaf = layout.leaves[piece.leaf]
    dataset = h5d.open(file, leaf.name.encode())
    if not leaf.shape:
        return _Selection(dataset, h5s.create(h5s.SCALAR), dataset.get_space())
    space, lo, hi = dataset.get_space(), piece.lo // leaf.itemsize, piece.hi // leaf.itemsize
    # The boxes follow each other in the file and in memory, so their union is in the order of the bytes.
    space.select_none()
    for start, extent in boxes(leaf.shape, lo, hi):
        space.select_hyperslab(start, extent, op=h5s.SELECT_OR)
    return _Selection(dataset, h5s.create_simple((hi - lo,)), space)


def _select_nothing(file: Any, layout: Layout, leaf: int) -> _Selection:
    """For a collective transfer to which this rank gives nothing."""
    from h5py import h5d, h5s

    dataset = h5d.open(file, layout.leaves[leaf].name.encode())
    space, memory = dataset.get_space(), h5s.create_simple((1,))
    space.select_none()
    memory.select_none()
    return _Selection(dataset, memory, space)


def _move(selection: _Selection, data: Bytes, transfer: Any) -> None:
    """One transfer of the elements as they are: memory type and file type are the same, nothing is converted."""
    dataset, memory, space = selection
    dataset.write(memory, space, data, dataset.get_type(), transfer)
