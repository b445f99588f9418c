"""ZIP files as numpy and torch make them: written part by part, each entry at a multiple of 64; read with distrust.

An entry that is not compressed is one range of the file's bytes. Compressed ones are read in order.
"""

from __future__ import annotations

import threading
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import IO

import numpy as np

from harness.checkpoint.convert.inputs import Input
from harness.checkpoint.convert.tensor import Read
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError

ALIGNMENT = 64
_LARGE = 1 << 30
"""Entries of this size get 64-bit sizes."""
_MAX_ENTRIES = 1_000_000


def add(archive: zipfile.ZipFile, name: str, size: int, parts: Iterable[memoryview | bytes]) -> None:
    """One entry, uncompressed, with a time that says nothing. Raises DataError, OSError."""
    if "\0" in name or len(name.encode()) > 0xFFFF:
        raise DataError(f"{name[:200]!r} cannot be a name in a ZIP file")
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    entry.file_size = size
    wide = size >= _LARGE
    # Name and extra fields stand before the data: one more field, of a private kind, brings them to their place.
    assert archive.fp is not None
    header = 30 + len(name.encode()) + (20 if wide else 0) + 4
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=wide) as file:
        for part in parts:
            file.write(part)


class Archive:
    """The entries of a ZIP file by name. Raises DataError where it is none, or one that would not end."""

    def __init__(self, file: Input, files: ExitStack) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._open: tuple[str, IO[bytes]] | None = None
        try:
            self._zip = files.enter_context(zipfile.ZipFile(file.path))
            listed = self._zip.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{file.path} is no ZIP file: {error}") from error
        if len(listed) > _MAX_ENTRIES:
            raise DataError(f"{file.path} has {len(listed)} entries, more than {_MAX_ENTRIES}")
        self.entries = {entry.filename: entry for entry in listed}
        if len(self.entries) != len(listed):
            raise DataError(f"{file.path}: two entries have the same name")
        end = 0
        for entry in sorted(listed, key=lambda entry: entry.header_offset):
            if entry.header_offset < end or entry.compress_size < 0:
                raise DataError(f"{file.path}: {entry.filename[:200]!r} overlaps with another entry")
            end = entry.header_offset + 30 + entry.compress_size
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                raise DataError(f"{file.path}: {entry.filename[:200]!r} is encrypted, or compressed in an unusual way")
            if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
                raise DataError(f"{file.path}: {entry.filename[:200]!r} has two different sizes")
        if end > file.size:
            raise DataError(f"{file.path} is cut: it has {file.size} bytes, its entries need {end}")

    def stored(self, name: str) -> bool:
        return self.entries[name].compress_type == zipfile.ZIP_STORED

    def start(self, name: str) -> int:
        """Where the bytes of an uncompressed entry begin in the file."""
        at = self.entries[name].header_offset
        header = self._file.bytes(at, 30)
        if header[:4] != b"PK\3\4":
            raise DataError(f"{self._file.path}: there is no entry where {name[:200]!r} should be")
        start = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + self.entries[name].file_size > self._file.size:
            raise DataError(f"{self._file.path} is cut: {name[:200]!r} is not all there")
        return start

    def reader(self, name: str) -> Read:
        """Read parts of an entry. Read in order, its checksum is compared at its end.

        Compressed ones are best read in order: to go back is to begin again.
        """
        if not self.stored(name):
            return partial(self._inflate, name)
        entry, part = self.entries[name], partial(self._file.part, self.start(name))
        done, checksum = 0, 0

        def read(lo: int, hi: int) -> Bytes:
            nonlocal done, checksum
            data = part(lo, hi)
            if lo <= done < hi:
                done, checksum = hi, zlib.crc32(data[done - lo :].data, checksum)
                if done == entry.file_size and checksum != entry.CRC:
                    raise DataError(f"{self._file.path}: {name[:200]!r} does not match its checksum")
            return data

        return read

    def bytes(self, name: str, limit: int) -> bytes:
        """A whole small entry. Raises DataError where it has more than `limit` bytes."""
        size = self.entries[name].file_size
        if size > limit:
            raise DataError(f"{self._file.path}: {name[:200]!r} has {size} bytes, more than {limit}")
        return self.reader(name)(0, size).tobytes()

    def _inflate(self, name: str, lo: int, hi: int) -> Bytes:
        with self._lock:
            try:
                if self._open is None or self._open[0] != name:
                    self._open = (name, self._zip.open(name))
                handle = self._open[1]
                handle.seek(lo)
                data = handle.read(hi - lo)
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError) as error:
                raise DataError(f"{self._file.path}: {name[:200]!r} cannot be read: {error}") from error
        if len(data) != hi - lo:
            raise DataError(f"{self._file.path}: {name[:200]!r} is shorter than it says")
        return np.frombuffer(data, np.uint8)
