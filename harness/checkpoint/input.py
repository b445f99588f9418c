"""A file that is read: through the page cache, or around it (O_DIRECT) where the file system can. See `output`.

    data = aligned(16 << 20)
    source = Input(descriptor, path)
    source.go_around()                          # from now on, if it can
    source.read(data, offset)                   # from any thread

Reading around the cache saves a copy, leaves the cache to others, and asks the disk for all that is wanted at once. It
asks for page-aligned memory, offsets and lengths. What is not aligned, as the end of the file, goes through the cache;
so does everything once the file system has refused (EINVAL), whenever that happens.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness.checkpoint.file import read_all
from harness.checkpoint.pages import move_pages
from harness.checkpoint.tensors import Bytes


class Input:
    """A file that is open for reading as `descriptor`, which it closes, and lies at `path`."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path
        self._around: int | None = None
        self._refused = False

    def go_around(self) -> None:
        """Read around the page cache from now on. Nothing changes where the file system cannot."""
        if self._around is None and hasattr(os, "O_DIRECT"):
            try:
                self._around = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT)
            except OSError:
                return  # an error of the file itself comes again where it is read

    def read(self, buffer: Bytes, offset: int) -> None:
        """Fill the buffer from an offset of the file. Threads may read at once. Raises OSError, EOFError."""
        done = self._read_around(buffer, offset)
        if done < len(buffer):
            read_all(self.descriptor, buffer[done:], offset + done)

    def close(self) -> None:
        if self._around is not None:
            os.close(self._around)
        os.close(self.descriptor)

    def _read_around(self, buffer: Bytes, offset: int) -> int:
        """Read what is aligned, from the beginning on. Returns how many bytes were read."""
        around = self._around
        if around is None or self._refused:
            return 0
        done, refused = move_pages(lambda part, at: os.preadv(around, [part.data], at), buffer, offset)
        if refused:
            self._refused = True  # for all threads, from their next read on
        return done
