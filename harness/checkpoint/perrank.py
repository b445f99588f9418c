"""What every rank has of its own in a checkpoint: `PerRank` entries of a State, and random generators (`Rng`).

    State(model=model, sampler=PerRank({"position": 1200, "order": order}), rng=Rng(seed=1))

The leaf `sampler/order` has one dimension more than `order`: row r is rank r's. Numbers are leaves too (int64, float64
or bool of shape (ranks,)), because the JSON of a checkpoint is rank 0's.

A restore on the same number of ranks gives each rank its own back. On another number there is nobody whose it would be:
the entry keeps what it has, a generator with a seed starts anew, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeAlias

import numpy as np

from harness.checkpoint.comm import Json
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.restoring import Restore, Source, matched
from harness.checkpoint.rng import Rng
from harness.checkpoint.schema import Leaf, escape
from harness.checkpoint.shards import PerRank, row_of
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.tensors import is_tensor, is_torch, new_tensor
from harness.errors import DataError

_NUMBERS = {"bool": (bool, "bool"), "int": (int, "int64"), "float": (float, "float64")}
"""kind -> (Python's type, dtype)"""
_MAX_DEPTH = 64
Path: TypeAlias = "tuple[str, ...]"


def is_per_rank(value: object) -> bool:
    """Whether this entry of a State is every rank's own."""
    return isinstance(value, (PerRank, Rng))


def take_per_rank(value: PerRank | Rng, root: str, snapshot: Snapshot, record: dict[str, Json]) -> None:
    """A row of each tensor and number. Raises DataError for anything else."""
    content = value.value if isinstance(value, PerRank) else value.state_dict()
    described: list[Json] = []
    for path, item in _walk(content, (), root):
        kind = _kind(item, "/".join((root, *path)))
        described.append([list(path), kind])
        snapshot.add_row(_name(root, path), item if is_tensor(item) else np.array(item, _NUMBERS[kind][1]))
    record["value"] = described


def prepare_per_rank(value: PerRank | Rng, entry: str, manifest: Manifest, source: Source, restore: Restore) -> None:
    """Where this rank's rows go, or a note why they go nowhere."""
    there, record = source.entries[entry]
    if manifest.world != restore.size:
        _keep(value, entry, manifest, restore)
        return
    stored = _stored(there, record, source)
    if isinstance(value, Rng):
        states: dict[Path, Any] = {(name,): a for name, a in value.state_dict().items() if (name,) in stored}
        _fill(states, entry, {path: stored[path] for path in states}, restore)
        restore.steps.append(lambda: lambda: value.load_state_dict({path[0]: a for path, a in states.items()}))
        restore.report.loaded.append(entry)
        return
    live = dict(_walk(value.value, (), entry))
    for path, (kind, leaf) in stored.items() if not live else ():  # nothing made yet: take what there is
        live[path] = new_tensor(kind, leaf.dtype, leaf.shape[1:]) if kind in ("torch", "numpy") else 0
    arrays: dict[Path, Any] = {
        path: item if is_tensor(item) else np.zeros((), stored[path][1].dtype if path in stored else None)
        for path, item in live.items()
    }
    numbers = {path: stored[path][0] for path, item in live.items() if not is_tensor(item) and path in stored}
    for path, kind in numbers.items():
        if kind not in _NUMBERS:
            restore.mismatched(_name(entry, path), f"{_name(entry, path)} is a number here and not in the checkpoint")
            return
    _fill(arrays, entry, stored, restore)

    def make() -> Callable[[], None]:
        made = {path: _NUMBERS[numbers[path]][0](a) if path in numbers else a for path, a in arrays.items()}
        return lambda: _assign(value.value, made)

    restore.steps.append(make)


def _keep(value: PerRank | Rng, entry: str, manifest: Manifest, restore: Restore) -> None:
    told = f"{entry} was saved by {manifest.world} ranks, each its own, and these are {restore.size}: "
    if isinstance(value, Rng) and value.seed is not None:
        restore.steps.append(lambda: lambda: _reseed(value, manifest.step, restore.rank))
        restore.report.notes.append(told + "the generators start anew from their seed, the step and the rank")
    else:
        restore.report.notes.append(told + "it stays as it is")
    restore.report.untouched.append(entry)


def _reseed(generators: Rng, step: int, rank: int) -> None:
    generators.reseed(step, rank)


def _fill(arrays: dict[Path, Any], entry: str, stored: dict[Path, tuple[str, Leaf]], restore: Restore) -> None:
    wanted = {_name(escape(entry), path): array for path, array in arrays.items()}
    leaves = {_name(escape(entry), path): leaf for path, (_, leaf) in stored.items()}
    for name, array, leaf in matched(wanted, leaves, restore):
        restore.fill(name, array[None], leaf, row_of(restore.rank, restore.size, tuple(array.shape)))


def _stored(there: str, record: Any, source: Source) -> dict[Path, tuple[str, Leaf]]:
    """(kind, leaf) by path, from the entry's record. Raises DataError where it is not as it should be."""
    found = {}
    try:
        for path, kind in record["value"]:
            leaf = source.leaves[_name(escape(there), tuple(path))]
            if kind not in ("torch", "numpy", *_NUMBERS) or leaf.placement != "per_rank" or not path:
                raise ValueError(f"{kind} {leaf}")
            if kind in _NUMBERS and (leaf.dtype, len(leaf.shape)) != (_NUMBERS[kind][1], 1):
                raise ValueError(f"{kind} {leaf}")
            found[tuple(path)] = kind, leaf
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"the checkpoint's record of {there} is not as it should be: {error!r}") from error
    return found


def _walk(value: MutableMapping[str, Any] | dict[str, Any], path: Path, root: str) -> Iterator[tuple[Path, Any]]:
    if len(path) > _MAX_DEPTH:
        raise DataError(f"{root} is nested deeper than {_MAX_DEPTH} levels")
    for key, item in value.items():
        if not isinstance(key, str):
            raise DataError(f"{root} has the key {key!r}; what is per rank has text as keys")
        if isinstance(item, MutableMapping):
            yield from _walk(item, (*path, key), root)
        else:
            yield (*path, key), item


def _kind(item: Any, name: str) -> str:
    if is_tensor(item):
        return "torch" if is_torch(item) else "numpy"
    if isinstance(item, int) and not -(1 << 63) <= item < 1 << 63:
        raise DataError(f"{name} is {item}, which has more than 64 bits", hint="store it as an array")
    for kind, (python, _) in _NUMBERS.items():
        if type(item) is python:
            return kind
    raise DataError(
        f"{name} is a {type(item).__name__}; what is per rank is made of tensors and numbers",
        hint="all ranks must have the same dtypes and shapes: store other things as arrays of one size",
    )


def _name(root: str, path: Path) -> str:
    return "/".join((root, *map(escape, path)))


def _assign(target: MutableMapping[str, Any], values: dict[Path, Any]) -> None:
    for path, value in values.items():
        place = target
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
