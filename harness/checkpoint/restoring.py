"""A checkpoint on its way into live objects: where its leaves go, and why it does not fit. The way out is `snapshot`.

restore = prepare(state, manifest)          # `state.prepare`; changes nothing
if not restore.problems:
    load(path, manifest, restore.sinks, comm)
    restore.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.schema import Leaf
from harness.checkpoint.tensors import Buffer, dtype_of, is_tensor, new_tensor
from harness.errors import DataError


@dataclass
class Restore:
    """Where a checkpoint's leaves go: `sinks` by leaf name, then `finish`. `problems`: why it does not fit."""

    sinks: dict[str, list[Buffer]] = field(default_factory=dict)
    steps: list[Callable[[], None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def finish(self) -> None:
        """Hand over what is not a tensor, once all sinks are full."""
        for step in self.steps:
            step()

    def sink(self, name: str, array: Any) -> None:
        self.sinks.setdefault(name, []).append(Buffer(array, name))


def maker(
    leaves: Mapping[str, Leaf], restore: Restore, device: Any = None, live: Mapping[str, Any] | None = None
) -> Callable[[str, str], Any]:
    """Tensors for `decode`: the live one of the same key where it fits, else a new one."""

    def make(name: str, kind: str) -> Any:
        leaf = leaves.get(name)
        if leaf is None or kind not in ("torch", "numpy"):
            raise DataError(f"the checkpoint refers to {name!r}, which it does not hold")
        tensor: Any = (live or {}).get(name.rpartition("/")[2])
        if not is_tensor(tensor) or (dtype_of(tensor), tuple(tensor.shape)) != (leaf.dtype, leaf.shape):
            tensor = new_tensor(kind, leaf.dtype, leaf.shape, device)
        restore.sink(name, tensor)
        return tensor

    return make


def compare(wanted: Mapping[str, Any], stored: set[str], restore: Restore) -> None:
    restore.problems += [f"missing from the checkpoint: {name}" for name in wanted if name not in stored]
    restore.problems += [f"only in the checkpoint: {name}" for name in sorted(stored) if name not in wanted]


def check_fit(name: str, tensor: Any, leaf: Leaf, restore: Restore) -> None:
    here = (dtype_of(tensor), tuple(tensor.shape))
    if here != (leaf.dtype, leaf.shape):
        restore.problems.append(
            f"{name} is {here[0]}{list(here[1])} here and {leaf.dtype}{list(leaf.shape)} in the checkpoint"
        )
