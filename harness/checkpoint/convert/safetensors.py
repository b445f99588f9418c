"""safetensors: 8 bytes with the header's length, the header in JSON, the tensors' bytes one after the other.

The format is that of https://github.com/huggingface/safetensors; its library takes and gives whole tensors, this reads
and writes parts. A set of files with a `model.safetensors.index.json` is read as one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from harness.checkpoint.convert.inputs import Input
from harness.checkpoint.convert.tensor import Source, Tensor, Wanted, checked_shape, expanded, pieces
from harness.checkpoint.strictjson import parse_json
from harness.errors import DataError

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""In the library's own order, the reverse of which is that of the tensors in a file."""
INDEX = ".safetensors.index.json"
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000
"""Bytes; what the library takes."""


def write(path: Path, tensors: Sequence[Tensor], aliases: Mapping[str, str]) -> None:
    """Second names become tensors of their own: the format has no other way. Raises DataError, OSError."""
    # Wide elements first, without gaps: so all are aligned to their own size. The file is the library's, byte for byte.
    rank = {dtype: -number for number, dtype in enumerate(DTYPES)}
    ordered = sorted(expanded(tensors, dict(aliases)), key=lambda tensor: (rank[tensor.dtype], tensor.name.encode()))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    at = 0
    for tensor in ordered:
        if tensor.name == _METADATA:
            raise DataError(f"a tensor is called {_METADATA}, which safetensors uses itself")
        span = [at, at := at + tensor.nbytes]
        header[tensor.name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise DataError(f"the names of {len(ordered)} tensors are more than a safetensors file can list")
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for data in pieces(tensor):
                file.write(data.data)


def read(path: Path, wanted: Wanted) -> Source:
    """One file, or the set of files that an index lists. Raises DataError, InputMissing, StorageError."""
    source = Source([])
    try:
        if path.name.endswith(INDEX):
            _read_set(path, source, wanted)
        else:
            _read_file(Input(path, source.files), source, wanted)
    except BaseException:
        source.files.close()
        raise
    return source


def _read_file(file: Input, source: Source, wanted: Wanted) -> list[str]:
    length = int.from_bytes(file.bytes(0, min(8, file.size)), "little")
    if file.size < 8 or length > min(file.size - 8, _MAX_HEADER):
        raise DataError(
            f"{file.path} is no safetensors file: its header would have {length} bytes, the file has {file.size}"
        )
    known = {theirs: ours for ours, theirs in DTYPES.items()}
    spans = []
    for name, entry in _json(f"the header of {file.path}", file.bytes(8, length)).items():
        if name == _METADATA:
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise DataError(f"{file.path}: {name[:200]!r} is not described as it should be")
        span = entry["data_offsets"]
        if not isinstance(span, list) or len(span) != 2 or any(type(at) is not int for at in span):
            raise DataError(f"{file.path}: {name[:200]!r} has no place in the file")
        spans.append((span[0], span[1], name))
        if not wanted(name):
            continue
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in known:
            raise DataError(
                f"{file.path}: {name[:200]!r} has the dtype {str(entry['dtype'])[:40]}, which is not known here"
            )
        shape = checked_shape(name, entry["shape"])
        tensor = Tensor(name, known[entry["dtype"]], shape, partial(file.part, 8 + length + span[0]))
        if span[1] - span[0] != tensor.nbytes:
            raise DataError(f"{file.path}: {name[:200]!r} has {tensor.nbytes} bytes, but {str(span)[:60]} as its place")
        source.tensors.append(tensor)
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at or end < begin:
            raise DataError(f"{file.path}: there is a gap before {name[:200]!r}, or it overlaps with another tensor")
        at = end
    if at != file.size - 8 - length:
        raise DataError(
            f"{file.path} has {file.size} bytes, its header says {8 + length + at}",
            hint="copy the file again: it may have been cut",
        )
    return [name for _, _, name in spans]


def _read_set(path: Path, source: Source, wanted: Wanted) -> None:
    with ExitStack() as files:
        file = Input(path, files)
        if file.size > _MAX_HEADER:
            raise DataError(f"{path} has {file.size} bytes, which no index has")
        listed = _json(str(path), file.bytes(0, file.size)).get("weight_map")
    if not isinstance(listed, dict) or not listed or any(not isinstance(name, str) for name in listed.values()):
        raise DataError(f"{path} has no weight_map of names and files")
    held: Counter[str] = Counter()
    for name in sorted(set(listed.values())):
        # What a path does elsewhere, a name must not do here: a set of files lies in one directory.
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise DataError(f"{path} names {name[:200]!r}, which is no file beside it")
        held.update(_read_file(Input(path.parent / name, source.files, follow=False), source, wanted))
    if held and held.most_common(1)[0][1] > 1:
        raise DataError(f"{path}: two of its files hold {held.most_common(1)[0][0][:200]!r}")
    if different := sorted(set(listed) ^ set(held)):
        where = "in no file" if different[0] in listed else "not in the index"
        raise DataError(f"{path} and its files differ: {different[0][:200]!r} is {where}")


def _json(what: str, text: bytes) -> dict[str, Any]:
    try:
        value = parse_json(text.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} cannot be understood: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise DataError(f"{what} is no JSON object")
    return value
