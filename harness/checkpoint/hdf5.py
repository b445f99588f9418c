"""The HDF5 metadata of a file of contiguous data sets, as bytes: without the HDF5 library, and without a file.

The library takes 25 to 65 us for each data set and each group, in the main thread only, and how much room it takes is
known afterwards. What is needed here of the format is little, and so old that every HDF5 reads it: superblock version
0, groups as symbol tables, object headers version 1. The names are those of the HDF5 File Format Specification 3.0, the
sections of which stand beside them.

    superblock, object header of each data set, then of each group: object header, local heap with its names, symbol
    table nodes (of 8 links), B-tree nodes from the lowest level to the root (of 32 nodes below)

All of it is in that order without gaps. Addresses count from `base`, the end of the user block. Names are UTF-8, which
symbol tables cannot say.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain

from harness.checkpoint.schema import Leaf, groups_of

_UNDEFINED = (1 << 64) - 1
_LINKS, _NODES = 8, 32
"""Of a symbol table node, and of a B-tree node: twice the K of the superblock."""
_SUPERBLOCK, _GROUP, _HEAP, _TABLE, _TREE = 96, 40, 32, 8 + 40 * _LINKS, 24 + 8 * (2 * _NODES + 1)
"""Bytes of the structures; of a group its object header."""
_DATASPACE, _DATATYPE, _FILL, _LAYOUT, _ATTRIBUTE, _SYMBOLS = 1, 3, 5, 8, 12, 17
"""Types of messages."""


def metadata_size(leaves: Sequence[Leaf], links: Iterable[str] = ()) -> int:
    """Bytes of `metadata` for data sets like these leaves and second names for them."""
    size = _SUPERBLOCK + sum(8 * len(leaf.shape) for leaf in leaves)
    size += sum(count * _fixed_size(dtype) for dtype, count in Counter(leaf.dtype for leaf in leaves).items())
    return size + sum(map(_group_size, _children([*(leaf.name for leaf in leaves), *links]).values()))


def metadata(leaves: Sequence[Leaf], starts: Sequence[int], links: Mapping[str, str], *, base: int, end: int) -> bytes:
    """Bytes of the file from `base` on. `starts`: where the data of each leaf begin. `end`: of the file.

    `links`: second names of leaves, which become hard links.
    """
    further = Counter(links.values())
    at, parts = _SUPERBLOCK, [b""]
    entries: dict[str, bytes] = {}  # of symbol tables, without the name, by path
    for leaf, start in zip(leaves, starts, strict=True):
        parts.append(_dataset(leaf, start - base, 1 + further[leaf.name]))
        entries[leaf.name] = struct.pack("<Q24x", at)
        at += len(parts[-1])
    entries |= {name: entries[target] for name, target in links.items()}
    # What is deeper comes first, so that its address is known. The root is the last one.
    groups = _children(entries)
    for group in sorted(groups, key=lambda group: (-group.count("/") if group else 1, group)):
        prefix = f"{group}/" if group else ""
        found, entries[group] = _group(at, sorted((name.encode(), entries[prefix + name]) for name in groups[group]))
        parts.append(found)
        at += len(found)
    parts[0] = _superblock(entries[""], base, end)
    return b"".join(parts)


def _children(names: Iterable[str]) -> dict[str, list[str]]:
    """What is directly in each group, the root included, which is "": data sets of these names, and groups."""
    paths = [*names]
    groups = groups_of(paths)
    found: dict[str, list[str]] = {group: [] for group in ("", *groups)}
    for path in (*paths, *groups):
        parent, _, name = path.rpartition("/")
        found[parent].append(name)
    return found


def _superblock(root: bytes, base: int, end: int) -> bytes:
    """II.A: version 0. `root`: the root group's symbol table entry without its name."""
    versions = struct.pack("<8s8BHHI", b"\x89HDF\r\n\x1a\n", 0, 0, 0, 0, 0, 8, 8, 0, _LINKS // 2, _NODES // 2, 0)
    return versions + struct.pack("<5Q", base, _UNDEFINED, end, _UNDEFINED, 0) + root  # no free space, no driver


def _object(messages: Sequence[bytes], references: int = 1) -> bytes:
    """IV.A.1.a: an object header version 1. `references`: links to it."""
    body = b"".join(messages)
    return struct.pack("<BxHII4x", 1, len(messages), references, len(body)) + body


def _message(kind: int, data: bytes, *, constant: bool) -> bytes:
    data = _padded(data)
    return struct.pack("<HHB3x", kind, len(data), constant) + data


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 8) * 8, b"\0")


def _dataset(leaf: Leaf, place: int, references: int) -> bytes:
    kept = leaf.nbytes > 0
    rank = len(leaf.shape)
    space = struct.pack(f"<BBB5x{rank}Q", 1, rank, 0, *leaf.shape)  # IV.A.2.b, version 1
    layout = struct.pack("<BBQQ", 3, 1, place if kept else _UNDEFINED, leaf.nbytes)  # IV.A.2.i, version 3: contiguous
    return _object(
        [
            _message(_DATASPACE, space, constant=False),
            *_of_dtype(leaf.dtype),
            _message(_LAYOUT, layout, constant=kept),
        ],
        references,
    )


def _fixed_size(dtype: str) -> int:
    """Bytes of the object header of a data set without dimensions."""
    return 16 + (8 + 8) + sum(map(len, _of_dtype(dtype))) + (8 + 24)


@lru_cache(maxsize=64)
def _of_dtype(dtype: str) -> tuple[bytes, ...]:
    """The messages that are the same for all data sets of a dtype: its type; that nothing is filled in (IV.A.2.f)."""
    fill = struct.pack("<4BI", 2, 1, 1, 1, 0)  # version 2, space is there early, never filled
    found = (_message(_DATATYPE, _datatype(dtype), constant=True), _message(_FILL, fill, constant=True))
    return (*found, _remark(dtype)) if dtype.startswith("float8") else found


def _remark(dtype: str) -> bytes:
    """IV.A.2.m, version 1: HDF5 has no such type. The data set is of bytes, an attribute says what they are."""
    name, text = b"dtype\0", dtype.encode()
    kind, space = struct.pack("<B3BI", 0x13, 1, 0, 0, len(text)), struct.pack("<BBB5x", 1, 0, 0)
    sizes = struct.pack("<BxHHH", 1, len(name), len(kind), len(space))
    return _message(_ATTRIBUTE, sizes + _padded(name) + _padded(kind) + _padded(space) + text, constant=False)


def _datatype(dtype: str) -> bytes:
    """IV.A.2.d, version 1. A bool is an enumeration, a complex a compound, as h5py has them."""
    if dtype == "bool":
        names = _padded(b"FALSE\0") + _padded(b"TRUE\0")
        return struct.pack("<BHxI", 0x18, 2, 1) + _integer(1, signed=True) + names + b"\0\1"
    if dtype.startswith("complex"):
        part = _FLOATS[f"float{int(dtype.removeprefix('complex')) // 2}"]
        members = b"".join(
            _padded(name) + struct.pack("<I28x", number * part[0]) + _float(*part)
            for number, name in enumerate((b"r\0", b"i\0"))
        )
        return struct.pack("<BHxI", 0x16, 2, 2 * part[0]) + members
    if dtype in _FLOATS:
        return _float(*_FLOATS[dtype])
    return _integer(*_INTEGERS["uint8" if dtype.startswith("float8") else dtype])


_FLOATS = {"float16": (2, 5), "bfloat16": (2, 8), "float32": (4, 8), "float64": (8, 11)}
"""Bytes, and bits of the exponent."""
_INTEGERS = {f"{sign}int{8 * size}": (size, not sign) for sign in ("", "u") for size in (1, 2, 4, 8)}


def _integer(size: int, signed: bool) -> bytes:
    return struct.pack("<BBHIHH", 0x10, 8 * signed, 0, size, 0, 8 * size)


def _float(size: int, exponent: int) -> bytes:
    """IEEE: the sign in the highest bit, then the exponent, then the mantissa, without its first 1."""
    bits, mantissa = 8 * size, 8 * size - 1 - exponent
    fields = struct.pack("<HHBBBBI", 0, bits, mantissa, exponent, 0, mantissa, (1 << (exponent - 1)) - 1)
    return struct.pack("<BBBBI", 0x11, 0x20, bits - 1, 0, size) + fields


def _group(at: int, links: Sequence[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """A group whose object header lies at `at`, and its symbol table entry (III.C) without the name.

    `links`: (name, the same of what has the name), ascending by name.
    """
    names = [_padded(name + b"\0") for name, _ in links]
    ends = [*accumulate(map(len, names), initial=8)]  # the heap begins with a name that is before all others
    heap = at + _GROUP
    # III.D. 1: the library's "none free".
    parts = [struct.pack("<4s4x3Q", b"HEAP", ends[-1], 1, heap + _HEAP), bytes(8), *names]
    entries = [struct.pack("<Q", offset) + entry for offset, (_, entry) in zip(ends, links, strict=False)]
    address = heap + _HEAP + ends[-1]
    below = []  # (address, the last name) of the nodes of a level
    for first in range(0, len(links), _LINKS):
        table = entries[first : first + _LINKS]
        parts.append(struct.pack("<4sBxH", b"SNOD", 1, len(table)) + b"".join(table).ljust(40 * _LINKS, b"\0"))  # III.B
        below.append((address, ends[first + len(table) - 1]))
        address += _TABLE
    level = 0
    while not level or len(below) > 1:
        nodes, last = [], 0
        for first in range(0, max(1, len(below)), _NODES):
            some = below[first : first + _NODES]
            left = address - _TREE if first else _UNDEFINED
            right = address + _TREE if first + _NODES < len(below) else _UNDEFINED
            keys = chain.from_iterable(some)  # III.A.1: between two nodes the last name of the first one
            tree = struct.pack(f"<4sBBH3Q{2 * len(some)}Q", b"TREE", 0, level, len(some), left, right, last, *keys)
            parts.append(tree.ljust(_TREE, b"\0"))
            last = some[-1][1] if some else 0
            nodes.append((address, last))
            address += _TREE
        below, level = nodes, level + 1
    ((root, _),) = below
    header = _object([_message(_SYMBOLS, struct.pack("<QQ", root, heap), constant=False)])  # IV.A.2.r
    return b"".join([header, *parts]), struct.pack("<QI4xQQ", at, 1, root, heap)


def _group_size(names: Sequence[str]) -> int:
    size = _GROUP + _HEAP + 8 + sum(len(name.encode()) // 8 * 8 + 8 for name in names)
    nodes = -(-len(names) // _LINKS)
    size += _TABLE * nodes
    while True:
        nodes = max(1, -(-nodes // _NODES))
        size += _TREE * nodes
        if nodes == 1:
            return size
