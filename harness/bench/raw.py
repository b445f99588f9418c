"""What a file system can do: plain writes and reads of a buffer, through the page cache or around it, made durable.

    data = aligned(8 << 20)
    write(folder / "raw", data, "odirect")      # the file and its folder are synced when it returns
    drop([folder / "raw"])
    read(folder / "raw", data, "buffered")

The limit that a checkpoint is measured against; nothing here knows checkpoints, ranks or clocks.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from harness.checkpoint.cached import share_in_cache
from harness.checkpoint.commit import sync_directory
from harness.checkpoint.pages import aligned

Way = Literal["odirect", "buffered"]
Bytes: TypeAlias = "npt.NDArray[np.uint8]"
PAGE = mmap.PAGESIZE
PIECE = 64 << 20
"""Bytes of one call."""
CACHED = 0.05
"""A file of which no larger share is in the page cache counts as cold."""
_DROP = Path("/proc/sys/vm/drop_caches")


def pages(size: int) -> int:
    """The size in whole pages."""
    return -(-size // PAGE) * PAGE


def ways(folder: Path) -> list[Way]:
    """How this file system can be written: "buffered", and "odirect" where it takes that. Raises OSError."""
    path = folder / f".ways-{os.getpid()}"
    try:
        write(path, aligned(1), "odirect")
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        return ["buffered"]
    finally:
        path.unlink(missing_ok=True)
    return ["odirect", "buffered"]


def write(path: Path, data: Bytes, way: Way, *, offset: int = 0, threads: int = 1) -> None:
    """Write whole pages into a file, which is made where it is not there, until file and folder are durable.

    `threads`: so many parts of it are written at a time. Raises OSError; with "odirect" EINVAL where the file system
    has no such writes.
    """
    descriptor = _open(path, os.O_WRONLY | os.O_CREAT, way)
    part = pages(-(-len(data) // threads))
    try:
        with ThreadPoolExecutor(threads) as pool:
            parts = [data[at : at + part] for at in range(0, len(data), part)]
            starts = range(offset, offset + len(data), part)
            list(pool.map(lambda one, at: _move(os.pwrite, descriptor, one, at, path), parts, starts))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def read(path: Path, data: Bytes, way: Way, *, offset: int = 0) -> None:
    """Fill the buffer, of whole pages, from a file. Raises OSError, EIO where the file is shorter."""
    descriptor = _open(path, os.O_RDONLY, way)
    try:
        _move(lambda fd, view, at: os.preadv(fd, [view], at), descriptor, data, offset, path)
    finally:
        os.close(descriptor)


def drop(paths: Iterable[Path]) -> bool:
    """Put files out of this machine's page cache; whether they are. Raises OSError.

    First it asks the kernel for these files alone; where some stay (another process has mapped them), and root may, for
    everything. Where the file system cannot tell what is cached, it counts as out.
    """
    files = list(paths)
    for path in files:
        _advise(path)
    if all(_cold(path) for path in files):
        return True
    try:
        _DROP.write_text("1")
    except OSError:
        return False
    return all(_cold(path) for path in files)


def warm(path: Path) -> None:
    """Bring a file into this machine's page cache. Raises OSError."""
    piece = bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def _advise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not on the disk yet cannot go
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _cold(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return share_in_cache(descriptor, 0, os.fstat(descriptor).st_size) <= CACHED
    finally:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # asking may have brought in what was asked for
        os.close(descriptor)


def _open(path: Path, flags: int, way: Way) -> int:
    return os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if way == "odirect" else 0), 0o666)


def _move(call: Callable[[int, memoryview, int], int], descriptor: int, data: Bytes, offset: int, path: Path) -> None:
    done = 0
    while done < len(data):
        count = call(descriptor, data[done : done + PIECE].data, offset + done)
        if count <= 0:
            raise OSError(errno.EIO, "the file ends early", str(path))
        done += count
