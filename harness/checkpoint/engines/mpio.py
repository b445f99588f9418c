"""Whole images through MPI-IO, for file systems that are tuned for it (`ROMIO_HINTS`, collective buffering).

Opening and closing are collective. Writing is independent, so that a rank that fails meets the others again when the
file is closed; or collective, where a rank that has failed or has nothing takes part with nothing. Main thread only:
its MPI calls would meet the training's. HDF5 has no part in it: an image is the file's bytes as they are to be, and of
10,000 tensors a call for each took two to three times as long as one for each image.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.comm import Comm
from harness.checkpoint.digest import block_digests
from harness.checkpoint.engines.output import Output
from harness.checkpoint.layout import Layout
from harness.checkpoint.staging import Image
from harness.checkpoint.tensors import Bytes
from harness.errors import InternalError

_ERRORS = {
    "ERR_NO_SPACE": errno.ENOSPC,
    "ERR_QUOTA": errno.EDQUOT,
    "ERR_ACCESS": errno.EACCES,
    "ERR_READ_ONLY": errno.EROFS,
    "ERR_NO_SUCH_FILE": errno.ENOENT,
}
"""Error classes of MPI with an errno of their own; others are EIO."""


def unavailable(comm: Comm) -> str | None:
    """Why `mpio` cannot be used, None where it can."""
    if comm.size > 1 and comm.mpi is None:
        return "there is no MPI between these ranks"
    try:
        from mpi4py import MPI
    except ImportError as error:
        return f"mpi4py cannot be imported ({error})"
    if comm.size > 1 and "horovod.torch" in sys.modules and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return "MPI was started without MPI_THREAD_MULTIPLE, and Horovod's own thread uses it too"
    return None


class Mpio:
    """See `Engine`. `collective`: by collective transfers, as many on each rank; MPI-IO may gather them."""

    background = False

    def __init__(self, log: Callable[[str], None], reason: str = "mpio", *, collective: bool = False) -> None:
        from mpi4py import MPI

        self.name = "mpio-collective" if collective else "mpio"
        self.reason = reason
        self._collective = collective
        self._alone = MPI.COMM_SELF
        library = MPI.Get_library_version()
        if library.startswith("Open MPI v4") and not os.environ.get("OMPI_MCA_io"):  # noqa: SIM112
            log(
                "engine mpio: Open MPI 4's own MPI-IO is slow and can hang; set OMPI_MCA_io=romio321 in the environment"
            )

    def write(self, path: Path, layout: Layout, images: Iterable[Image], comm: Comm) -> dict[int, int]:
        if threading.current_thread() is not threading.main_thread():
            raise InternalError("the checkpoint engine mpio was called outside the main thread")
        from mpi4py import MPI

        mpi = comm.mpi if comm.mpi is not None else self._alone
        try:
            digests = self._write(path, layout, list(images), mpi)
        except MPI.Exception as error:
            code = next((code for name, code in _ERRORS.items() if error.error_class == getattr(MPI, name)), errno.EIO)
            raise OSError(code, f"{os.strerror(code)} ({error})", str(path)) from error
        with Output(path, "buffered", 0) as output:
            output.sync()
        return digests

    def _write(self, path: Path, layout: Layout, images: list[Image], mpi: Any) -> dict[int, int]:
        from mpi4py import MPI

        digests: dict[int, int] = {}
        failure: Exception | None = None
        calls = np.array([len(images)])
        if self._collective:
            mpi.Allreduce(MPI.IN_PLACE, calls, MPI.MAX)
        file = MPI.File.Open(mpi, os.fspath(path), MPI.MODE_RDWR)
        try:
            for number in range(int(calls[0])):
                # What fails before a collective transfer leaves it to take part in; one that fails was taken part in.
                data, offset = np.empty(0, np.uint8), 0
                try:
                    if failure is None and number < len(images):
                        image = images[number]
                        digests.update(enumerate(block_digests(image.data, layout.block), start=image.block))
                        data, offset = image.data, image.offset
                except Exception as error:
                    failure = error
                try:
                    if self._collective or len(data):
                        _move(file, data, offset, together=self._collective)
                except Exception as error:
                    failure = failure or error
                if failure is not None and not self._collective:
                    break
        finally:
            file.Close()
        if failure is not None:
            raise failure
        return digests


def _move(file: Any, data: Bytes, offset: int, *, together: bool) -> None:
    """One transfer. An image is far below the 2 GiB that MPI-IO libraries count in an `int`. Raises OSError."""
    from mpi4py import MPI

    status = MPI.Status()
    (file.Write_at_all if together else file.Write_at)(offset, data, status)
    if (written := status.Get_count(MPI.BYTE)) != len(data):
        raise OSError(errno.EIO, f"{written} of {len(data)} bytes were written")
