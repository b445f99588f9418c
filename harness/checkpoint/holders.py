"""Which ranks hold which part of which sharded leaf: known to all ranks, gathered once.

A cell is a part of a leaf that some ranks hold; ranks that hold the same part (data parallel replicas of a tensor
parallel model) share a cell. The cells of a leaf must tile it. Per-rank leaves need no messages: rank r holds row r.

    holders = gather_holders(layout, parts, comm)       # collective; parts: leaf index -> Part
    holders.box(17), holders.ranks(17)

Everything is in columns (int64), one row per cell and none for empty parts. Messages: of ranks whose parts of an entry
are the same only one tells which they are, so that 1000 replicas of 8 tensor parallel ranks send 8 descriptions.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from harness.checkpoint.comm import Comm
from harness.checkpoint.layout import Layout, Offsets
from harness.checkpoint.shards import Box, boxes
from harness.checkpoint.tensors import Part
from harness.checkpoint.tiling import first_fault
from harness.errors import DataError, InternalError, some


@dataclass(frozen=True, eq=False)
class Holders:
    """Cells in file order. `first`, `end`: file bytes from a cell's first to its last, between which others may lie.

    `at`: where `numbers` has its start and count by dimension; -1 for a contiguous cell. `group`: which ranks hold it:
    members[bounds[group] : bounds[group + 1]], ascending. Ranks that hold the same cells form one group.
    """

    layout: Layout
    size: int
    leaf: Offsets
    first: Offsets
    end: Offsets
    group: Offsets
    at: Offsets
    numbers: Offsets
    bounds: Offsets
    members: Offsets

    @cached_property
    def _reached(self) -> Offsets:
        """How far a cell and those before it reach: cells may begin before others and end after them."""
        return np.maximum.accumulate(self.end)

    @cached_property
    def _pairs(self) -> Offsets:
        """group * size + rank of all members, ascending."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds)) * self.size + self.members

    def near(self, lo: Offsets, hi: Offsets) -> tuple[Offsets, Offsets]:
        """The cells [low, high) among which are all that meet the file bytes [lo, hi), and none if none does."""
        low = np.searchsorted(self._reached, lo, side="right")
        return low, np.maximum(low, np.searchsorted(self.first, hi, side="left"))

    def ranks(self, cell: int) -> list[int]:
        group = self.group[cell]
        return [int(rank) for rank in self.members[self.bounds[group] : self.bounds[group + 1]]]

    def cells_of(self, rank: int) -> Offsets:
        """The cells that a rank holds, in file order."""
        mine = np.zeros(len(self.bounds) - 1, np.bool_)
        mine[self._pairs[self.members == rank] // self.size] = True
        return np.flatnonzero(mine[self.group])

    def held(self, cells: Offsets, ranks: Offsets) -> npt.NDArray[np.bool_]:
        """Whether ranks[i] holds cells[i]."""
        wanted = self.group[cells] * self.size + ranks
        found = np.searchsorted(self._pairs, wanted)
        result: npt.NDArray[np.bool_] = self._pairs[np.minimum(found, len(self._pairs) - 1)] == wanted
        return result

    def holder(self, cells: Offsets, turn: Offsets) -> Offsets:
        """One of the ranks that hold cells[i], another one for another turn[i]."""
        begin = self.bounds[self.group[cells]]
        chosen: Offsets = self.members[begin + turn % (self.bounds[self.group[cells] + 1] - begin)]
        return chosen

    def box(self, cell: int) -> Box:
        """A cell as a box of its leaf's bytes."""
        leaf = self.layout.leaves[int(self.leaf[cell])]
        if (at := int(self.at[cell])) < 0:
            base = int(self.layout.starts[self.leaf[cell]])
            return Box((leaf.nbytes,), (int(self.first[cell]) - base,), (int(self.end[cell] - self.first[cell]),))
        dimensions = len(leaf.shape)
        numbers = self.numbers[at : at + 2 * dimensions].tolist()
        return Box(leaf.shape, tuple(numbers[:dimensions]), tuple(numbers[dimensions:])).in_bytes(leaf.itemsize)


def signature(parts: Mapping[str, Part]) -> str:
    """16 hex digits that change when what this rank holds does, so that ranks know when to gather again."""
    said = [[name, part.box.shape, part.box.start, part.box.count] for name, part in sorted(parts.items())]
    return xxhash.xxh3_64_hexdigest(repr(said).encode("utf-8", "surrogatepass")) if parts else ""


def gather_holders(layout: Layout, parts: Mapping[int, Part], comm: Comm) -> Holders:
    """Who holds what, from what each rank holds (`parts`, by leaf index). Collective where there are sharded leaves.

    Raises DataError, the same on all ranks, where the parts of a leaf overlap without being the same, or do not cover
    it, naming leaf and ranks.
    """
    found = Found(layout, comm.size)
    parted = sorted(layout.parted)
    if per_rank := [index for index in parted if layout.leaves[index].placement == "per_rank"]:
        found.add_rows(per_rank)
    if len(per_rank) < len(parted):
        for _, told, ranks in gather_alike(_described(layout, parts), comm):
            found.add(told, ranks)
    return found.holders()


def gather_alike(mine: Mapping[str, bytes], comm: Comm) -> list[tuple[str, Offsets, list[int]]]:
    """(key, what is said, ranks): what ranks say about themselves, once for all that say the same. Collective.

    `mine`: by key, int64. What several ranks say alike is sent by one of them, what all say by none.
    """
    marks: list[Any] = comm.all_gather({key: xxhash.xxh3_128_hexdigest(data) for key, data in mine.items()})
    alike: dict[tuple[str, str], list[int]] = {}
    for rank, marked in enumerate(marks):
        for key, mark in marked.items():
            alike.setdefault((key, mark), []).append(rank)
    told: list[Any] = []
    if any(len(ranks) < comm.size for ranks in alike.values()):
        speaks = [key for (key, _), ranks in alike.items() if ranks[0] == comm.rank and len(ranks) < comm.size]
        told = comm.all_gather({key: base64.b64encode(mine[key]).decode() for key in speaks})
    found = []
    for (key, _), ranks in alike.items():
        data = mine[key] if len(ranks) == comm.size else base64.b64decode(told[ranks[0]][key])
        found.append((key, np.frombuffer(data, np.int64), ranks))
    return found


def _described(layout: Layout, parts: Mapping[int, Part]) -> dict[str, bytes]:
    """Parts that are not empty, by entry: [dimensions, rows, rows x (leaf, start, count)]; contiguous ones in bytes."""
    found: dict[str, dict[int, list[list[int]]]] = {}
    for index in sorted(parts):
        leaf, part = layout.leaves[index], parts[index]
        if leaf.placement != "sharded" or not part.box.elements:
            continue
        # One dimension: of bytes. Several: those of the leaf; Flat always is contiguous.
        box = part.region if len(part.box.shape) > 1 and isinstance(part.region, Box) else part.box
        tables = found.setdefault(leaf.name.partition("/")[0], {})
        tables.setdefault(len(box.shape), []).append([index, *box.start, *box.count])
    return {
        entry: b"".join(
            np.array([dimensions, len(rows)], "<i8").tobytes() + np.array(rows, "<i8").tobytes()
            for dimensions, rows in sorted(tables.items())
        )
        for entry, tables in sorted(found.items())
    }


class Found:
    """Parts of all ranks, on the way to cells."""

    def __init__(self, layout: Layout, size: int) -> None:
        self.layout, self.size = layout, size
        self.tables: dict[int, list[Offsets]] = {}  # dimensions -> rows of (leaf, start, count, pattern)
        self.patterns: list[Offsets] = []  # the ranks of each pattern, ascending

    def add_rows(self, leaves: list[int]) -> None:
        """Per-rank leaves: rank r holds row r."""
        first = len(self.patterns)
        ranks = np.arange(self.size)
        self.patterns += [*ranks.reshape(-1, 1)]
        for index in leaves:
            leaf = self.layout.leaves[index]
            if leaf.shape[:1] != (self.size,):
                raise InternalError(f"{leaf} is per rank; it does not have a row for each of {self.size} ranks")
            if row := leaf.nbytes // self.size:
                table = np.stack([np.full_like(ranks, index), ranks * row, np.full_like(ranks, row), first + ranks], 1)
                self.tables.setdefault(1, []).append(table)

    def add(self, told: Offsets, ranks: list[int]) -> None:
        """What these ranks hold alike: the bytes of `_described`."""
        pattern = len(self.patterns)
        self.patterns.append(np.array(ranks, np.int64))
        at = 0
        while at < len(told):
            dimensions, count = int(told[at]), int(told[at + 1])
            width = 1 + 2 * dimensions
            rows = told[at + 2 : at + 2 + count * width].reshape(count, width)
            self.tables.setdefault(dimensions, []).append(np.pad(rows, ((0, 0), (0, 1)), constant_values=pattern))
            at += 2 + count * width

    def holders(self) -> Holders:
        """Cells and groups, once everything has been added. Raises DataError where cells do not tile their leaves."""
        self._align()
        self._require_all()
        groups = Groups(self.patterns)
        columns: list[tuple[Offsets, ...]] = []
        numbers: list[Offsets] = []
        used = 0
        for dimensions, parts in sorted(self.tables.items()):
            table = np.concatenate(parts)
            table = table[np.lexsort(table.T[::-1])]
            new = np.concatenate([[True], (np.diff(table[:, :-1], axis=0) != 0).any(axis=1)])
            begins = np.flatnonzero(new)
            cells, group = table[begins, :-1], groups.of(table[:, -1], begins)
            self._check(dimensions, cells, lambda i, group=group: groups.ranks(int(group[i])))  # type: ignore[misc]
            leaf = cells[:, 0]
            start, last = cells[:, 1 : 1 + dimensions], cells[:, 1:].reshape(-1, 2, dimensions).sum(axis=1) - 1
            if dimensions == 1:
                first, end, at = start[:, 0], last[:, 0] + 1, np.full(len(cells), -1)
            else:
                shapes = np.array([self.layout.leaves[i].shape for i in leaf.tolist()], np.int64)
                sizes = np.array([self.layout.leaves[i].itemsize for i in leaf.tolist()], np.int64)
                strides = np.cumprod(np.concatenate([shapes[:, 1:], sizes[:, None]], 1)[:, ::-1], axis=1)[:, ::-1]
                first, end = (start * strides).sum(axis=1), (last * strides).sum(axis=1) + sizes
                at = used + 2 * dimensions * np.arange(len(cells))
                numbers.append(cells[:, 1:].reshape(-1))
                used += numbers[-1].size
            base = self.layout.starts[leaf]
            columns.append((leaf, base + first, base + end, group, at))
        none = np.empty(0, np.int64)
        joined = [np.concatenate(c) for c in zip(*columns, strict=True)] if columns else [none] * 5
        order = np.argsort(joined[1], kind="stable")
        leaf, first, end, group, at = (column[order] for column in joined)
        flat = np.concatenate([none, *numbers])
        return Holders(self.layout, self.size, leaf, first, end, group, at, flat, *groups.columns())

    def _require_all(self) -> None:
        """Every leaf with bytes has been mentioned."""
        mentioned = {int(i) for parts in self.tables.values() for rows in parts for i in np.unique(rows[:, 0])}
        for index in sorted(self.layout.parted - mentioned):
            if (leaf := self.layout.leaves[index]).nbytes:
                raise DataError(f"no rank holds any part of {leaf}: the parts of all {self.size} ranks are empty")

    def _align(self) -> None:
        """All parts of one leaf in the same dimensions: where one is not contiguous, the others become boxes too."""
        split = {int(i) for d, parts in self.tables.items() if d > 1 for rows in parts for i in np.unique(rows[:, 0])}
        if not split or 1 not in self.tables:
            return
        table = np.concatenate(self.tables[1])
        mixed = np.isin(table[:, 0], list(split))
        self.tables[1] = [table[~mixed]] if not mixed.all() else []
        if not self.tables[1]:
            del self.tables[1]
        for index, at, count, pattern in table[mixed].tolist():
            leaf = self.layout.leaves[index]
            found = boxes(leaf.shape, at // leaf.itemsize, (at + count) // leaf.itemsize)
            if len(found) != 1:
                ranks = self.patterns[pattern].tolist()
                raise DataError(
                    f"{leaf} is split into boxes, and rank {ranks[0]} holds a flat range of it that is none",
                    hint="use Box on all ranks, or Flat on all ranks",
                )
            start, extent = found[0]
            self.tables[len(leaf.shape)].append(np.array([[index, *start, *extent, pattern]], np.int64))

    def _check(self, dimensions: int, cells: Offsets, ranks: Callable[[int], list[int]]) -> None:
        leaves = self.layout.leaves
        if dimensions == 1:
            shapes = {int(i): (leaves[i].nbytes,) for i in np.unique(cells[:, 0])}
        else:
            shapes = {int(i): leaves[i].shape for i in np.unique(cells[:, 0])}
        fault = first_fault(cells, shapes)
        if fault is None:
            return
        leaf, size = leaves[fault.leaf], leaves[fault.leaf].itemsize
        element = np.array(fault.element)
        if dimensions == 1:
            element = np.array(np.unravel_index(fault.element[0] // size, leaf.shape))
        of_leaf = np.flatnonzero(cells[:, 0] == fault.leaf)
        start, count = cells[of_leaf, 1 : 1 + dimensions], cells[of_leaf, 1 + dimensions :]
        inside = of_leaf[((start <= fault.element) & (fault.element < start + count)).all(axis=1)]
        where = f"element {element.tolist()} of {leaf}"
        if len(inside):
            told = " and ".join(f"rank {rank}" for rank in sorted(ranks(cell)[0] for cell in inside[:4].tolist()))
            raise DataError(
                f"{where} is in different parts of {told}",
                hint="parts of a sharded tensor must be the same or not overlap",
            )
        holding = sorted({rank for cell in of_leaf[:1000].tolist() for rank in ranks(cell)[:1]})
        raise DataError(
            f"no rank holds {where}; rank {some(holding)} {'hold' if len(holding) > 1 else 'holds'} other parts of it",
            hint="the parts of a sharded tensor must cover it",
        )


class Groups:
    """Sets of ranks, each once."""

    def __init__(self, patterns: list[Offsets]) -> None:
        self._patterns = patterns
        self._numbers: dict[bytes, int] = {}
        self._ranks: list[Offsets] = []
        self._of_pattern = np.array([self._number(ranks) for ranks in patterns], np.int64)

    def _number(self, ranks: Offsets) -> int:
        number = self._numbers.setdefault(ranks.tobytes(), len(self._ranks))
        if number == len(self._ranks):
            self._ranks.append(ranks)
        return number

    def of(self, patterns: Offsets, begins: Offsets) -> Offsets:
        """The group of each cell, whose patterns begin at `begins`."""
        group = self._of_pattern[patterns[begins]]
        ends = np.append(begins[1:], len(patterns))
        several: dict[bytes, int] = {}
        for cell in np.flatnonzero(ends - begins > 1).tolist():
            chosen = patterns[begins[cell] : ends[cell]]
            key = chosen.tobytes()
            if key not in several:
                several[key] = self._number(np.unique(np.concatenate([self._patterns[i] for i in chosen.tolist()])))
            group[cell] = several[key]
        return group

    def ranks(self, group: int) -> list[int]:
        return [int(rank) for rank in self._ranks[group]]

    def columns(self) -> tuple[Offsets, Offsets]:
        bounds = np.concatenate([[0], np.cumsum([len(ranks) for ranks in self._ranks])]).astype(np.int64)
        return bounds, np.concatenate(self._ranks) if self._ranks else np.empty(0, np.int64)
