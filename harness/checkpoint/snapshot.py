"""A state on its way to the file: leaves with their bytes, and JSON. See `state`; the way back is `restoring`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.schema import Leaf, Placement, check_schema, schema_hash
from harness.checkpoint.shards import Region, Shape, row_of
from harness.checkpoint.tensors import Buffer, Part
from harness.checkpoint.tree import encode


@dataclass(frozen=True, eq=False)
class Schema:
    """The names and shapes of a state, checked, and their hash. It holds no tensors."""

    leaves: list[Leaf]
    aliases: dict[str, str]
    hash: str

    @cached_property
    def by_name(self) -> dict[str, Leaf]:
        return {leaf.name: leaf for leaf in self.leaves}


@dataclass
class Snapshot:
    """A state as leaves with their bytes, second names of leaves, and JSON per entry; of `rank`, one of `size`.

    `before`: the schema of the snapshot before. What has not changed since is not made, checked and hashed again.

    `shards`: what is declared of parameters and buffers, by name (`shards.region_of`).
    """

    rank: int = 0
    size: int = 1
    shards: Mapping[str, Region] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    """Sharded and per-rank leaves: what this rank has of them. The leaves have the global shape."""
    aliases: dict[str, str] = field(default_factory=dict)
    record: dict[str, Json] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    """Leaves that only the step of an optimizer of this state changes: a lazy save may copy them until then."""
    stepped: Set[int] = frozenset()
    """`id` of the parameters that optimizers of this state change."""
    before: Schema | None = None

    def add(self, name: str, array: Any, placement: Placement, *, late: bool = False) -> None:
        if late:
            self.late.add(name)
        buffer = Buffer(array, name)
        self._add(name, buffer, buffer.shape, placement)

    def schema(self) -> Schema:
        """The schema of this snapshot, once it is complete; the one before where nothing differs. Raises DataError."""
        before = self.before
        if before is None or (self.leaves, self.aliases) != (before.leaves, before.aliases):
            check_schema(self.leaves, self.aliases)
            self.before = before = Schema(self.leaves, self.aliases, schema_hash(self.leaves, self.aliases))
        return before

    def add_part(self, name: str, array: Any, region: Region) -> None:
        """A region of a leaf of the region's shape."""
        self._add_part(name, Part(array, region, name), "sharded")

    def add_row(self, name: str, array: Any) -> None:
        """This rank's own, as its row of a leaf."""
        row = row_of(self.rank, self.size, tuple(array.shape))
        self._add_part(name, Part(array[None], row, name), "per_rank")

    def _add_part(self, name: str, part: Part, placement: Placement) -> None:
        self._add(name, part.buffer, part.region.shape, placement)
        self.parts[name] = part

    def _add(self, name: str, buffer: Buffer, shape: Shape, placement: Placement) -> None:
        leaf = None if self.before is None else self.before.by_name.get(name)
        if leaf is None or (leaf.dtype, leaf.shape, leaf.placement) != (buffer.dtype, shape, placement):
            leaf = Leaf(name, buffer.dtype, shape, placement)
        self.leaves.append(leaf)
        self.buffers[name] = buffer


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's search for cycles of garbage is put off: among many new objects it takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def take_tree(
    value: Any,
    path: str,
    placement: Placement,
    snapshot: Snapshot,
    *,
    late: bool = False,
    part: tuple[Shape, Region] | None = None,
) -> Json:
    """`part`: tensors of this shape are this region of a leaf."""
    found: dict[str, Any] = {}
    record = encode(value, path, found)
    for name, tensor in found.items():
        if part is not None and tuple(tensor.shape) == part[0]:
            snapshot.add_part(name, tensor, part[1])
        else:
            snapshot.add(name, tensor, placement, late=late)
    return record
