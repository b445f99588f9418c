"""A file that somebody else made: opened once, read at given places, never mapped: one that shrinks is an error.

with ExitStack() as files:
    file = Input(Path("model.safetensors"), files)
    file.bytes(0, 8)
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from harness.checkpoint.file import read_all
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError, InputMissing, StorageError


class Input:
    """A regular file, open until `files` is closed. `follow`: it may be a link.

    Raises InputMissing, DataError, StorageError.
    """

    def __init__(self, path: Path, files: ExitStack, *, follow: bool = True) -> None:
        self.path = path
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        try:
            self.descriptor = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            raise InputMissing(f"there is no {path}") from None
        except OSError as error:
            if not follow and path.is_symlink():
                raise DataError(
                    f"{path} is a link, which may lead anywhere", hint="copy the set with `cp -rL` and import the copy"
                ) from None
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        files.callback(os.close, self.descriptor)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a file")
        self.size = status.st_size

    def part(self, start: int, lo: int, hi: int) -> Bytes:
        """Bytes [start + lo, start + hi) of the file. Raises DataError where it ends before, StorageError."""
        data = np.empty(hi - lo, np.uint8)
        try:
            if hi > lo:
                read_all(self.descriptor, data, start + lo)
        except EOFError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}") from error
        return data

    def bytes(self, at: int, size: int) -> bytes:
        return self.part(at, 0, size).tobytes()
