"""Who wants which bytes of a checkpoint: so that what several ranks want is read once, by these ranks together.

    wanted = gather_wanted(layout, wanted_ranges(layout, sinks), comm)
    wanted.by_most, wanted.by_some              # bool[blocks]
    wanted.of(lo, hi)                           # {0: (lo, middle), 3: (middle, hi)}

A sink takes bytes of a leaf as they come; a `Part` wants some of them, any other sink all. What a rank wants is told as
ranges of the file. A block is read as a whole, so ranges that meet in a block are one, with what lies between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from harness.checkpoint.comm import Comm
from harness.checkpoint.holders import gather_alike
from harness.checkpoint.layout import Layout, Offsets
from harness.checkpoint.shards import extent
from harness.checkpoint.tensors import Bytes, Part

Mask = npt.NDArray[np.bool_]


class Sink(Protocol):
    """Where a leaf's bytes go. Each byte comes once; the bytes of one call begin at `lo` of the leaf."""

    def write(self, lo: int, data: Bytes) -> None: ...


@dataclass(frozen=True, eq=False)
class Wanted:
    """What all ranks want: the file's bytes [lo, hi) = ranges[i], ascending by lo, by the ranks groups[group[i]].

    Of blocks, bool[blocks]: `by_most`, of which more than half of what goes to all ranks is wanted; `by_some`, the
    others of which several ranks want something. What one rank alone wants is in neither, but for blocks
    in which it wants something of several entries.
    """

    ranges: Offsets
    group: Offsets
    groups: list[list[int]]
    by_most: Mask
    by_some: Mask

    @cached_property
    def _reached(self) -> Offsets:
        return np.maximum.accumulate(self.ranges[:, 1])

    def of(self, lo: int, hi: int) -> dict[int, tuple[int, int]]:
        """What each rank wants of bytes [lo, hi), from the first one to the last; only the ranks that want any."""
        found: dict[int, tuple[int, int]] = {}
        some = slice(np.searchsorted(self._reached, lo, "right"), np.searchsorted(self.ranges[:, 0], hi))
        for (begin, end), group in zip(self.ranges[some].tolist(), self.group[some].tolist(), strict=True):
            if end > lo:
                for rank in self.groups[group]:
                    first, last = found.get(rank, (begin, end))
                    found[rank] = max(lo, min(first, begin)), min(hi, max(last, end))
        return found


def wanted_ranges(layout: Layout, sinks: Mapping[str, Sequence[Sink]]) -> dict[str, Offsets]:
    """The file's bytes [lo, hi) for this rank's sinks, int64[n, 2] by entry: no two ranges of an entry in one block.

    By entry, as ranks that hold the same part of the model may each have a part of the optimizer's state of their own.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for leaf, start in zip(layout.leaves, layout.starts.tolist(), strict=True):
        for sink in sinks.get(leaf.name, ()):
            lo, hi = extent(sink.box) if isinstance(sink, Part) else (0, leaf.nbytes)
            if hi > lo:
                found.setdefault(leaf.name.partition("/")[0], []).append((start + lo, start + hi))
    return {entry: _joined(np.array(sorted(ranges), np.int64), layout) for entry, ranges in found.items()}


def wanted_blocks(layout: Layout, ranges: Mapping[str, Offsets]) -> Mask:
    """The blocks in which these ranges lie: bool[blocks]."""
    everything = np.concatenate([np.empty((0, 2), np.int64), *ranges.values()])
    return _count(layout, everything, np.ones(len(everything), np.int64))[0] > 0


def gather_wanted(layout: Layout, mine: Mapping[str, Offsets], comm: Comm) -> Wanted:
    """What all ranks want, from what each one does (`wanted_ranges`). Collective; the same on all ranks."""
    told = gather_alike({entry: ranges.astype("<i8").tobytes() for entry, ranges in mine.items()}, comm)
    groups = [ranks for _, _, ranks in told]
    ranges = np.concatenate([np.empty(0, np.int64), *(numbers for _, numbers, _ in told)]).reshape(-1, 2)
    group = np.repeat(np.arange(len(told)), [len(numbers) // 2 for _, numbers, _ in told])
    order = np.argsort(ranges[:, 0], kind="stable")
    ranges, group = ranges[order], group[order]
    wanting, times = _count(layout, ranges, np.array([len(ranks) for ranks in groups], np.int64)[group])
    by_most = (wanting > 1) & (2 * times > comm.size)
    return Wanted(ranges, group, groups, by_most, (wanting > 1) & ~by_most)


def _joined(ranges: Offsets, layout: Layout) -> Offsets:
    """Ranges, ascending; those that meet in a block as one."""
    first = (ranges[:, 0] - layout.data_start) // layout.block
    reached = np.maximum.accumulate(ranges[:, 1])
    last = (reached - 1 - layout.data_start) // layout.block
    begins = np.flatnonzero(np.append(True, first[1:] > last[:-1]))
    return np.stack([ranges[begins, 0], np.maximum.reduceat(ranges[:, 1], begins)], axis=1)


def _count(layout: Layout, ranges: Offsets, ranks: Offsets) -> tuple[Offsets, npt.NDArray[np.float64]]:
    """By block: how many ranks want some of it, and how many times its bytes all of them want. `ranks`: by range."""
    lo, hi = ranges.T
    bounds = np.append(np.arange(layout.data_start, layout.data_end, layout.block), layout.data_end)
    first, last = np.searchsorted(bounds, lo, "right") - 1, np.searchsorted(bounds, hi) - 1
    change = np.zeros(len(bounds), np.int64)
    np.add.at(change, first, ranks)
    np.add.at(change, last + 1, -ranks)
    wanting = np.cumsum(change[:-1])
    size = np.diff(bounds)
    wanted = wanting * size
    np.subtract.at(wanted, first, ranks * (lo - bounds[first]))
    np.subtract.at(wanted, last, ranks * (bounds[last + 1] - hi))
    return wanting, wanted / size
