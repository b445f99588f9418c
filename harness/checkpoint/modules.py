"""torch modules in a checkpoint: parameters and persistent buffers by name, tied weights once. See `state`.

With a model `State(model=...)` whose head shares its weight with the embedding:

    embedding.weight       leaf model/embedding.weight, replicated
    norm.running_mean      leaf model/norm.running_mean, of rank 0
    head.weight            alias model/head.weight of model/embedding.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.restoring import Restore, check_fit, compare, maker
from harness.checkpoint.schema import Leaf, Placement, escape
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


def take_module(module: Any, root: str, snapshot: Snapshot, record: dict[str, Json]) -> None:
    first: dict[object, str] = {}
    for name, tensor, placement in tensors_of(module):
        path = f"{root}/{escape(name)}"
        # The same memory seen in the same way is the same tensor, whether or not it is the same object.
        identity = (
            (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
            if tensor.numel()
            else id(tensor)
        )
        if identity in first:
            snapshot.aliases[path] = first[identity]
        else:
            first[identity] = path
            snapshot.add(path, tensor, placement)
    if extra := {name: part.get_extra_state() for name, part in _parts_with_extra_state(module)}:
        record["extra"] = take_tree(extra, f"{root}/_extra_state", "rank0", snapshot)


def prepare_module(
    module: Any, root: str, manifest: Manifest, leaves: Mapping[str, Leaf], record: Any, restore: Restore
) -> None:
    wanted = {f"{root}/{escape(name)}": tensor for name, tensor, _ in tensors_of(module)}
    extra = f"{root}/_extra_state/"
    stored = {
        name for name in [*leaves, *manifest.aliases] if name.startswith(root + "/") and not name.startswith(extra)
    }
    compare(wanted, stored, restore)
    filled: set[tuple[str, int]] = set()
    for name, tensor in wanted.items():
        if name not in stored:
            continue
        leaf = leaves[manifest.aliases.get(name, name)]
        check_fit(name, tensor, leaf, restore)
        if (leaf.name, tensor.data_ptr()) not in filled or not tensor.numel():
            filled.add((leaf.name, tensor.data_ptr()))
            restore.sink(leaf.name, tensor)
    parts = dict(_parts_with_extra_state(module))
    values = decode(record.get("extra", {}), maker(leaves, restore))
    compare(
        {f"{root}: extra state of {name}": None for name in parts},
        {f"{root}: extra state of {n}" for n in values},
        restore,
    )

    def set_extra_state() -> None:
        for name, value in values.items():
            parts[name].set_extra_state(complete(value))

    restore.steps.append(set_extra_state)


def _parts_with_extra_state(module: Any) -> list[tuple[str, Any]]:
    import torch

    module = getattr(module, "_orig_mod", module)
    default = torch.nn.Module.get_extra_state
    return [(name, part) for name, part in module.named_modules() if type(part).get_extra_state is not default]


def parameter_names(modules: Mapping[str, Any]) -> dict[int, str]:
    """id(parameter) -> its name, for modules by entry; with the entry in front where there are several modules."""
    names: dict[int, str] = {}
    for entry, module in modules.items():
        for name, tensor, _ in tensors_of(module):
            names.setdefault(id(tensor), f"{entry}.{name}" if len(modules) > 1 else name)
    return names
