"""A file that images are written to: through the page cache, or around it (O_DIRECT) where the file system can.

    with Output(path, "auto", size) as output:
        output.write(image.data, image.offset)      # from any thread
        output.sync()

Writing around the cache saves a copy, spares the data that the training keeps in the cache, and reports a full disk at
once. It asks for page-aligned memory, offsets and lengths. What is not aligned, as the end of the file, goes through
the cache; so does everything once the file system has refused (EINVAL), whenever that happens.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Literal

from harness.checkpoint.file import write_all
from harness.checkpoint.pages import REFUSED, move_pages
from harness.checkpoint.tensors import Bytes

Io = Literal["auto", "buffered", "odirect"]
"""auto: around the page cache for `LARGE_PART` bytes and more; odirect: for any size. Both fall back to buffered."""
LARGE_PART = 8 << 20


class Output:
    """An existing file, open for writing. `size`: about how many bytes this rank writes."""

    def __init__(self, path: Path, io: Io, size: int) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        self._cached = os.open(path, flags)
        self._around: int | None = None
        self.odirect = False
        """Whether writes go around the page cache, at present."""
        if hasattr(os, "O_DIRECT") and (io == "odirect" or (io == "auto" and size >= LARGE_PART)):
            try:
                self._around = os.open(path, flags | os.O_DIRECT)
                self.odirect = True
            except OSError as error:
                if error.errno not in REFUSED:
                    os.close(self._cached)
                    raise

    def write(self, data: Bytes, offset: int) -> None:
        """All bytes, at an offset of the file. Threads may write different pages at once. Raises OSError."""
        done = self._write_around(data, offset) if self.odirect else 0
        if done < len(data):
            write_all(self._cached, data[done:], offset + done)

    def sync(self) -> None:
        """Make durable what was written, in either way. Raises OSError."""
        os.fdatasync(self._cached)

    def close(self) -> None:
        """Close the file; nobody may be writing any more. Raises OSError."""
        around, self._around, self.odirect = self._around, None, False
        try:
            if around is not None:
                os.close(around)
        finally:
            os.close(self._cached)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write_around(self, data: Bytes, offset: int) -> int:
        """Write what is aligned, from the beginning on. Returns how many bytes were written."""
        around = self._around
        if around is None:
            return 0
        done, refused = move_pages(lambda part, at: os.pwrite(around, part.data, at), data, offset)
        if refused:
            self.odirect = False  # for all threads, from their next image on
        return done
