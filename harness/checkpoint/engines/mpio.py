"""Hyperslabs through h5py's MPI-IO driver, for file systems that are tuned for MPI-IO.

Opening and closing are collective; writing is independent, in pieces of at most 16 MiB, so that a rank that fails
meets the others again when the file is closed. Main thread only: HDF5 is not thread-safe here, and its calls would
meet the training's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness.checkpoint.comm import Comm
from harness.checkpoint.digest import block_digests
from harness.checkpoint.layout import Layout
from harness.checkpoint.shards import boxes
from harness.checkpoint.staging import Image
from harness.checkpoint.tensors import Bytes
from harness.errors import InternalError


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
    return None


class Mpio:
    """See `Engine`."""

    name = "mpio"
    superblock_first = True
    background = False

    def __init__(self, log: Callable[[str], None], reason: str = "it was asked for") -> None:
        self.reason = reason
        from mpi4py import MPI

        self._alone = MPI.COMM_SELF
        library = MPI.Get_library_version()
        if library.startswith("Open MPI v4") and not os.environ.get("OMPI_MCA_io"):  # noqa: SIM112
            log("engine mpio: Open MPI 4's own MPI-IO can hang with HDF5; set OMPI_MCA_io=romio321 in the environment")

    def write(self, path: Path, layout: Layout, images: Iterable[Image], comm: Comm) -> dict[int, int]:
        import h5py

        if threading.current_thread() is not threading.main_thread():
            raise InternalError("the checkpoint engine mpio was called outside the main thread")
        digests: dict[int, int] = {}
        mpi = comm.mpi if comm.mpi is not None else self._alone
        with h5py.File(path, "r+", driver="mpio", comm=mpi, libver=("v108", "v108")) as file:
            transfer = h5py.h5p.create(h5py.h5p.DATASET_XFER)
            transfer.set_dxpl_mpio(h5py.h5fd.MPIO_INDEPENDENT)
            for image in images:
                digests.update(enumerate(block_digests(image.data, layout.block), start=image.block))
                for piece in layout.pieces(image.offset, image.offset + len(image.data)):
                    at = piece.offset - image.offset
                    leaf = layout.leaves[piece.leaf]
                    lo, hi = piece.lo // leaf.itemsize, piece.hi // leaf.itemsize
                    dataset = h5py.h5d.open(file.id, leaf.name.encode())
                    _write(dataset, leaf.shape, lo, hi, image.data[at : at + piece.hi - piece.lo], transfer)
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        return digests


def _write(dataset: Any, shape: tuple[int, ...], lo: int, hi: int, data: Bytes, transfer: Any) -> None:
    """Elements [lo, hi) as they are: memory type and file type are the same, nothing is converted."""
    from h5py import h5s

    kind = dataset.get_type()
    at = 0
    for start, count in boxes(shape, lo, hi):
        space = dataset.get_space()
        if shape:
            space.select_hyperslab(start, count)
        size = space.get_select_npoints()
        part = data[at : at + size * kind.get_size()]
        at += len(part)
        dataset.write(h5s.create_simple((size,)) if shape else h5s.create(h5s.SCALAR), space, part, kind, transfer)
