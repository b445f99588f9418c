"""Which elements of a global tensor one rank holds, and where they are among its bytes. Pure arithmetic.

    Box((1024, 512), start=(0, 256), count=(1024, 128))     columns 256 to 383
    Flat((1024, 512), lo=1000, hi=2000)                     elements of the row-major tensor, whatever rows they are in

What a user writes: `Shard(tensor, box)` is a local tensor that stands for a part of a global one, as a value in a dict
of tensors; `PerRank(mapping)` is an entry of a State of which every rank has its own. Files know neither: a checkpoint
holds global tensors, and what is one rank's own is a row of one (`schema.Placement`).

For I/O a part becomes a box of bytes with as few dimensions as possible (`in_bytes`): one that is contiguous in the
global tensor has one. `cuts` is the only place that relates the bytes of a part to those of the tensor.

>>> Box((4, 6), (1, 0), (2, 6)).in_bytes(4)
Box(shape=(96,), start=(24,), count=(48,))
>>> [(cut.at, cut.source) for cut in cuts(Box((4, 6), (0, 2), (4, 3)), 6, 12)]
[(0, (slice(0, 1, None), slice(2, 5, None)))]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from harness.errors import DataError

Shape: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class Box:
    """Elements start[d] <= i[d] < start[d] + count[d] of a tensor of (global) `shape`. Raises DataError outside it."""

    shape: Shape
    start: Shape
    count: Shape

    def __post_init__(self) -> None:
        for field in ("shape", "start", "count"):
            object.__setattr__(self, field, tuple(int(number) for number in getattr(self, field)))
        if not len(self.shape) == len(self.start) == len(self.count):
            raise DataError(f"{self} does not have the same number of dimensions throughout")
        if any(
            at < 0 or n < 0 or at + n > length for length, at, n in zip(self.shape, self.start, self.count, strict=True)
        ):
            raise DataError(f"{self} is not within its tensor")

    @property
    def local_shape(self) -> Shape:
        """The shape of the local tensor."""
        return self.count

    @property
    def elements(self) -> int:
        return math.prod(self.count)

    def in_bytes(self, itemsize: int) -> Box:
        """The same part of the tensor's bytes, in as few dimensions as possible; at least one."""
        if not self.elements:
            return Box((math.prod(self.shape) * itemsize,), (0,), (0,))
        merged = [(itemsize, 0, itemsize)]  # from the last dimension to the first
        for length, at, n in zip(reversed(self.shape), reversed(self.start), reversed(self.count), strict=True):
            inner, inner_at, inner_n = merged[-1]
            if n == 1 or inner_n == inner:  # one row, or whole rows: contiguous
                merged[-1] = (length * inner, at * inner + inner_at, n * inner_n)
            else:
                merged.append((length, at, n))
        shape, start, count = zip(*reversed(merged), strict=True)
        return Box(shape, start, count)


@dataclass(frozen=True)
class Flat:
    """Elements [lo, hi) of a tensor of (global) `shape` in row-major order. Raises DataError outside it."""

    shape: Shape
    lo: int
    hi: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(number) for number in self.shape))
        if not 0 <= self.lo <= self.hi <= math.prod(self.shape):
            raise DataError(f"{self} is not within its tensor")

    @property
    def local_shape(self) -> Shape | None:
        """None: the local tensor may have any shape."""
        return None

    @property
    def elements(self) -> int:
        return self.hi - self.lo

    def in_bytes(self, itemsize: int) -> Box:
        """The same part of the tensor's bytes: a box of one dimension."""
        return Box((math.prod(self.shape) * itemsize,), (self.lo * itemsize,), (self.elements * itemsize,))


Region: TypeAlias = "Box | Flat"


@dataclass(frozen=True, eq=False)
class Shard:
    """A local tensor (torch or numpy) that holds a region of a global one. Raises DataError where the sizes differ."""

    tensor: Any
    region: Region

    def __post_init__(self) -> None:
        check_local(self.tensor, self.region, "a shard")


@dataclass(frozen=True, eq=False)
class PerRank:
    """An entry of a State of which every rank has its own: a dict of tensors and numbers, or of such dicts.

    All ranks have the same keys, dtypes and shapes. A restore on the same number of ranks gives each its own back.
    """

    value: MutableMapping[str, Any]


class Cut(NamedTuple):
    """Bytes [at, at + prod(shape)) of a range, seen as `shape`: `source` of them are `target` of the part's bytes."""

    at: int
    shape: Shape
    source: tuple[slice, ...]
    target: tuple[slice, ...]

    @property
    def size(self) -> int:
        return math.prod(piece.stop - piece.start for piece in self.source)


def region_of(shards: Mapping[str, Region], entry: str, name: str) -> Region | None:
    """What is declared for a parameter (or buffer) of an entry: under `entry.name`, else under `name`."""
    return shards.get(f"{entry}.{name}", shards.get(name))


def row_of(rank: int, size: int, shape: Shape) -> Box:
    """A rank's row of a per-rank leaf, whose local tensors have this shape.

    >>> row_of(2, 4, (7,))
    Box(shape=(4, 7), start=(2, 0), count=(1, 7))
    """
    rest = (0,) * len(shape)
    return Box((size, *shape), (rank, *rest), (1, *shape))


def check_local(tensor: Any, region: Region, name: str) -> None:
    """Raises DataError where this tensor cannot be that region."""
    shape = tuple(int(length) for length in tensor.shape)
    if shape != region.local_shape and (region.local_shape is not None or math.prod(shape) != region.elements):
        raise DataError(f"{name} has the shape {list(shape)}, which is not that of {region}")


def extent(box: Box) -> tuple[int, int]:
    """The flat range [first, end) from the box's first element to its last; (0, 0) where it is empty."""
    if not box.elements:
        return 0, 0
    first = last = 0
    for length, at, n in zip(box.shape, box.start, box.count, strict=True):
        first, last = first * length + at, last * length + at + n - 1
    return first, last + 1


def cuts(box: Box, lo: int, hi: int) -> Iterator[Cut]:
    """What lies of a box in the flat range [lo, hi) of its tensor, in order; at most 2 * dimensions - 1 cuts.

    The elements of all cuts in order are those of the box in its own row-major order.
    """
    first, end = extent(box)
    begin, stop = max(lo, first), min(hi, end)
    at = begin - lo
    for start, count in boxes(box.shape, begin, stop):
        source, target = [], []
        for here, length, begins, holds in zip(start, count, box.start, box.count, strict=True):
            a, b = max(here, begins), min(here + length, begins + holds)
            if a >= b:
                break
            source.append(slice(a - here, b - here))
            target.append(slice(a - begins, b - begins))
        else:
            yield Cut(at, count, tuple(source), tuple(target))
        at += math.prod(count)


def boxes(shape: Shape, lo: int, hi: int) -> list[tuple[Shape, Shape]]:
    """Elements [lo, hi) of a row-major tensor as boxes (start, count), in order; at most 2 * dimensions - 1 of them.

    >>> boxes((4, 5), 3, 12)
    [((0, 3), (1, 2)), ((1, 0), (1, 5)), ((2, 0), (1, 2))]
    """
    if lo >= hi:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    if row == 1 and len(shape) == 1:
        return [((lo,), (hi - lo,))]
    first, last = lo // row, (hi - 1) // row
    if first == last:
        return _within(first, boxes(shape[1:], lo - first * row, hi - first * row))
    parts = []
    if lo % row:
        parts += _within(first, boxes(shape[1:], lo - first * row, row))
        first += 1
    tail = hi % row
    full = last if tail else last + 1
    if first < full:
        parts.append(((first,) + (0,) * (len(shape) - 1), (full - first, *shape[1:])))
    if tail:
        parts += _within(last, boxes(shape[1:], 0, tail))
    return parts


def _within(index: int, inner: Sequence[tuple[Shape, Shape]]) -> list[tuple[Shape, Shape]]:
    return [((index, *start), (1, *count)) for start, count in inner]
