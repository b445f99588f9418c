"""What a checkpoint holds: named tensors with dtype, shape and placement. Pure; knows neither files nor torch.

>>> weight = Leaf("model/fc.weight", "float32", (10, 64))
>>> weight.nbytes
2560

A name is a path: components separated by `/`, each non-empty, without NUL and not `.` or `..`. It is also the path of
the HDF5 dataset. Other characters of a component that a path cannot hold are escaped as in URLs (`escape`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple
from urllib.parse import unquote

from harness.errors import DataError

ITEMSIZE = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element. Elements are little-endian; a bool is 0 or 1; a complex is its real, then its imaginary part."""

Placement = Literal["replicated", "rank0", "sharded", "per_rank"]
"""Who holds the tensor; it says nothing about the file, in which all are whole.

replicated: every rank holds the same bytes, each writes a part. rank0: ranks may differ, rank 0's copy counts. sharded:
every rank holds a part (`shards`), together they hold all. per_rank: rank r holds row r, one row per rank.
"""

PLACEMENTS: tuple[Placement, ...] = ("replicated", "rank0", "sharded", "per_rank")
RESERVED = "_ckpt"
_NO_COMPONENT = frozenset(("", ".", ".."))
_LONE = re.compile("[\ud800-\udfff]")
"""Halves of characters, which UTF-8 has not."""
MAX_NAME = 4096
MAX_COMPONENTS = 256
"""Of a name: each one but the last is a group."""
MAX_DIMENSIONS = 32
MAX_LEAVES = 10_000_000
MAX_BYTES = 1 << 60


class Leaf(NamedTuple):
    """One global tensor: path, dtype (a key of ITEMSIZE), shape, placement."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    placement: Placement = "replicated"

    @property
    def nbytes(self) -> int:
        return ITEMSIZE[self.dtype] * math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape)}"


def escape(component: str) -> str:
    """One component of a path from any text; `unescape` is the way back.

    >>> escape("a/b"), escape("fc.weight"), escape("..")
    ('a%2Fb', 'fc.weight', '%2E%2E')
    """
    if component not in _NO_COMPONENT and "%" not in component and "/" not in component and "\0" not in component:
        return component
    if component in (".", ".."):
        return component.replace(".", "%2E")
    if component == "":
        return "%"
    return component.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")


def unescape(component: str) -> str:
    """The text behind a component: `escape` the other way, which is a URL's but for the empty text."""
    return "" if component == "%" else unquote(component)


def check_schema(leaves: Sequence[Leaf], links: Iterable[str] = ()) -> None:
    """Raises DataError where the leaves, and second names of them, cannot be in one HDF5 file. O(n)."""
    leaves = [*leaves, *(Leaf(name, "bool", ()) for name in links)]  # second names obey the rules of first ones
    if len(leaves) > MAX_LEAVES:
        raise DataError(f"{len(leaves)} tensors are more than the {MAX_LEAVES} of one checkpoint")
    names = {leaf.name for leaf in leaves}
    if len(names) != len(leaves):
        twice, _ = Counter(leaf.name for leaf in leaves).most_common(1)[0]
        raise DataError(f"two tensors are called {twice!r}")
    for leaf, problem in _problems(leaves):
        raise DataError(f"tensor {leaf.name[:200]!r} {problem}")
    if (total := sum(leaf.nbytes for leaf in leaves)) > MAX_BYTES:
        raise DataError(f"{total} bytes are more than one checkpoint holds")
    if clash := sorted(groups_of(names) & names):
        raise DataError(f"{clash[0]!r} is a tensor and also the beginning of another tensor's name")


def groups_of(names: Iterable[str]) -> set[str]:
    """The groups of the file in which datasets of these names lie, without the root.

    >>> sorted(groups_of(["model/block/weight", "model/bias", "step"]))
    ['model', 'model/block']
    """
    groups: set[str] = set()
    for parent in {name.rpartition("/")[0] for name in names}:
        while parent and parent not in groups:
            groups.add(parent)
            parent = parent.rpartition("/")[0]
    return groups


def _problems(leaves: Sequence[Leaf]) -> Iterator[tuple[Leaf, str]]:
    """Leaves that cannot be, and why. Each question relies on the answers to those before it.

    One question after the other, each of all leaves, takes a third of the time that it takes to ask each leaf them all.
    """
    yield from (
        (leaf, "has a name that is no path")
        for leaf in leaves
        if len(leaf.name) > MAX_NAME
        or "\0" in leaf.name
        or leaf.name.count("/") >= MAX_COMPONENTS
        or not _NO_COMPONENT.isdisjoint(leaf.name.split("/"))
    )
    yield from (
        (leaf, "has a name that is not Unicode text")
        for leaf in leaves
        if not leaf.name.isascii() and _LONE.search(leaf.name)
    )
    yield from (
        (leaf, f"is called {RESERVED}, which is reserved") for leaf in leaves if leaf.name.partition("/")[0] == RESERVED
    )
    yield from (
        (leaf, f"has the dtype {leaf.dtype}, which checkpoints do not know")
        for leaf in leaves
        if leaf.dtype not in ITEMSIZE
    )
    yield from (
        (leaf, f"has the placement {leaf.placement!r}, which checkpoints do not know")
        for leaf in leaves
        if leaf.placement not in PLACEMENTS
    )
    yield from (
        (leaf, "is per rank and has no rows") for leaf in leaves if leaf.placement == "per_rank" and not leaf.shape
    )
    yield from (
        (leaf, f"has {len(leaf.shape)} dimensions; HDF5 knows {MAX_DIMENSIONS}")
        for leaf in leaves
        if len(leaf.shape) > MAX_DIMENSIONS
    )
    yield from (
        (leaf, "has an impossible size")
        for leaf in leaves
        if leaf.shape and (min(leaf.shape) < 0 or max(leaf.shape) > MAX_BYTES or leaf.nbytes > MAX_BYTES)
    )


def schema_lines(leaves: Iterable[Leaf], aliases: Mapping[str, str]) -> list[str]:
    """One line per tensor and per second name of a tensor, sorted: what ranks must agree on, in words."""
    links = [f"{name} -> {target}" for name, target in aliases.items()]
    lines = [f"{name}: {dtype}{[*shape]} {placement}" for name, dtype, shape, placement in leaves]
    return sorted([*lines, *links])


def schema_hash(leaves: Iterable[Leaf], aliases: Mapping[str, str]) -> str:
    """64 hex digits that tell whether two ranks (or two checkpoints) hold the same tensors. Independent of order."""
    return hashlib.sha256("\n".join(schema_lines(leaves, aliases)).encode("utf-8", "surrogatepass")).hexdigest()
