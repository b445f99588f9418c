"""A state on its way to the file: leaves with their bytes, and JSON. See `state`; the way back is `restoring`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.schema import Leaf, Placement, check_schema, schema_hash
from harness.checkpoint.tensors import Buffer
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
    """A state as leaves with their bytes, second names of leaves, and JSON per entry.

    `before`: the schema of the snapshot before. What has not changed since is not made, checked and hashed again.
    """

    leaves: list[Leaf] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    record: dict[str, Json] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    """Leaves that only the optimizer's step changes: a lazy save may copy them until then."""
    before: Schema | None = None

    def add(self, name: str, array: Any, placement: Placement, *, late: bool = False) -> None:
        if late:
            self.late.add(name)
        buffer = Buffer(array, name)
        leaf = None if self.before is None else self.before.by_name.get(name)
        if leaf is None or (leaf.dtype, leaf.shape, leaf.placement) != (buffer.dtype, buffer.shape, placement):
            leaf = Leaf(name, buffer.dtype, buffer.shape, placement)
        self.leaves.append(leaf)
        self.buffers[name] = buffer

    def schema(self) -> Schema:
        """The schema of this snapshot, once it is complete; the one before where nothing differs. Raises DataError."""
        before = self.before
        if before is None or (self.leaves, self.aliases) != (before.leaves, before.aliases):
            check_schema(self.leaves)
            self.before = before = Schema(self.leaves, self.aliases, schema_hash(self.leaves, self.aliases))
        return before


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


def take_tree(value: Any, path: str, placement: Placement, snapshot: Snapshot, *, late: bool = False) -> Json:
    found: dict[str, Any] = {}
    record = encode(value, path, found)
    for name, tensor in found.items():
        snapshot.add(name, tensor, placement, late=late)
    return record
