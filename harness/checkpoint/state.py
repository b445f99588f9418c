"""Live objects of a training script <-> named leaves and JSON. What torch makes is in `modules` and `optimizers`.

    State(model=model, optimizer=optimizer, scheduler=scheduler, ema=dict_of_tensors, extra={"epoch": 3})

Any subset, under any names. A module gives `model/<parameter or buffer>`, an optimizer `optimizer/<parameter>/<key>`
by parameter *name*, a dict of tensors `ema/<key>`; scalars and hyperparameters become JSON. Other objects take part
through `state_dict()` and `load_state_dict()`, other dicts as trees of plain values, restored in place.

Parameters, optimizer state and dicts of tensors are the same on all ranks (replicated); of buffers and all else rank
0's copy is stored. A rank that has a part of a tensor says so with a `Shard` as value in a dict of tensors, or with
`shards`; what is every rank's own is a `PerRank`. Nothing here is collective. A parameter that has two names is stored
once, with an alias.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.modules import parameter_names, prepare_module, take_module, tensors_of
from harness.checkpoint.optimizers import groups_of, prepare_optimizer, take_optimizer
from harness.checkpoint.partial import EXACT, Partial
from harness.checkpoint.perrank import is_per_rank, prepare_per_rank, take_per_rank
from harness.checkpoint.restoring import Restore, Source, maker, matched
from harness.checkpoint.schema import escape, unescape
from harness.checkpoint.shards import Region, Shard
from harness.checkpoint.snapshot import Schema, Snapshot, take_tree
from harness.checkpoint.tensors import is_tensor, new_tensor
from harness.checkpoint.tree import complete, decode
from harness.errors import DataError

_SHOWN = 20


class State:
    """What a checkpoint holds: named live objects, also as attributes. Those that are None are left out.

    shards: parameters and buffers of which this rank has a part, by name: `{"fc.weight": Box(...)}`. The optimizer's
    state of such a parameter that is of its local shape is the same part. A name with its entry before it, as in
    `optimizer.fc.weight`, is meant for this entry only.
    optional: entries that may be here and not in a checkpoint, where they stay as they are, or there and not here.
    """

    def __init__(
        self, *, shards: Mapping[str, Region] | None = None, optional: Collection[str] = (), **entries: Any
    ) -> None:
        self.shards: dict[str, Region] = dict(shards or {})
        self.optional = frozenset(optional)
        self.entries: dict[str, Any] = {name: value for name, value in entries.items() if value is not None}
        self.kinds: dict[str, str] = {name: _kind(name, value) for name, value in self.entries.items()}
        if taken := {"entries", "kinds", "shards", "optional"} & set(entries):
            raise DataError(f"an entry of a State cannot be called {taken.pop()!r}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["entries"][name]
        except KeyError:
            raise AttributeError(f"this State has no {name}") from None


def take(state: State, rank: int = 0, size: int = 1, *, before: Schema | None = None) -> Snapshot:
    """The state's leaves, aliases and JSON, as `rank` of `size` has it. `before`: the schema of an earlier snapshot.

    Tensors are referred to, not copied. Raises DataError.
    """
    snapshot = Snapshot(rank, size, state.shards, before=before)
    snapshot.stepped = _stepped(state)
    names = parameter_names(_modules(state))
    _check_shards(state, names)
    for entry in state.entries:
        snapshot.record[entry] = take_entry(entry, state, names, snapshot)
    snapshot.schema()
    return snapshot


def _stepped(state: State) -> set[int]:
    optimizers = [value for entry, value in state.entries.items() if state.kinds[entry] == "optimizer"]
    return {id(tensor) for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]}


def take_entry(entry: str, state: State, names: dict[int, tuple[str, str]], snapshot: Snapshot) -> dict[str, Json]:
    """Add an entry's leaves to the snapshot, and return its JSON. `names`: of the parameters, for optimizers."""
    value, kind, root = state.entries[entry], state.kinds[entry], escape(entry)
    record: dict[str, Json] = {"kind": kind}
    if kind == "module":
        take_module(value, root, snapshot, record)
    elif kind == "optimizer":
        take_optimizer(value, root, names, snapshot, record)
    elif kind == "tensors":
        for key, tensor in value.items():
            if isinstance(tensor, Shard):
                snapshot.add_part(f"{root}/{escape(key)}", tensor.tensor, tensor.region)
            else:
                snapshot.add(f"{root}/{escape(key)}", tensor, "replicated")
    elif kind == "per_rank":
        take_per_rank(value, root, snapshot, record)
    else:
        content = value.state_dict() if kind == "holder" else value
        record["value"] = take_tree(content, root, "rank0", snapshot)
        if kind == "holder":
            record["class"] = type(value).__name__
    return record


def prepare(
    state: State, manifest: Manifest, *, partial: Partial | None = None, rank: int = 0, size: int = 1
) -> Restore:
    """Where the leaves of a checkpoint go in this state, as `rank` of `size` has it. Changes nothing yet.

    `partial`: None for all of the checkpoint into all of the state. Everything that does not fit is listed in
    `problems`; what is kept, left out or converted, in `report`. All that can be checked without reading a tensor is
    checked here: names, shapes, dtypes, kinds, groups of optimizers, all JSON. After it, two things can still leave a
    state half restored: damage that is found while the tensors are read, and a `load_state_dict` or `set_extra_state`
    that refuses the values it gets.
    """
    restore = Restore(EXACT if partial is None else partial, rank, size, state.shards)
    source = Source(manifest, restore.partial, restore.report)
    names = parameter_names(_modules(state))
    _check_shards(state, names)
    for entry, (there, _) in source.entries.items():
        kind = _record_kind(manifest, there)
        if entry in state.entries or not _asked_for(source, entry, there, kind, restore.partial):
            continue
        if entry in state.optional:
            restore.report.unexpected.append(entry)
        else:
            restore.unexpected(entry, f" ({_a(kind)})")
    # Modules first: how a parameter is converted decides about its optimizer's state.
    for entry in sorted(state.entries, key=lambda entry: state.kinds[entry] != "module"):
        _prepare_entry(entry, state, manifest, source, names, restore)
    return restore


def _prepare_entry(
    entry: str, state: State, manifest: Manifest, source: Source, names: dict[int, tuple[str, str]], restore: Restore
) -> None:
    value, kind, partial = state.entries[entry], state.kinds[entry], restore.partial
    made = value == {} and entry in source.entries and _record_kind(manifest, source.entries[entry][0]) == "tensors"
    parts = kind in ("module", "tensors")
    asked = partial.wants_entry(entry) or (parts and any(map(partial.wants, _names(value, escape(entry), kind))))
    if not (asked or made):
        restore.report.untouched.append(entry)
        return
    if entry not in source.entries and not (parts and source.below(escape(entry))):
        if entry in state.optional:
            restore.report.missing.append(entry)
        else:
            restore.missing(entry, f" ({_a(kind)})")
        return
    there, record = source.entries.get(entry, (entry, {}))
    stored = _record_kind(manifest, there) if record else kind
    renamed = parts and there != entry and stored in ("module", "tensors")
    if kind != stored and not renamed and not made:
        restore.mismatched(entry, f"{entry} is {_a(kind)} here and {_a(stored)} in the checkpoint")
    elif kind == "module":
        prepare_module(value, entry, source, restore)
    elif kind == "optimizer":
        prepare_optimizer(value, entry, names, source, restore)
    elif kind == "per_rank":
        prepare_per_rank(value, entry, manifest, source, restore)
    elif stored == "tensors" or kind == "tensors":
        _prepare_tensors(value, escape(entry), source, restore)
    elif why := _another_holder(value, record, kind):
        restore.mismatched(entry, f"{entry} {why}")
    else:
        tree = decode(record["value"], maker(source.leaves, restore))
        restore.steps.append(_load_tree(value, tree, stored))
        restore.report.loaded.append(entry)


def _check_shards(state: State, names: dict[int, tuple[str, str]]) -> None:
    """Raises DataError where parts are declared of parameters that nobody has."""
    if not state.shards:
        return
    named = set()
    for entry, value in state.entries.items():
        if state.kinds[entry] == "module":
            found = [name for name, _, _ in tensors_of(value)]
        elif state.kinds[entry] == "optimizer":
            found = [name for group in groups_of(value, names) for name in group]
        else:
            continue
        named |= {*found, *(f"{entry}.{name}" for name in found)}
    if unknown := sorted(set(state.shards) - named):
        raise DataError(f"State(shards=...) names {unknown[0]!r}, which is no parameter or buffer of this state")


class Misfit(DataError):
    """A checkpoint does not fit the state that it is to be restored into."""


def complain(problems: list[str], where: object) -> Misfit:
    """One error that lists all of them."""
    shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
    return Misfit(
        "\n  ".join([f"the checkpoint {where} does not fit this program:", *shown]),
        hint="use the model and optimizer it was saved with, or another checkpoint directory;"
        " restore(..., partial=Partial(...)) takes a part of it, under other names, or of another dtype",
    )


def _kind(name: str, value: Any) -> str:
    if is_per_rank(value):
        return "per_rank"
    if hasattr(value, "named_parameters") and hasattr(value, "named_buffers"):
        return "module"
    if hasattr(value, "param_groups") and hasattr(value, "state_dict"):
        return "optimizer"
    if isinstance(value, MutableMapping):
        one_of_each = {type(item): item for item in value.values()}.values()
        tensors = value and all(is_tensor(item) or isinstance(item, Shard) for item in one_of_each)
        return "tensors" if tensors else "tree"
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return "holder"
    raise DataError(
        f"State({name}=...) is a {type(value).__name__}, which a checkpoint cannot hold",
        hint="it takes modules, optimizers, objects with state_dict() and load_state_dict(), and dicts",
    )


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "optimizer" else f"a {kind}"


def _record_kind(manifest: Manifest, entry: str) -> str:
    record = manifest.state[entry]
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in ("module", "optimizer", "tensors", "tree", "holder", "per_rank"):
        raise DataError(f"the checkpoint's entry {entry!r} is of an unknown kind: {kind!r}")
    return str(kind)


def _modules(state: State) -> dict[str, Any]:
    return {entry: value for entry, value in state.entries.items() if state.kinds[entry] == "module"}


def _names(value: Any, root: str, kind: str) -> list[str]:
    """Names of the tensors of a module or of a dict of tensors."""
    keys = [name for name, _, _ in tensors_of(value)] if kind == "module" else list(value)
    return [f"{root}/{escape(key)}" for key in keys]


def _asked_for(source: Source, entry: str, there: str, kind: str, partial: Partial) -> bool:
    """Whether an entry that is only in the checkpoint is asked for. Its tensors may all have gone to other entries."""
    if kind in ("module", "tensors") and any(name.startswith(escape(there) + "/") for name in source.leaves):
        return any(partial.wants(name) for name in source.below(escape(entry)))
    return partial.wants_entry(entry)


def _prepare_tensors(value: MutableMapping[str, Any], root: str, source: Source, restore: Restore) -> None:
    stored = source.below(root)
    if value:
        wanted = {f"{root}/{escape(key)}": tensor for key, tensor in value.items()}
        for name, tensor, leaf in matched(wanted, stored, restore):
            if isinstance(tensor, Shard):
                restore.fill(name, tensor.tensor, leaf, tensor.region)
            else:
                restore.fill(name, tensor, leaf)
        return
    # Nothing made yet: take what there is.
    made = {name: new_tensor("torch", leaf.dtype, leaf.shape) for name, leaf in stored.items()}
    for name, tensor, leaf in matched(made, stored, restore):
        restore.fill(name, tensor, leaf)
    chosen = {unescape(n.removeprefix(f"{root}/")): t for n, t in made.items() if restore.partial.wants(n)}
    restore.steps.append(lambda: lambda: value.update(chosen))


def _another_holder(value: Any, record: Any, kind: str) -> str | None:
    """Why a holder of state cannot take this one's, None where it can: another class, with other things in its state.

    A scheduler of torch would take any other's state without a word.
    """
    there, name = record.get("class"), type(value).__name__
    if kind != "holder" or there in (None, name) or not isinstance(record["value"], dict):
        return None
    live = value.state_dict()
    if not isinstance(live, dict) or not (set(live) - set(record["value"]) and set(record["value"]) - set(live)):
        return None
    return f"is of the class {name} here and {there} in the checkpoint"


def _load_tree(target: Any, tree: Any, kind: str) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        value = complete(tree)
        if kind == "holder":
            return lambda: target.load_state_dict(value)
        if not isinstance(value, dict):
            raise DataError("the checkpoint has no dict where one was saved")

        def refill() -> None:
            target.clear()
            target.update(value)

        return refill

    return make
