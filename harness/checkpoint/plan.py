"""Who writes what: whole blocks to ranks. Pure.

Every rank works out its own part from the layout; nothing about it travels. A block belongs to one rank. Blocks that
hold bytes of rank 0's own tensors (buffers, or replicas found unequal) are rank 0's as a whole: what else lies in them
is replicated, and rank 0's copy of that is as good as any. The others are dealt out evenly, in order, whatever the
tensors' sizes. A block with bytes of sharded leaves goes to a rank that holds some of them, and gets the others' by
`exchange`; the ranks that hold the same share their blocks evenly, and replicated blocks fill up who has few.

>>> from harness.checkpoint.layout import lay_out
>>> from harness.checkpoint.schema import Leaf
>>> plan = make_plan(lay_out([Leaf("w", "float32", (1 << 20,))]), rank=1, size=4)
>>> plan.runs
((16, 32),)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from harness.checkpoint.holders import Holders
from harness.checkpoint.layout import Layout, Offsets


@dataclass(frozen=True, eq=False)
class Dealt:
    """The rank that writes each block, int64[blocks]. `turn`: which of the ranks that hold the same it is, of each."""

    writer: Offsets
    turn: Offsets


@dataclass(frozen=True)
class Plan:
    """One rank's blocks, as runs [first, last) of block numbers in ascending order.

    `dealt`: all ranks' blocks, where there are sharded leaves.
    """

    runs: tuple[tuple[int, int], ...]
    dealt: Dealt | None = field(default=None, compare=False, repr=False)

    @property
    def blocks(self) -> int:
        return sum(last - first for first, last in self.runs)

    def ranges(self, layout: Layout, sizes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """(first block, lo, hi): the runs as file bytes, whole blocks: at most the next of `sizes`, or one block."""
        wanted = iter(sizes)
        for first, last in self.runs:
            while first < last:
                end = min(first + max(1, next(wanted) // layout.block), last)
                yield first, *layout.span(first, end)
                first = end


def make_plan(
    layout: Layout, *, rank: int, size: int, from_rank0: Collection[int] = (), holders: Holders | None = None
) -> Plan:
    """The blocks that `rank` of `size` writes.

    `from_rank0`: indices of replicated leaves for which rank 0's copy counts. `holders`: of the sharded and per-rank
    leaves, where there are any. O(blocks + leaves + cells) once; nothing of size ranks x leaves exists.
    """
    reserved = layout.blocks_of(np.concatenate([layout.from_rank0, np.array(list(from_rank0), np.int64)]))
    if holders is not None and len(holders.leaf):
        dealt = _deal(layout, size, reserved, holders)
        return Plan(_runs(np.flatnonzero(dealt.writer == rank)), dealt)
    shared = np.flatnonzero(~reserved)
    mine = shared[len(shared) * rank // size : len(shared) * (rank + 1) // size]
    if rank == 0:
        mine = np.union1d(mine, np.flatnonzero(reserved))
    return Plan(_runs(mine))


def _runs(blocks: Offsets) -> tuple[tuple[int, int], ...]:
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(blocks, breaks) if len(run))


def _deal(layout: Layout, size: int, reserved: npt.NDArray[np.bool_], holders: Holders) -> Dealt:
    blocks = np.arange(layout.blocks)
    writer, turn = np.zeros(layout.blocks, np.int64), blocks.copy()
    lo = layout.data_start + blocks * layout.block
    low, high = holders.near(lo, lo + layout.block)
    cells = high - low
    sharded = np.flatnonzero((cells > 0) & ~reserved)
    # Blocks of the same cells one after the other (those of a tensor split along columns): to each cell a run of them.
    place, count = _places(np.stack([low[sharded], cells[sharded]]))
    several = cells[sharded]
    group = holders.group[low[sharded] + (place * several // count + np.where(count < several, sharded, 0)) % several]
    # The blocks of each group of ranks, in file order, in equal runs to its members.
    order = np.argsort(group, kind="stable")
    place[order], count[order] = _places(group[order].reshape(1, -1))
    turn[sharded] = place * (holders.bounds[group + 1] - holders.bounds[group]) // count
    writer[sharded] = holders.members[holders.bounds[group] + turn[sharded]]
    free = np.flatnonzero((cells == 0) & ~reserved)
    taken = np.ones(layout.blocks, np.bool_)
    taken[free] = False
    writer[free] = np.repeat(np.arange(size), level(np.bincount(writer[taken], minlength=size), len(free)))
    return Dealt(writer, turn)


def _places(keys: Offsets) -> tuple[Offsets, Offsets]:
    """Of columns that come in runs of equal ones: the place of each in its run, and the run's length."""
    total = keys.shape[1]
    begins = np.flatnonzero(np.concatenate([np.ones(min(total, 1), np.bool_), (np.diff(keys) != 0).any(axis=0)]))
    lengths = np.diff(np.append(begins, total))
    return np.arange(total) - np.repeat(begins, lengths), np.repeat(lengths, lengths)


def level(loads: Offsets, more: int) -> Offsets:
    """How many of `more` blocks each rank gets, so that the largest of all totals is as small as it can be.

    >>> level(np.array([5, 0, 1]), 4).tolist()
    [0, 3, 1]
    """
    ordered = np.sort(loads)
    # Water for the first i ranks to stand as high as rank i.
    needed = ordered * np.arange(len(loads)) - (np.cumsum(ordered) - ordered)
    under = int(np.searchsorted(needed, more, side="right"))
    height, rest = divmod(more + int(ordered[:under].sum()), under)
    given = np.maximum(height - loads, 0)
    below = np.flatnonzero(loads <= height)[:rest]
    given[below] += 1
    return given
