"""Where every byte of the file lies, before the file exists. Pure arithmetic, equal on all ranks.

    0            user block: 4096 bytes of ours, which commit it (text, see `commit`)
    4096         HDF5 superblock and all HDF5 metadata: object headers, groups (`hdf5`)
    head         /_ckpt/digest: uint64 per block, padded to a multiple of 4096 bytes
    data_start   the tensors, cut into blocks of `block` bytes (the last one is shorter)
    data_end     end of the file

Tensors of 64 KiB and more begin at a multiple of 4096. Small ones come first, wide elements before narrow ones, so that
every element is aligned to its own size and none straddles two blocks.

>>> from harness.checkpoint.schema import Leaf
>>> layout = lay_out([Leaf("a", "float32", (3,)), Leaf("b", "float64", (2,))])
>>> [(leaf.name, int(start) - layout.data_start) for leaf, start in zip(layout.leaves, layout.starts)]
[('b', 0), ('a', 16)]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harness.checkpoint.hdf5 import metadata_size
from harness.checkpoint.schema import RESERVED, Leaf

Offsets = npt.NDArray[np.int64]

USER_BLOCK = 4096
PAGE = 4096
DIGESTS = f"{RESERVED}/digest"
LARGE = 64 << 10
"""Datasets of this many bytes and more begin at a multiple of PAGE."""
MAX_BLOCK = 4 << 20
BLOCKS_WANTED = 64
"""Small checkpoints get smaller blocks, so that some tens of ranks still share the writing evenly."""


class Piece(NamedTuple):
    """Bytes [lo, hi) of a leaf, which lie at `offset` of the file."""

    leaf: int
    lo: int
    hi: int
    offset: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Leaves in file order with the byte ranges [starts, ends) they occupy. Empty leaves occupy nothing."""

    leaves: tuple[Leaf, ...]
    starts: Offsets
    ends: Offsets
    head: int
    data_start: int
    data_end: int
    block: int

    @cached_property
    def from_rank0(self) -> Offsets:
        """Indices of the leaves whose placement is rank0."""
        return np.array([index for index, leaf in enumerate(self.leaves) if leaf.placement == "rank0"], np.int64)

    @cached_property
    def parted(self) -> frozenset[int]:
        """Indices of the leaves of which ranks hold parts: those that are sharded or per rank."""
        return frozenset(i for i, leaf in enumerate(self.leaves) if leaf.placement in ("sharded", "per_rank"))

    @property
    def blocks(self) -> int:
        """Number of digest blocks."""
        return -(-(self.data_end - self.data_start) // self.block)

    def pieces(self, lo: int, hi: int) -> Iterator[Piece]:
        """The parts of leaves within file bytes [lo, hi), in file order. O(log n + pieces)."""
        first = int(np.searchsorted(self.ends, lo, side="right"))
        last = int(np.searchsorted(self.starts, hi, side="left"))
        places = zip(self.starts[first:last].tolist(), self.ends[first:last].tolist(), strict=True)
        for index, (start, end) in enumerate(places, first):
            begin, stop = max(start, lo), min(end, hi)
            if begin < stop:
                yield Piece(index, begin - start, stop - start, begin)

    def block_range(self, index: int) -> tuple[int, int]:
        """The file bytes [lo, hi) of one block."""
        lo = self.data_start + index * self.block
        return lo, min(lo + self.block, self.data_end)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The file bytes [lo, hi) of blocks [first, last)."""
        return self.block_range(first)[0], self.block_range(last - 1)[1]

    def blocks_of(self, leaves: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which blocks hold bytes of these leaves (indices): bool[blocks]. O(blocks + leaves)."""
        chosen = np.asarray(leaves, np.int64)
        chosen = chosen[self.ends[chosen] > self.starts[chosen]]
        first = (self.starts[chosen] - self.data_start) // self.block
        last = (self.ends[chosen] - 1 - self.data_start) // self.block
        change = np.zeros(self.blocks + 1, np.int64)
        np.add.at(change, first, 1)
        np.add.at(change, last + 1, -1)
        touched: npt.NDArray[np.bool_] = np.cumsum(change[:-1]) > 0
        return touched


def lay_out(leaves: Iterable[Leaf], *, links: Iterable[str] = (), block: int | None = None) -> Layout:
    """The layout of version 1, of `leaves` and second names of them.

    `block`: bytes per digest block, a power of two and at least PAGE; None: by the size of the whole.
    """
    alike: dict[tuple[bool, int, bool], list[Leaf]] = {}
    for leaf in leaves:
        alike.setdefault(_order(leaf), []).append(leaf)
    ordered = [leaf for _, some in sorted(alike.items()) for leaf in sorted(some, key=attrgetter("name"))]
    sizes = np.fromiter((leaf.nbytes for leaf in ordered), np.int64, len(ordered))
    # Positions relative to data_start, which is a multiple of PAGE: small ones are packed, large ones aligned.
    small = int(np.searchsorted(sizes >= LARGE, True))
    room = np.where(sizes >= LARGE, -(-sizes // PAGE) * PAGE, sizes)
    if small < len(ordered):
        packed = int(sizes[:small].sum())
        base = -(-packed // PAGE) * PAGE
        starts = np.concatenate([_starts(sizes[:small]), base + _starts(room[small:])])
    else:
        starts = _starts(sizes)
    ends = starts + sizes
    total = int(ends[-1]) if len(ordered) else 0
    unit = block_for(total) if block is None else block
    table = -(-max(1, -(-total // unit)) * 8 // PAGE) * PAGE
    # data_start is a multiple of the block, so that blocks, hence ranks, meet on page and stripe boundaries.
    least = USER_BLOCK + metadata_size([*ordered, Leaf(DIGESTS, "uint64", (table // 8,))], links)
    data_start = -(-(least + table) // unit) * unit
    return Layout(
        tuple(ordered), starts + data_start, ends + data_start, data_start - table, data_start, data_start + total, unit
    )


def block_for(total: int) -> int:
    """Bytes per block for `total` bytes of data: 4 MiB, less where that gives fewer than 64 blocks; at least 4 KiB."""
    return min(MAX_BLOCK, max(PAGE, 1 << max(0, (total // BLOCKS_WANTED).bit_length() - 1)))


def _order(leaf: Leaf) -> tuple[bool, int, bool]:
    """What comes before the name in the order of leaves."""
    large = leaf.nbytes >= LARGE
    return large, 0 if large else -leaf.itemsize, leaf.placement != "rank0"


def _starts(sizes: Offsets) -> Offsets:
    return np.cumsum(sizes) - sizes
