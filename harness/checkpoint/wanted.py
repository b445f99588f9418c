"""Who wants which bytes of a checkpoint: so that what several ranks want is read once, by these ranks together.

    for ranks, blocks in gather_wanted(layout, sinks, comm):
        ...                                                  # ranks: of which this one is one; blocks: bool[blocks]

A sink takes bytes of a leaf as they come; a `Part` wants some of them, any other sink all. Leaves that some rank wants
as a whole, or in boxes that are not contiguous in the file, are read for all ranks. Contiguous parts are read for the
ranks that want the same one; those that only one rank wants are not spoken of here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from harness.checkpoint.comm import Comm
from harness.checkpoint.holders import Groups, gather_alike
from harness.checkpoint.layout import Layout
from harness.checkpoint.tensors import Bytes, Part

Mask = npt.NDArray[np.bool_]


class Sink(Protocol):
    """Where a leaf's bytes go. Each byte comes once; the bytes of one call begin at `lo` of the leaf."""

    def write(self, lo: int, data: Bytes) -> None: ...


def wanted_blocks(layout: Layout, sinks: Mapping[str, Sequence[Sink]]) -> Mask:
    """Which blocks have bytes for this rank's sinks: bool[blocks]."""
    whole, ranges = _wanted(layout, sinks)
    return layout.blocks_of(whole) | _blocks_of_ranges(layout, ranges)


def gather_wanted(layout: Layout, sinks: Mapping[str, Sequence[Sink]], comm: Comm) -> list[tuple[list[int], Mask]]:
    """The sets of several ranks that this one is in, each with the blocks that they all want.

    Their order is such that ranks that go through their sets in it do not wait for each other in a circle. Collective.
    """
    whole, ranges = _wanted(layout, sinks)
    mine = {"whole": np.array(whole, "<i8").tobytes()}
    # By entry: ranks that hold the same part of the model may each have a part of the optimizer's state of their own.
    for row in ranges:
        leaf = layout.leaves[row[0]]
        if leaf.placement != "per_rank":
            key = "in " + leaf.name.partition("/")[0]
            mine[key] = mine.get(key, b"") + np.array(row, "<i8").tobytes()
    everybody: set[int] = set()
    tables: list[npt.NDArray[np.int64]] = []
    patterns: list[npt.NDArray[np.int64]] = []
    for key, told, ranks in gather_alike(mine, comm):
        if key == "whole":
            everybody.update(told.tolist())
        else:
            tables.append(np.pad(told.reshape(-1, 3), ((0, 0), (0, 1)), constant_values=len(patterns)))
            patterns.append(np.array(ranks, np.int64))
    together = layout.blocks_of(sorted(everybody))
    found = {tuple(range(comm.size)): together} if everybody else {}
    if tables:
        table = np.concatenate(tables)
        table = table[np.lexsort(table.T[::-1])]
        begins = np.flatnonzero(np.concatenate([[True], (np.diff(table[:, :-1], axis=0) != 0).any(axis=1)]))
        groups = Groups(patterns)
        group = groups.of(table[:, -1], begins)
        for number in np.unique(group).tolist():
            ranks = groups.ranks(number)
            if len(ranks) > 1 and comm.rank in ranks:
                blocks = _blocks_of_ranges(layout, table[begins[group == number], :-1].tolist()) & ~together
                found[tuple(ranks)] = found.get(tuple(ranks), np.zeros_like(blocks)) | blocks
    return [(list(ranks), blocks) for ranks, blocks in sorted(found.items())]


def _wanted(layout: Layout, sinks: Mapping[str, Sequence[Sink]]) -> tuple[list[int], list[list[int]]]:
    """Leaves that are wanted as a whole or in boxes, by index; (leaf, lo, count) in bytes of contiguous parts."""
    whole, ranges = [], []
    for index, leaf in enumerate(layout.leaves):
        some = sinks.get(leaf.name, ())
        boxes = [sink.box for sink in some if isinstance(sink, Part) and len(sink.box.shape) == 1]
        if len(boxes) < len(some):
            whole.append(index)
        else:
            ranges += [[index, box.start[0], box.count[0]] for box in boxes if box.count[0]]
    return whole, ranges


def _blocks_of_ranges(layout: Layout, ranges: Sequence[Sequence[int]]) -> Mask:
    touched = np.zeros(layout.blocks, np.bool_)
    for leaf, lo, count in ranges:
        begin = int(layout.starts[leaf]) + lo - layout.data_start
        touched[begin // layout.block : -(-(begin + count) // layout.block)] = True
    return touched
