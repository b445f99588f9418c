"""A state on its way to the file: leaves with their bytes, and JSON. See `state`; the way back is `restoring`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.schema import Leaf, Placement
from harness.checkpoint.tensors import Buffer
from harness.checkpoint.tree import encode


@dataclass
class Snapshot:
    """A state as leaves with their bytes, second names of leaves, and JSON per entry."""

    leaves: list[Leaf] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    record: dict[str, Json] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    """Leaves that only the optimizer's step changes: a lazy save may copy them until then."""

    def add(self, name: str, array: Any, placement: Placement, *, late: bool = False) -> None:
        if late:
            self.late.add(name)
        buffer = Buffer(array, name)
        self.leaves.append(Leaf(name, buffer.dtype, buffer.shape, placement))
        self.buffers[name] = buffer


def take_tree(value: Any, path: str, placement: Placement, snapshot: Snapshot, *, late: bool = False) -> Json:
    found: dict[str, Any] = {}
    record = encode(value, path, found)
    for name, tensor in found.items():
        snapshot.add(name, tensor, placement, late=late)
    return record
