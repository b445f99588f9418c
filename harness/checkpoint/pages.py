"""What reading and writing around the page cache (O_DIRECT) want: whole pages, in memory and in the file."""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Callable

import numpy as np

from harness.checkpoint.layout import PAGE
from harness.checkpoint.tensors import Bytes

REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a file system answers that cannot do it."""


def aligned(size: int) -> Bytes:
    """At least `size` zeros, in whole pages, taken from the system as they are touched. Raises MemoryError, OSError.

    What goes around the page cache, and a GPU's copies, ends in the pages that are here when it begins. A fork
    meanwhile (workers of a data loader) would leave those to the child; so children do not get them at all.

    Private memory of huge pages: with small ones, scattered over the machine's memory as they are after a while, the
    same reads around the page cache took up to three times as long, and the first copy into it up to ten times.
    """
    length = max(-(-size // mmap.PAGESIZE), 1) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def move_pages(call: Callable[[Bytes, int], int], data: Bytes, offset: int) -> tuple[int, bool]:
    """Move what is aligned, from the beginning on, by calls with (data, offset) that return how many bytes they moved.

    Returns how many bytes were moved, and whether the file system has refused the rest. Raises OSError.
    """
    if offset % PAGE or data.ctypes.data % PAGE:
        return 0, False
    done, end = 0, len(data) - len(data) % PAGE
    while done < end:
        try:
            count = call(data[done:end], offset + done)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return done, True
        done += count
        if done % PAGE or count == 0:  # it has stopped short, at an end that is not aligned
            break
    return done, False
