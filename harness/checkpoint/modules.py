"""torch modules in a checkpoint: parameters and persistent buffers by name, tied weights once. See `state`.

With a model `State(model=...)` whose head shares its weight with the embedding:

    embedding.weight       leaf model/embedding.weight, replicated
    norm.running_mean      leaf model/norm.running_mean, of rank 0
    head.weight            alias model/head.weight of model/embedding.weight
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.restoring import Restore, Source, maker, matched
from harness.checkpoint.schema import Leaf, Placement, escape, unescape
from harness.checkpoint.shards import Region, region_of
from harness.checkpoint.snapshot import Snapshot, take_tree
from harness.checkpoint.tree import complete, decode
from harness.errors import DataError


def tensors_of(module: Any) -> list[tuple[str, Any, Placement]]:
    """(name, live tensor, placement) of parameters and persistent buffers; shared ones under all their names."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile: the same names, compiled or not
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }
    found: list[tuple[str, Any, Placement]] = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if hasattr(parameter, "materialize"):
            raise DataError(f"parameter {name} has no shape yet", hint="run the model once before a checkpoint")
        found.append((name, parameter, "replicated"))
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name not in transient:
            found.append((name, buffer, "rank0"))
    return found


def _identity(tensor: Any) -> object:
    """The same memory seen in the same way is the same tensor, whether or not it is the same object."""
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def take_module(module: Any, root: str, snapshot: Snapshot, record: dict[str, Json]) -> None:
    first: dict[object, str] = {}
    for name, tensor, placement in tensors_of(module):
        path = f"{root}/{escape(name)}"
        identity = _identity(tensor)
        if identity in first:
            snapshot.aliases[path] = first[identity]
        else:
            first[identity] = path
            if region := region_of(snapshot.shards, unescape(root), name):
                snapshot.add_part(path, tensor, region)
            else:
                snapshot.add(path, tensor, placement, late=id(tensor) in snapshot.stepped)
    if extra := {name: part.get_extra_state() for name, part in _parts_with_extra_state(module)}:
        record["extra"] = take_tree(extra, f"{root}/_extra_state", "rank0", snapshot)


def prepare_module(module: Any, entry: str, source: Source, restore: Restore) -> None:
    root = escape(entry)
    wanted: dict[str, Any] = {}
    regions: dict[str, Region | None] = {}
    for name, tensor, _ in tensors_of(module):
        path = f"{root}/{escape(name)}"
        wanted[path], regions[path] = tensor, region_of(restore.shards, entry, name)
    extra = f"{root}/_extra_state/"
    stored = {name: leaf for name, leaf in source.below(root).items() if not name.startswith(extra)}
    filled: dict[object, tuple[str, Leaf]] = {}
    for name, tensor, leaf in matched(wanted, stored, restore):
        identity = _identity(tensor)
        first, used = filled.get(identity, (name, leaf))
        if first == name:
            if restore.fill(name, tensor, leaf, regions[name]):
                filled[identity] = name, leaf
            continue
        restore.report.loaded.append(name)
        if used.name != leaf.name:
            restore.report.notes.append(f"{first} and {name} are one tensor here and two there; the first is used")
    _prepare_extra_state(module, entry, source, restore)


def _prepare_extra_state(module: Any, entry: str, source: Source, restore: Restore) -> None:
    there, record = source.entries.get(entry, (entry, {}))
    record = record.get("extra", {}) if record.get("kind") == "module" else {}
    if not isinstance(record, dict):
        raise DataError(f"the checkpoint's extra state of {entry} is not as it should be")
    parts = {
        name: part
        for name, part in _parts_with_extra_state(module)
        if restore.partial.wants(f"{escape(entry)}/{escape(name)}")
    }
    stored: dict[str, Json] = {}
    for name, value in record.items():
        path = restore.partial.renamed(f"{escape(there)}/{escape(name)}")
        if restore.partial.wants(path):
            stored[unescape(path.removeprefix(f"{escape(entry)}/"))] = value
    restore.compare(
        [f"{entry}: extra state of {name}" for name in parts], {f"{entry}: extra state of {name}" for name in stored}
    )
    values = {name: decode(value, maker(source.leaves, restore)) for name, value in stored.items() if name in parts}

    def make() -> Callable[[], None]:
        made = {name: complete(value) for name, value in values.items()}

        def hand_over() -> None:
            for name, value in made.items():
                parts[name].set_extra_state(value)

        return hand_over

    restore.steps.append(make)


def _parts_with_extra_state(module: Any) -> list[tuple[str, Any]]:
    import torch

    module = getattr(module, "_orig_mod", module)
    default = torch.nn.Module.get_extra_state
    return [(name, part) for name, part in module.named_modules() if type(part).get_extra_state is not default]


def has_own_ways(module: Any) -> bool:
    """Whether a class of it says by itself what belongs to its state."""
    import torch

    module, kind = getattr(module, "_orig_mod", module), torch.nn.Module
    ways = ("named_parameters", "named_buffers", "named_modules", "_named_members")
    if any(getattr(type(module), way) is not getattr(kind, way) for way in ways):
        return True
    return bool(_parts_with_extra_state(module))


def parameter_names(modules: Mapping[str, Any]) -> dict[int, tuple[str, str]]:
    """id(parameter) -> the entry of its module and its name there."""
    names: dict[int, tuple[str, str]] = {}
    for entry, module in modules.items():
        for name, tensor, _ in tensors_of(module):
            names.setdefault(id(tensor), (entry, name))
    return names
