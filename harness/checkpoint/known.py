"""What the save before has found in a state, so that the next one looks only at what may have changed.

    known = Known.of(state, snapshot)       # None where that cannot be told without taking the state again
    again = known.again(state)              # Again(snapshot, record), or None: take all of it again

In most programs nothing changes from save to save but values: of tensors, in the memory where they were, and of a few
numbers. Whether the containers still hold the same objects, and these still lie in the same memory in the same way, is
found out with a few calls per tensor, several times faster than taking the state. Whatever is not sure is taken again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from harness.checkpoint.comm import Json
from harness.checkpoint.modules import has_own_ways
from harness.checkpoint.optimizers import describe_group, is_plain
from harness.checkpoint.schema import escape
from harness.checkpoint.shards import Shard
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.state import State, take_entry
from harness.checkpoint.tensors import is_tensor
from harness.checkpoint.tree import scalar

_COMPARED = ("module", "optimizer", "tensors")
"""Kinds of entries of which only tensors and single numbers are expected to change; others are taken every time."""

_CHUNK = 200
"""Tensors that are asked for everything before the next ones."""


class Again(NamedTuple):
    """A snapshot like the one before, and the JSON per entry of now; that is put together when it is asked for."""

    snapshot: Snapshot
    record: Callable[[], dict[str, Json]]


class _Number(NamedTuple):
    """A single number of an optimizer's state: a 0-dimensional tensor, stored as JSON."""

    parameter: str
    key: str
    tensor: Any


@dataclass(frozen=True, eq=False)
class Known:
    """A state as it was: the objects in it, the tensors among them, and how these lie in memory.

    It holds on to them: what a program replaces is given back at the next save.
    """

    snapshot: Snapshot
    objects: list[Any]
    tensors: list[Any]
    """Of torch."""
    arrays: list[Any]
    geometry: Any
    numbers: dict[str, list[_Number]]
    """By entry of an optimizer."""

    @classmethod
    def of(cls, state: State, snapshot: Snapshot) -> Known | None:
        """None where another way than comparing objects is needed to see that nothing has changed."""
        if not all(map(_comparable, state.entries.values(), state.kinds.values())):
            return None
        numbers = {
            entry: list(_numbers(value, snapshot.record[entry]))
            for entry, value in state.entries.items()
            if state.kinds[entry] == "optimizer"
        }
        single = {id(number.tensor) for some in numbers.values() for number in some}
        objects = _walk(state)
        kinds = {type(part): part for part in objects}
        of_tensors = {kind for kind, part in kinds.items() if is_tensor(part)}
        found = {id(part): part for part in objects if type(part) in of_tensors and id(part) not in single}
        arrays = [tensor for tensor in found.values() if isinstance(tensor, np.ndarray)]
        tensors = [tensor for tensor in found.values() if not isinstance(tensor, np.ndarray)]
        if _unusual(tensors):
            return None
        return cls(snapshot, objects, tensors, arrays, _geometry(tensors, arrays), numbers)

    def again(self, state: State) -> Again | None:
        """The state of now, None where more than values may have changed. Raises DataError as `state.take` does."""
        objects = _walk(state)
        if len(objects) != len(self.objects) or not all(map(is_, objects, self.objects)):
            return None
        if _geometry(self.tensors, self.arrays) != self.geometry:
            return None
        before, record = self.snapshot.record, {}
        values: dict[str, list[Any]] = {}
        for entry, value in state.entries.items():
            kind = state.kinds[entry]
            if kind == "optimizer":
                values[entry] = _items([number.tensor for number in self.numbers[entry]])
                record[entry] = before[entry] | {"groups": _groups(entry, value, before[entry])}  # type: ignore[operator]
            elif kind in _COMPARED:
                record[entry] = before[entry]
            else:
                taken = Snapshot(self.snapshot.rank, self.snapshot.size)
                record[entry] = take_entry(entry, state, {}, taken)
                if taken.leaves:
                    return None
        return Again(self.snapshot, lambda: {e: self._put(e, r, values.get(e)) for e, r in record.items()})

    def _put(self, entry: str, record: Any, values: list[Any] | None) -> Any:
        """An optimizer's record with these single numbers."""
        if not values:
            return record
        state = dict(record["state"])
        for number, value in zip(self.numbers[entry], values, strict=True):
            name, key = number.parameter, number.key
            path = f"{escape(entry)}/{escape(name)}/{key}"
            state[name] = state[name] | {key: scalar("torch", record["state"][name][key]["$scalar"][1], value, path)}
        return record | {"state": state}


def _walk(state: State) -> list[Any]:
    """The objects that a state consists of, in an order of its own; of entries that are taken every time, none."""
    found: list[Any] = [*state.entries, *state.kinds.values(), *state.shards, *state.shards.values()]
    for entry, value in state.entries.items():
        kind = state.kinds[entry]
        if kind == "module":
            _walk_module(getattr(value, "_orig_mod", value), found)
        elif kind == "optimizer":
            _walk_optimizer(value, found)
        elif kind == "tensors":
            found.extend(value)
            found.extend(value.values())
            if Shard in set(map(type, value.values())):
                found.extend(part.tensor for part in value.values() if isinstance(part, Shard))
    return found


def _walk_module(module: Any, found: list[Any]) -> None:
    for kind, part in (("parameters", module._parameters), ("buffers", module._buffers), ("modules", module._modules)):
        if part:
            found.append(kind)
            found.extend(part)
            found.extend(part.values())
    found.extend(module._non_persistent_buffers_set)
    for child in module._modules.values():
        if child is not None:
            _walk_module(child, found)


def _walk_optimizer(optimizer: Any, found: list[Any]) -> None:
    for group in optimizer.param_groups:
        found.extend(group["params"])
        found.extend(group)
    found.extend(optimizer.state)
    for values in optimizer.state.values():
        found.extend(values)
        found.extend(values.values())


def _comparable(value: Any, kind: str) -> bool:
    if kind == "module":
        return not has_own_ways(value)
    if kind == "optimizer":
        return is_plain(value)
    return kind != "per_rank"


def _numbers(optimizer: Any, record: Any) -> Iterator[_Number]:
    for (name, stored), live in zip(record["state"].items(), optimizer.state.values(), strict=True):
        for key, value in stored.items():
            if isinstance(value, dict) and "$scalar" in value:
                yield _Number(name, key, live[key])


def _groups(entry: str, optimizer: Any, record: Any) -> Json:
    root = escape(entry)
    return [
        describe_group(group, described["params"], root)
        for group, described in zip(optimizer.param_groups, record["groups"], strict=True)
    ]


def _items(tensors: Sequence[Any]) -> list[Any]:
    """The values of 0-dimensional tensors of torch. From a GPU they come in one copy."""
    if tensors and not tensors[0].is_cpu and len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1:
        import torch

        values: list[Any] = torch.stack(list(tensors)).tolist()
        return values
    return [tensor.item() for tensor in tensors]


def _unusual(tensors: Sequence[Any]) -> bool:
    """Whether some of them are of a class that may do as it likes, or are not one piece of memory (sparse ones)."""
    if not tensors:
        return False
    import torch

    plain = set(map(type, tensors)) <= {torch.Tensor, torch.nn.Parameter}
    return not plain or {tensor.layout for tensor in tensors} != {torch.strided}


def _geometry(tensors: Sequence[Any], arrays: Sequence[Any]) -> Any:
    """How they lie in memory, to be compared."""
    of_numpy = [(array.shape, array.strides, array.dtype) for array in arrays]
    if not tensors:
        return of_numpy
    from torch import Tensor

    # Training waits for this: attributes take twice as long as `map`, and so do tensors that have left the CPU's cache.
    methods = (Tensor.data_ptr, Tensor.size, Tensor.stride, Tensor.dtype.__get__)  # type: ignore[attr-defined]
    of_torch: list[Any] = []
    for at in range(0, len(tensors), _CHUNK):
        some = tensors[at : at + _CHUNK]
        for method in methods:
            of_torch.extend(map(method, some))
    return of_torch, of_numpy
