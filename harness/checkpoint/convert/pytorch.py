"""Files of `torch.save`: a ZIP file with a pickle that says which tensors there are, and one entry per storage.

Written without torch and without pickle, opcode by opcode, so that storages can be written part by part; such a file
is what `torch.load(path, weights_only=True)`, also with `mmap=True`, reads. Read by torch itself, which maps the file
and unpickles nothing but tensors and plain values; the bytes are then read, not mapped.
"""

from __future__ import annotations

import itertools
import pickle
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.convert import archive
from harness.checkpoint.convert.inputs import Input
from harness.checkpoint.convert.tensor import Read, Source, Tensor, Wanted, checked_shape, pieces
from harness.checkpoint.schema import ITEMSIZE
from harness.checkpoint.shards import boxes
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError, UsageError

DTYPES = frozenset(ITEMSIZE)
_STORAGES = {
    "bool": "BoolStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
"""The classes that torch names for a dtype; for others it names UntypedStorage and the dtype."""
_MAX_PICKLE = 256 << 20
_MAX_DEPTH = 32
_ORDERED = "collections OrderedDict"


def write(path: Path, tensors: Sequence[Tensor], aliases: Mapping[str, str]) -> None:
    """Second names share the storage of the first. Raises DataError, OSError."""
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True) as file:
        listed = _pickle(tensors, aliases)
        archive.add(file, "archive/data.pkl", len(listed), [listed])
        archive.add(file, "archive/byteorder", 6, [b"little"])
        for number, tensor in enumerate(tensors):
            archive.add(file, f"archive/data/{number}", tensor.nbytes, (data.data for data in pieces(tensor)))
        archive.add(file, "archive/version", 2, [b"3\n"])


def read(path: Path, wanted: Wanted, key: str | None = None) -> Source:
    """The tensors of a dict, or of the dict at `key` ("model", or "a/b" for one in another) in it.

    Values that are no tensors are left out, and told. Raises DataError, InputMissing, StorageError, UsageError.
    """
    source = Source([])
    try:
        file = Input(path, source.files)
        starts = _check(file, _archive(file, source))
        found = _pick(path, _load(path), key)
        left_out = [str(name) for name, value in found.items() if not _is_tensor(value)]
        if left_out:
            source.notes.append(f"left out, as it is no tensor: {', '.join(sorted(left_out)[:5])}")
        first: dict[object, str] = {}
        places = _Places(path)
        for name, tensor in found.items():
            if not _is_tensor(tensor) or not wanted(name):
                continue
            made = _tensor(file, name, tensor, places, starts)
            identity = (tensor.data_ptr(), made.shape, tensor.stride(), made.dtype) if made.nbytes else name
            if identity in first:
                source.aliases[name] = first[identity]
            else:
                first[identity] = name
                source.tensors.append(made)
        if (total := sum(tensor.nbytes for tensor in source.tensors)) > 2 * file.size:
            raise DataError(f"{path} has {file.size} bytes, its tensors {total}: they overlap")
    except BaseException:
        source.files.close()
        raise
    return source


# Writing


def _pickle(tensors: Sequence[Tensor], aliases: Mapping[str, str]) -> bytes:
    """{name: tensor} in pickle protocol 2, as torch writes it, without memo."""
    numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
    numbers |= {name: numbers[target] for name, target in aliases.items()}
    items = (_text(name) + _rebuild(tensors[number], number) for name, number in sorted(numbers.items()))
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _rebuild(tensor: Tensor, number: int) -> bytes:
    strides = list(itertools.accumulate((max(1, length) for length in tensor.shape[:0:-1]), int.__mul__, initial=1))
    typed = tensor.dtype in _STORAGES
    storage = _global("torch", _STORAGES[tensor.dtype]) if typed else _global("torch.storage", "UntypedStorage")
    count = tensor.nbytes // tensor.itemsize if typed else tensor.nbytes
    place = b"(" + _text("storage") + storage + _text(str(number)) + _text("cpu") + _integer(count) + b"tQ"
    form = _integer(0) + _integers(tensor.shape) + _integers(strides[::-1] if tensor.shape else [])
    hooks = _global("collections", "OrderedDict") + b")R"
    function = _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    dtype = b"" if typed else _global("torch", tensor.dtype)
    return function + b"(" + place + form + b"\x89" + hooks + dtype + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _integer(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + number.to_bytes(4, "little")
    return b"\x8a" + bytes([9]) + number.to_bytes(9, "little")


def _integers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


# Reading


def _archive(file: Input, source: Source) -> archive.Archive:
    try:
        return archive.Archive(file, source.files)
    except DataError as error:
        if file.size and file.bytes(0, 1) == b"\x80":  # a pickle, of which nothing else is read
            error.hint = "torch.save wrote this form before version 1.6: load it with torch.load, and save it again"
        raise


def _check(file: Input, entries: archive.Archive) -> dict[int, int]:
    """Where the file's storages begin and end: {start: end}. Raises DataError where torch should not see the file."""
    roots = {name.partition("/")[0] for name in entries.entries}
    root = min(roots, default="")
    pickled = f"{root}/data.pkl"
    if len(roots) != 1 or pickled not in entries.entries or f"{root}/constants.pkl" in entries.entries:
        raise DataError(f"{file.path} is not what torch.save(model.state_dict(), ...) writes")
    if any(not entries.stored(name) for name in entries.entries):
        raise DataError(f"{file.path} is compressed, as torch never does it")
    _check_pickle(file.path, entries.bytes(pickled, _MAX_PICKLE))
    order = f"{root}/byteorder"
    if order in entries.entries and entries.bytes(order, 16) != b"little":
        raise DataError(f"{file.path} was written on a big-endian machine")
    storages = (name for name in entries.entries if name.startswith(f"{root}/data/"))
    return {(start := entries.start(name)): start + entries.entries[name].file_size for name in storages}


def _check_pickle(path: Path, data: bytes) -> None:
    """Look at what the pickle would import, without running it: torch itself lets a little more pass than tensors."""
    try:
        for code, value, _ in pickletools.genops(data):
            if code.name == "STACK_GLOBAL" or (
                code.name in ("GLOBAL", "INST") and not str(value).startswith("torch") and value != _ORDERED
            ):
                raise _more(path, f"it refers to {str(value or 'objects')[:100]!r}")
    except ValueError as error:
        raise DataError(f"{path} is damaged: {str(error)[:200]}") from None


def _more(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} holds more than tensors and plain values, and is not unpickled: {why}",
        hint="save the state_dict alone: torch.save(model.state_dict(), ...)",
    )


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _more(path, _first_line(error)) from None
    except Exception as error:
        raise DataError(f"{path} cannot be read by torch: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {told[:200]}"


def _pick(path: Path, value: Any, key: str | None) -> dict[str, Any]:
    """The dict that is wanted. Raises UsageError with the keys there are."""
    for part in key.split("/") if key else ():
        if not isinstance(value, dict) or part not in value:
            raise UsageError(f"{path} has no {key!r}", hint=_keys(value))
        value = value[part]
    if not isinstance(value, dict) or any(not isinstance(name, str) for name in value):
        raise UsageError(f"{path} holds {f'at {key!r} ' if key else ''}no dict of tensors", hint=_keys(value))
    if not value:
        raise UsageError(f"{path} holds {f'at {key!r} ' if key else ''}nothing")
    if not any(_is_tensor(item) for item in value.values()) or any(_holds_tensors(v) for v in value.values()):
        raise UsageError(f"{path} holds several things", hint=_keys(value))
    return value


def _keys(value: Any) -> str:
    dicts = [name for name, item in value.items() if isinstance(item, dict)] if isinstance(value, dict) else []
    return f"choose one with --key: {', '.join(map(str, dicts[:10]))}" if dicts else "it takes what a state_dict is"


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    """Whether a list or dict has tensors in it."""
    if depth > _MAX_DEPTH:
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(_is_tensor(item) or _holds_tensors(item, depth + 1) for item in items)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


class _Places:
    """Where in the file a mapped address lies."""

    def __init__(self, path: Path) -> None:
        self._ranges = []
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                span, _, offset, _, _, *name = line.rstrip("\n").split(maxsplit=5)
                if name == [str(path.resolve())]:
                    lo, hi = (int(text, 16) for text in span.split("-"))
                    self._ranges.append((lo, hi, int(offset, 16)))

    def offset(self, address: int) -> int | None:
        """None where the system does not tell."""
        return next((address - lo + at for lo, hi, at in self._ranges if lo <= address < hi), None)


def _tensor(file: Input, name: str, tensor: Any, places: _Places, starts: dict[int, int]) -> Tensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    usual = str(tensor.layout) == "torch.strided" and tensor.device.type == "cpu" and not tensor.is_quantized
    if not usual or dtype not in ITEMSIZE:
        raise DataError(
            f"{file.path}: {name[:200]!r} is a {tensor.layout} tensor of {dtype} on {tensor.device.type},"
            " which cannot be imported"
        )
    shape = checked_shape(name, list(tensor.shape))
    storage = tensor.untyped_storage()
    made = Tensor(name, dtype, shape, lambda lo, hi: np.empty(0, np.uint8))
    if not made.nbytes:
        return made
    if made.nbytes > storage.nbytes():
        raise DataError(f"{file.path}: {name[:200]!r} repeats its elements; save it as tensor.clone()")
    start = places.offset(storage.data_ptr())
    if start is not None and starts.get(start) != start + storage.nbytes():
        raise DataError(f"{file.path}: {name[:200]!r} is not where the file has a storage")
    if start is None or tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        return Tensor(name, dtype, shape, _gather(tensor.detach()))
    first = start + tensor.storage_offset() * made.itemsize
    return Tensor(name, dtype, shape, lambda lo, hi: file.part(first, lo, hi))


def _gather(tensor: Any) -> Read:
    """Elements of a tensor that are not one after the other in memory."""

    def read(lo: int, hi: int) -> Bytes:
        import torch

        parts = []
        size = tensor.element_size()
        for start, count in boxes(tuple(tensor.shape), lo // size, hi // size):
            box = tensor[tuple(slice(at, at + length) for at, length in zip(start, count, strict=True))]
            flat = box.contiguous().resolve_conj().resolve_neg().reshape(-1)
            parts.append((torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1).view(torch.uint8))
        data: Bytes = torch.cat(parts).numpy()
        return data

    return read
