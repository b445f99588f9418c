"""Live objects of a training script <-> named leaves and JSON. The only module here that deals with torch's objects.

    State(model=model, optimizer=optimizer, scheduler=scheduler, ema=dict_of_tensors, extra={"epoch": 3})

Any subset, under any names. A module gives `model/<parameter or buffer>`, an optimizer `optimizer/<parameter>/<key>`
by parameter *name*, a dict of tensors `ema/<key>`; scalars and hyperparameters become JSON. Other objects take part
through `state_dict()` and `load_state_dict()`, other dicts as trees of plain values, restored in place.

Parameters, optimizer state and dicts of tensors are the same on all ranks (replicated); of buffers and all else rank
0's copy is stored. Nothing here is collective. A parameter that has two names is stored once, with an alias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.schema import Leaf, Placement, check_schema, escape
from harness.checkpoint.snapshot import Restore, Snapshot, check_fit, compare, maker, take_tree
from harness.checkpoint.tensors import is_tensor, new_tensor
from harness.checkpoint.tree import complete, decode, encode
from harness.errors import DataError

_SHOWN = 20


class State:
    """What a checkpoint holds: named live objects, also as attributes. Those that are None are left out."""

    def __init__(self, **entries: Any) -> None:
        self.entries: dict[str, Any] = {name: value for name, value in entries.items() if value is not None}
        self.kinds: dict[str, str] = {name: _kind(name, value) for name, value in self.entries.items()}
        if taken := {"entries", "kinds"} & set(entries):
            raise DataError(f"an entry of a State cannot be called {taken.pop()!r}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["entries"][name]
        except KeyError:
            raise AttributeError(f"this State has no {name}") from None


def take(state: State) -> Snapshot:
    """The state's leaves, aliases and JSON. Tensors are referred to, not copied. Raises DataError."""
    snapshot = Snapshot()
    names = _parameter_names(state)
    for entry, value in state.entries.items():
        kind = state.kinds[entry]
        root = escape(entry)
        record: dict[str, Json] = {"kind": kind}
        if kind == "module":
            _take_module(value, root, snapshot, record)
        elif kind == "optimizer":
            _take_optimizer(value, root, names, snapshot, record)
        elif kind == "tensors":
            for key, tensor in value.items():
                snapshot.add(f"{root}/{escape(key)}", tensor, "replicated")
        else:
            content = value.state_dict() if kind == "holder" else value
            record["value"] = take_tree(content, root, "rank0", snapshot)
        snapshot.record[entry] = record
    check_schema(snapshot.leaves)
    return snapshot


def prepare(state: State, manifest: Manifest, *, partial: bool = False) -> Restore:
    """Where the leaves of a checkpoint go in this state. Changes nothing yet.

    Everything that does not fit is listed in `problems`. `partial`: entries of the checkpoint that the state does not
    name are left out.
    """
    restore = Restore()
    leaves = {leaf.name: leaf for leaf in manifest.layout.leaves}
    names = _parameter_names(state)
    for entry in manifest.state:
        if entry not in state.entries and not partial:
            restore.problems.append(f"only in the checkpoint: {entry} (a {_record_kind(manifest, entry)})")
    for entry, value in state.entries.items():
        if entry not in manifest.state:
            restore.problems.append(f"missing from the checkpoint: {entry} (a {state.kinds[entry]})")
            continue
        kind, stored = state.kinds[entry], _record_kind(manifest, entry)
        if kind != stored and not (value == {} and stored in ("tensors", "tree")):
            restore.problems.append(f"{entry} is a {kind} here and a {stored} in the checkpoint")
            continue
        record: Any = manifest.state[entry]
        if stored == "module":
            _prepare_module(value, escape(entry), manifest, leaves, record, restore)
        elif stored == "optimizer":
            _prepare_optimizer(value, entry, names, leaves, record, restore)
        elif stored == "tensors":
            _prepare_tensors(value, escape(entry), leaves, restore)
        else:
            tree = decode(record["value"], maker(leaves, restore))
            restore.steps.append(_load_tree(value, tree, stored))
    return restore


def complain(problems: list[str], where: object) -> DataError:
    """One error that lists all of them."""
    shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
    return DataError(
        "\n  ".join([f"the checkpoint {where} does not fit this program:", *shown]),
        hint="use the model and optimizer it was saved with, or another checkpoint directory;"
        " restore(..., partial=True) leaves out what the state does not name",
    )


def _kind(name: str, value: Any) -> str:
    if hasattr(value, "named_parameters") and hasattr(value, "named_buffers"):
        return "module"
    if hasattr(value, "param_groups") and hasattr(value, "state_dict"):
        return "optimizer"
    if isinstance(value, MutableMapping):
        return "tensors" if value and all(is_tensor(item) for item in value.values()) else "tree"
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return "holder"
    raise DataError(
        f"State({name}=...) is a {type(value).__name__}, which a checkpoint cannot hold",
        hint="it takes modules, optimizers, objects with state_dict() and load_state_dict(), and dicts",
    )


def _record_kind(manifest: Manifest, entry: str) -> str:
    record = manifest.state[entry]
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in ("module", "optimizer", "tensors", "tree", "holder"):
        raise DataError(f"the checkpoint's entry {entry!r} is of an unknown kind: {kind!r}")
    return str(kind)


# Modules


def _tensors_of(module: Any) -> list[tuple[str, Any, Placement]]:
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


def _take_module(module: Any, root: str, snapshot: Snapshot, record: dict[str, Json]) -> None:
    first: dict[object, str] = {}
    for name, tensor, placement in _tensors_of(module):
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


def _prepare_module(
    module: Any, root: str, manifest: Manifest, leaves: Mapping[str, Leaf], record: Any, restore: Restore
) -> None:
    wanted = {f"{root}/{escape(name)}": tensor for name, tensor, _ in _tensors_of(module)}
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


# Optimizers


def _parameter_names(state: State) -> dict[int, str]:
    """id(parameter) -> its name; with the module's entry in front where there are several modules."""
    modules = [(entry, value) for entry, value in state.entries.items() if state.kinds[entry] == "module"]
    names: dict[int, str] = {}
    for entry, module in modules:
        for name, tensor, _ in _tensors_of(module):
            names.setdefault(id(tensor), f"{entry}.{name}" if len(modules) > 1 else name)
    return names


def _groups(optimizer: Any, names: Mapping[int, str]) -> list[list[str]]:
    """Names of the parameters of each group; `group<i>.<j>` for those of no module in the state."""
    return [
        [names.get(id(parameter), f"group{i}.{j}") for j, parameter in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def _take_optimizer(
    optimizer: Any, root: str, names: Mapping[int, str], snapshot: Snapshot, record: dict[str, Json]
) -> None:
    state_dict = optimizer.state_dict()
    groups = _groups(optimizer, names)
    by_number: dict[object, str] = {}
    described: list[Json] = []
    for group, members in zip(state_dict["param_groups"], groups, strict=True):
        by_number.update(zip(group["params"], members, strict=True))
        options = {key: value for key, value in group.items() if key != "params"}
        found: dict[str, Any] = {}
        described.append({"params": list(members), "options": encode(options, f"{root}: options", found)})
        if found:
            raise DataError(f"{next(iter(found))} is a tensor of several elements, which a hyperparameter cannot be")
    if len(set(by_number.values())) != len(by_number):
        raise DataError(f"{root} has two parameters of the same name")
    state: dict[str, Json] = {}
    rest: dict[str, Any] = {}
    for number, values in state_dict["state"].items():
        if number in by_number:
            name = by_number[number]
            state[name] = take_tree(values, f"{root}/{escape(name)}", "replicated", snapshot)
        else:
            rest[str(number)] = values
    record |= {"groups": described, "state": state, "rest": take_tree(rest, f"{root}/_rest", "replicated", snapshot)}


def _prepare_optimizer(
    optimizer: Any, entry: str, names: Mapping[int, str], leaves: Mapping[str, Leaf], record: Any, restore: Restore
) -> None:
    mine, stored = _groups(optimizer, names), [list(group["params"]) for group in record["groups"]]
    here, there = {n for group in mine for n in group}, {n for group in stored for n in group}
    compare({f"{entry}: {name}": None for name in here}, {f"{entry}: {name}" for name in there}, restore)
    partner = {frozenset(group): index for index, group in enumerate(stored)}
    if here == there and {frozenset(group) for group in mine} != set(partner):
        restore.problems.append(f"{entry} groups its parameters differently in the checkpoint")
    if restore.problems:
        return
    parameters = {
        name: parameter
        for group, members in zip(optimizer.param_groups, mine, strict=True)
        for name, parameter in zip(members, group["params"], strict=True)
    }
    # Numbers of parameters as this optimizer's own state_dict gives them, options of groups as the checkpoint has them.
    live = optimizer.state_dict()
    numbers = {
        name: number
        for group, members in zip(live["param_groups"], mine, strict=True)
        for name, number in zip(members, group["params"], strict=True)
    }
    groups = []
    for group, members in zip(live["param_groups"], mine, strict=True):
        options = decode(record["groups"][partner[frozenset(members)]]["options"], None)
        groups.append({**group, **options, "params": group["params"]})
    state: dict[Any, Any] = {}
    for name, values in record["state"].items():
        if name not in parameters:
            raise DataError(f"the checkpoint has state of {entry} for {name!r}, which is in none of its groups")
        parameter = parameters[name]
        make = maker(leaves, restore, parameter.device, optimizer.state.get(parameter, {}))
        state[numbers[name]] = decode(values, make)
    state |= decode(record["rest"], maker(leaves, restore))

    def load() -> None:
        complete(state)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        # torch converts state to the parameter's dtype; what was stored otherwise stays as it was.
        for name, parameter in parameters.items():
            for key, value in state.get(numbers[name], {}).items():
                if is_tensor(value) and optimizer.state[parameter][key].dtype != value.dtype:
                    optimizer.state[parameter][key] = value

    restore.steps.append(load)


# Dicts and other holders of state


def _prepare_tensors(value: MutableMapping[str, Any], root: str, leaves: Mapping[str, Leaf], restore: Restore) -> None:
    from urllib.parse import unquote

    stored = {name for name in leaves if name.startswith(root + "/")}
    if not value:  # nothing made yet: take what there is
        made = {name: new_tensor("torch", leaves[name].dtype, leaves[name].shape) for name in sorted(stored)}
        for name, tensor in made.items():
            restore.sink(name, tensor)
        restore.steps.append(lambda: value.update({unquote(n.removeprefix(root + "/")): t for n, t in made.items()}))
        return
    wanted = {f"{root}/{escape(key)}": tensor for key, tensor in value.items()}
    compare(wanted, stored, restore)
    for name in stored & set(wanted):
        check_fit(name, wanted[name], leaves[name], restore)
        restore.sink(name, wanted[name])


def _load_tree(target: Any, tree: Any, kind: str) -> Callable[[], None]:
    def load() -> None:
        value = complete(tree)
        if kind == "holder":
            target.load_state_dict(value)
        else:
            target.clear()
            target.update(value)

    return load
