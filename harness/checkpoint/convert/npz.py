"""npz: a ZIP file with one .npy file per tensor, what `numpy.savez` writes and `numpy.load` reads. No pickle.

numpy has no bfloat16, float8 and complex32: they are written as float32 and complex64.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from harness.checkpoint.convert import archive
from harness.checkpoint.convert.inputs import Input
from harness.checkpoint.convert.tensor import Read, Source, Tensor, Wanted, checked_shape, expanded, pieces
from harness.checkpoint.schema import ITEMSIZE
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError

DTYPES = frozenset(ITEMSIZE) - {"bfloat16", "float8_e4m3fn", "float8_e5m2", "complex32"}
_SUFFIX = ".npy"
_MAX_HEADER = 16 << 10
_MAX_TURNED = 256 << 20
"""Bytes of a tensor that is stored by columns: it is turned in memory."""


def write(path: Path, tensors: Sequence[Tensor], aliases: Mapping[str, str]) -> None:
    """Second names become tensors of their own. Raises DataError, OSError."""
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as file:
        for tensor in expanded(tensors, dict(aliases)):
            header = _header(tensor)
            archive.add(file, tensor.name + _SUFFIX, len(header) + tensor.nbytes, _parts(header, tensor))


def read(path: Path, wanted: Wanted) -> Source:
    """Raises DataError, InputMissing, StorageError."""
    source = Source([])
    try:
        file = Input(path, source.files)
        entries = archive.Archive(file, source.files)
        for name in entries.entries:
            if wanted(name.removesuffix(_SUFFIX)):
                source.tensors.append(_tensor(path, name, entries))
    except BaseException:
        source.files.close()
        raise
    return source


def _header(tensor: Tensor) -> bytes:
    text = io.BytesIO()
    described = {"descr": npy.dtype_to_descr(np.dtype(tensor.dtype)), "fortran_order": False, "shape": tensor.shape}
    npy.write_array_header_1_0(text, described)
    return text.getvalue()


def _parts(header: bytes, tensor: Tensor) -> Iterator[memoryview | bytes]:
    yield header
    for data in pieces(tensor):
        yield data.data


def _tensor(path: Path, name: str, entries: archive.Archive) -> Tensor:
    if not name.endswith(_SUFFIX):
        raise DataError(f"{path}: {name[:200]!r} is not an array")
    size = entries.entries[name].file_size
    read = entries.reader(name)
    text = io.BytesIO(read(0, min(size, _MAX_HEADER)).tobytes())
    try:
        version = npy.read_magic(text)
        parse = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, by_columns, dtype = parse(text)
    except Exception as error:  # numpy parses it as a Python literal, which fails in many ways
        raise DataError(f"{path}: {name[:200]!r} is no array that can be read: {str(error)[:200]}") from None
    known = dtype.newbyteorder("=").name
    if dtype.kind not in "biufc" or known not in DTYPES:
        raise DataError(
            f"{path}: {name[:200]!r} is an array of {str(dtype)[:60]}, not of numbers",
            hint="leave it out with --only; objects, which are pickles, are never read",
        )
    tensor = Tensor(name.removesuffix(_SUFFIX), known, checked_shape(name, shape), read)
    start = text.tell()
    if start + tensor.nbytes != size:
        raise DataError(f"{path}: {name[:200]!r} has {size} bytes, its header says {start + tensor.nbytes}")
    return Tensor(tensor.name, known, tensor.shape, _reader(path, tensor, read, start, dtype, by_columns))


def _reader(path: Path, tensor: Tensor, read: Read, start: int, dtype: np.dtype[Any], by_columns: bool) -> Read:
    native = dtype.newbyteorder("<")
    turned: Bytes | None = None

    def plain(lo: int, hi: int) -> Bytes:
        data = read(start + lo, start + hi)
        return data if dtype == native else data.view(dtype).astype(native).view(np.uint8)

    def by_rows(lo: int, hi: int) -> Bytes:
        nonlocal turned
        if tensor.nbytes > _MAX_TURNED:
            raise DataError(
                f"{path}: {tensor.name[:200]!r} is stored by columns, which only works for up to {_MAX_TURNED} bytes",
                hint="save it again as numpy.ascontiguousarray(...)",
            )
        if turned is None:
            whole = plain(0, tensor.nbytes).view(native).reshape(tensor.shape[::-1])
            turned = np.ascontiguousarray(whole.transpose()).reshape(-1).view(np.uint8)
        part, turned = turned[lo:hi], None if hi == tensor.nbytes else turned
        return part

    return by_rows if by_columns and len(tensor.shape) > 1 else plain
