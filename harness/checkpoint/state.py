"""Live objects of a training script <-> named leaves and JSON. What torch makes is in `modules` and `optimizers`.

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
from harness.checkpoint.modules import parameter_names, prepare_module, take_module
from harness.checkpoint.optimizers import prepare_optimizer, take_optimizer
from harness.checkpoint.restoring import Restore, check_fit, compare, maker
from harness.checkpoint.schema import Leaf, check_schema, escape
from harness.checkpoint.snapshot import Snapshot, take_tree
from harness.checkpoint.tensors import is_tensor, new_tensor
from harness.checkpoint.tree import complete, decode
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
    names = parameter_names(_modules(state))
    for entry, value in state.entries.items():
        kind = state.kinds[entry]
        root = escape(entry)
        record: dict[str, Json] = {"kind": kind}
        if kind == "module":
            take_module(value, root, snapshot, record)
        elif kind == "optimizer":
            take_optimizer(value, root, names, snapshot, record)
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
    names = parameter_names(_modules(state))
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
            prepare_module(value, escape(entry), manifest, leaves, record, restore)
        elif stored == "optimizer":
            prepare_optimizer(value, entry, names, leaves, record, restore)
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


def _modules(state: State) -> dict[str, Any]:
    return {entry: value for entry, value in state.entries.items() if state.kinds[entry] == "module"}


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
