"""One plain HDF5 file: each tensor a dataset under its path, as in a checkpoint, and nothing else.

Second names are hard links. It is written without h5py, and read with it. bfloat16 is a float of its own, float8 are
bytes with an attribute `dtype`, as in a checkpoint (`checkpoint.hdf5`).
"""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.convert.inputs import Input
from harness.checkpoint.convert.names import unescape
from harness.checkpoint.convert.tensor import Read, Source, Tensor, Wanted, checked_shape, pieces
from harness.checkpoint.file import write_all
from harness.checkpoint.hdf5 import metadata, metadata_size
from harness.checkpoint.layout import LARGE, PAGE
from harness.checkpoint.schema import ITEMSIZE, Leaf, check_schema
from harness.checkpoint.shards import boxes
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError

DTYPES = frozenset(ITEMSIZE)
_MAX_OBJECTS = 1_000_000
_MAX_DEPTH = 64
_MAX_CHUNK = 64 << 20
_MAX_RATIO = 1100
"""What gzip can make of bytes, and a little."""


def without_mpi() -> None:
    """Keep h5py from starting MPI as it is imported. For programs of one process; before anything imports h5py."""
    if "h5py" not in sys.modules and "mpi4py.MPI" not in sys.modules:
        try:
            import mpi4py
        except ImportError:
            return
        mpi4py.rc.initialize = False


def write(path: Path, tensors: Sequence[Tensor], aliases: Mapping[str, str]) -> None:
    """Names are paths; slashes at their ends count for nothing. Raises DataError, OSError."""
    leaves = [Leaf(tensor.name.strip("/"), tensor.dtype, tensor.shape) for tensor in tensors]
    aliases = {name.strip("/"): target.strip("/") for name, target in aliases.items()}
    check_schema(leaves, aliases)
    starts, end = [], metadata_size(leaves, aliases)
    for leaf in leaves:
        unit = PAGE if leaf.nbytes >= LARGE else leaf.itemsize
        starts.append(-(-end // unit) * unit)
        end = starts[-1] + leaf.nbytes
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, end)
        write_all(descriptor, metadata(leaves, starts, aliases, base=0, end=end), 0)
        for tensor, at in zip(tensors, starts, strict=True):
            for data in pieces(tensor):
                write_all(descriptor, data, at)
                at += len(data)
    finally:
        os.close(descriptor)


def read(path: Path, wanted: Wanted) -> Source:
    """All datasets of a file, under their paths. Raises DataError, InputMissing, StorageError."""
    import h5py

    source = Source([])
    try:
        Input(path, source.files)
        try:
            file = h5py.File(path, "r", locking=False, rdcc_nbytes=_MAX_CHUNK)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} is no HDF5 file that can be read: {str(error)[:200]}") from None
        source.files.callback(file.close)
        try:
            _Walk(path, source, wanted).group(file.id, "", 0)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, UnicodeError) as error:
            raise DataError(f"{path} is damaged, or no HDF5 file: {str(error)[:200]}") from None
    except BaseException:
        source.files.close()
        raise
    return source


class _Walk:
    """Follows hard links only: a link elsewhere may lead out of the file, or in a circle."""

    def __init__(self, path: Path, source: Source, wanted: Wanted) -> None:
        self._path, self._source, self._wanted = path, source, wanted
        self._names: dict[int, str] = {}  # address of a dataset -> its name
        self._groups: set[int] = set()
        self._objects = 0

    def group(self, group: Any, path: str, depth: int) -> None:
        from h5py import h5l, h5o

        address = h5o.get_info(group).addr
        self._objects += 1
        if address in self._groups or depth > _MAX_DEPTH:
            raise DataError(f"{self._path}: the group /{path[:200]} is linked twice, or too deep")
        self._groups.add(address)
        soft: list[tuple[str, str]] = []
        for key in list(group):
            name = f"{path}/{key.decode()}" if path else key.decode()
            kind = group.links.get_info(key).type
            self._objects += 1
            if self._objects > _MAX_OBJECTS:
                raise DataError(f"{self._path} has more than {_MAX_OBJECTS} objects")
            if kind == h5l.TYPE_SOFT:
                soft.append((name, posixpath.join("/", path, group.links.get_val(key).decode())))
            elif kind != h5l.TYPE_HARD:
                if self._wanted(unescape(name)):
                    raise DataError(f"{self._path}: {name[:200]} is a link into another file, which is not followed")
            else:
                self._hard(h5o.open(group, key), name, depth)
        for name, target in soft:
            self._soft(name, posixpath.normpath(target).lstrip("/"))

    def _hard(self, found: Any, name: str, depth: int) -> None:
        from h5py import h5d, h5g, h5o

        if isinstance(found, h5g.GroupID):
            self.group(found, name, depth + 1)
        elif isinstance(found, h5d.DatasetID) and self._wanted(new := unescape(name)):
            first = self._names.setdefault(h5o.get_info(found).addr, new)
            if first != new:
                self._source.aliases[new] = first
            else:
                self._source.tensors.append(_tensor(self._path, new, found))

    def _soft(self, name: str, target: str) -> None:
        if not self._wanted(unescape(name)):
            return
        known = {tensor.name for tensor in self._source.tensors}
        aim = self._source.aliases.get(unescape(target), unescape(target))
        if aim not in known:
            raise DataError(
                f"{self._path}: {name[:200]} is a link to {target[:200]}, which is not followed",
                hint="leave it out with --only",
            )
        self._source.aliases[unescape(name)] = aim


def _tensor(path: Path, name: str, dataset: Any) -> Tensor:
    from h5py import h5d, h5s

    creation, space = dataset.get_create_plist(), dataset.get_space()
    if space.get_simple_extent_type() == h5s.NULL:
        raise DataError(f"{path}: {name[:200]} has no elements and no shape")
    layout = creation.get_layout()
    if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED, h5d.COMPACT) or creation.get_external_count():
        raise DataError(f"{path}: {name[:200]} has its data in other files, which are not read")
    dtype = _dtype(path, name, dataset)
    shape = checked_shape(name, [int(length) for length in space.shape])
    made = Tensor(name, dtype, shape, _reader(path, name, dataset, dtype, shape))
    size = dataset.get_storage_size()
    if made.nbytes > size * (_MAX_RATIO if layout == h5d.CHUNKED else 1):
        raise DataError(f"{path}: {name[:200]} has {made.nbytes} bytes, of which only {size} are in the file")
    if layout == h5d.CHUNKED and int(np.prod(creation.get_chunk(), dtype=object)) * made.itemsize > _MAX_CHUNK:
        raise DataError(
            f"{path}: {name[:200]} is stored in pieces of more than {_MAX_CHUNK} bytes",
            hint="h5repack -l CHUNK=... makes them smaller",
        )
    return made


def _dtype(path: Path, name: str, dataset: Any) -> str:
    """The dtype of a dataset: also those that HDF5 has no name for. Raises DataError."""
    import h5py
    from h5py import h5t

    kind = dataset.get_type()
    if kind.equal(_hdf5_type(h5t, "bfloat16")):
        return "bfloat16"
    if kind.equal(_hdf5_type(h5t, "complex32")):
        return "complex32"
    try:
        known = str(kind.dtype.newbyteorder("=").name)
    except TypeError:
        known = "an unknown type"
    if known == "uint8" and h5py.h5a.exists(dataset, b"dtype"):
        marked = h5py.Dataset(dataset).attrs["dtype"]
        text = marked.decode(errors="replace") if isinstance(marked, bytes) else str(marked)
        return text if text in ("float8_e4m3fn", "float8_e5m2") else known
    if known not in ITEMSIZE:
        raise DataError(
            f"{path}: {name[:200]} is a dataset of {known[:60]}, not of numbers", hint="leave it out with --only"
        )
    return known


def _reader(path: Path, name: str, dataset: Any, dtype: str, shape: tuple[int, ...]) -> Read:
    from h5py import h5s, h5t

    memory = _hdf5_type(h5t, dtype)

    def read(lo: int, hi: int) -> Bytes:
        data = np.empty(hi - lo, np.uint8)
        at = 0
        try:
            for start, count in boxes(shape, lo // ITEMSIZE[dtype], hi // ITEMSIZE[dtype]):
                space = dataset.get_space()
                if shape:
                    space.select_hyperslab(start, count)
                points = space.get_select_npoints()
                part = data[at : at + points * ITEMSIZE[dtype]]
                at += len(part)
                dataset.read(h5s.create_simple((points,)) if shape else h5s.create(h5s.SCALAR), space, part, memory)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{path}: {name[:200]} cannot be read: {str(error)[:200]}") from None
        return data

    return read


def _hdf5_type(h5t: Any, dtype: str) -> Any:
    """The HDF5 type of a dtype, as checkpoints have it."""
    if dtype == "bfloat16":
        made = h5t.IEEE_F32LE.copy()
        made.set_fields(15, 7, 8, 0, 7)
        made.set_size(2)
        made.set_precision(16)
        made.set_ebias(127)
        return made
    if dtype == "complex32":
        return h5t.py_create(np.dtype([("r", "<f2"), ("i", "<f2")]))
    name = "uint8" if dtype.startswith("float8") else dtype
    return h5t.py_create(np.dtype(name).newbyteorder("<"), logical=True)
