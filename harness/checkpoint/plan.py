"""Who writes what: whole blocks to ranks, and byte ranges of a tensor to hyperslabs. Pure.

Every rank works out its own part from the layout; nothing about it travels. A block belongs to one rank. Blocks that
hold bytes of rank 0's own tensors (buffers, or replicas found unequal) are rank 0's as a whole: what else lies in them
is replicated, and rank 0's copy of that is as good as any. The others are dealt out evenly, in order, whatever the
tensors' sizes.

>>> from harness.checkpoint.layout import lay_out
>>> from harness.checkpoint.schema import Leaf
>>> plan = make_plan(lay_out([Leaf("w", "float32", (1 << 20,))]), rank=1, size=4)
>>> plan.runs
((16, 32),)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from harness.checkpoint.layout import Layout


@dataclass(frozen=True)
class Plan:
    """One rank's blocks, as runs [first, last) of block numbers in ascending order."""

    runs: tuple[tuple[int, int], ...]

    @property
    def blocks(self) -> int:
        return sum(last - first for first, last in self.runs)

    def ranges(self, layout: Layout, most: int) -> Iterator[tuple[int, int, int]]:
        """(first block, lo, hi): the runs as file bytes, whole blocks, at most `most` bytes (or one block) each."""
        step = max(1, most // layout.block)
        for first, last in self.runs:
            for block in range(first, last, step):
                lo, _ = layout.block_range(block)
                _, hi = layout.block_range(min(block + step, last) - 1)
                yield block, lo, hi


def make_plan(layout: Layout, *, rank: int, size: int, from_rank0: Collection[int] = ()) -> Plan:
    """The blocks that `rank` of `size` writes.

    `from_rank0`: indices of replicated leaves for which rank 0's copy counts.
    O(blocks + leaves) once; nothing of size ranks x leaves exists.
    """
    reserved = layout.blocks_of(np.concatenate([layout.from_rank0, np.array(list(from_rank0), np.int64)]))
    shared = np.flatnonzero(~reserved)
    mine = shared[len(shared) * rank // size : len(shared) * (rank + 1) // size]
    if rank == 0:
        mine = np.union1d(mine, np.flatnonzero(reserved))
    breaks = np.flatnonzero(np.diff(mine) != 1) + 1
    return Plan(tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(mine, breaks) if len(run)))


def boxes(shape: tuple[int, ...], lo: int, hi: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [lo, hi) of a row-major tensor as boxes (start, count), in order; at most 2 * dimensions - 1 of them.

    >>> boxes((4, 5), 3, 12)
    [((0, 3), (1, 2)), ((1, 0), (1, 5)), ((2, 0), (1, 2))]
    """
    if lo >= hi:
        return []
    if not shape:
        return [((), ())]
    row = int(np.prod(shape[1:], dtype=np.int64))
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


def _within(
    index: int, inner: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((index, *start), (1, *count)) for start, count in inner]
