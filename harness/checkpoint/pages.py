"""What reading and writing around the page cache (O_DIRECT) want: whole pages, in memory and in the file."""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
from collections.abc import Callable

import numpy as np

from harness.checkpoint.layout import PAGE
from harness.checkpoint.tensors import Bytes

REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What a file system answers that cannot do it."""


_TOUCHED = 16 << 20
"""Bytes that are touched at once."""


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


class Coming:
    """New memory, which is zeros, on its way from the system: a thread touches it, from the beginning on.

    On virtual machines that may take several times as long as what is then copied into it.
    """

    def __init__(self, memory: Bytes) -> None:
        self._memory, self._come = memory, 0
        self._changed = threading.Condition()
        try:
            threading.Thread(target=self._touch, name="checkpoint-memory", daemon=True).start()
        except RuntimeError:  # the limit of threads: it comes as it is used
            self._come = len(memory)

    def wait(self, end: int) -> bool:
        """Until the bytes before `end` are there: whether all are. Nobody may write to them before."""
        if self._come < end:
            with self._changed:
                self._changed.wait_for(lambda: self._come >= end)
        return self._come >= len(self._memory)

    def _touch(self) -> None:
        for at in range(0, len(self._memory), _TOUCHED):
            part = self._memory[at : at + _TOUCHED]
            part[:: mmap.PAGESIZE] = 0
            with self._changed:
                self._come = at + len(part)
                self._changed.notify_all()


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
