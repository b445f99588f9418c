"""torch optimizers in a checkpoint: state by parameter *name*, hyperparameters of groups as JSON. See `state`.

    optimizer.state[model.fc.weight]["exp_avg"]  ->  leaf optimizer/fc.weight/exp_avg, replicated

Numbers of parameters, which depend on the order of groups and of parameters in them, are not stored. A parameter's name
is that in its module; where an optimizer has parameters of several modules, the module's entry stands before it.
Horovod's DistributedOptimizer is the optimizer it wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.restoring import Restore, Source, maker
from harness.checkpoint.schema import escape, unescape
from harness.checkpoint.shards import Region, Shape, check_local, region_of
from harness.checkpoint.snapshot import Snapshot, take_tree
from harness.checkpoint.tensors import dtype_of, is_tensor
from harness.checkpoint.tree import complete, decode, encode
from harness.errors import DataError

_NOT_OPTIONS = {"params", "param_names"}
_IN_ORDER = "LBFGS"
"""Keeps state of all parameters together as flat vectors, so that their order counts."""


def groups_of(optimizer: Any, names: Mapping[int, tuple[str, str]]) -> list[list[str]]:
    """Names of the parameters of each group.

    Those of no module in the state have the name they were given to the optimizer with, else `group<i>.<j>`.
    """
    found = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    several = len({name[0] for group in found for name in group if name}) > 1
    given = [
        group.get("param_names", [f"group{i}.{j}" for j in range(len(group["params"]))])
        for i, group in enumerate(optimizer.param_groups)
    ]
    return [
        [(".".join(name) if several else name[1]) if name else other for name, other in zip(*pair, strict=True)]
        for pair in zip(found, given, strict=True)
    ]


def take_optimizer(
    optimizer: Any, root: str, names: Mapping[int, tuple[str, str]], snapshot: Snapshot, record: dict[str, Json]
) -> None:
    state_dict = optimizer.state_dict()
    groups = groups_of(optimizer, names)
    by_number: dict[object, str] = {}
    described: list[Json] = []
    for group, members in zip(state_dict["param_groups"], groups, strict=True):
        by_number.update(zip(group["params"], members, strict=True))
        described.append(describe_group(group, members, root))
    if len(set(by_number.values())) != len(by_number):
        raise DataError(f"{root} has two parameters of the same name")
    parameters, _ = _by_name(optimizer, groups)
    state: dict[str, Json] = {}
    rest: dict[str, Any] = {}
    for number, values in state_dict["state"].items():
        if number in by_number:
            name = by_number[number]
            part = _part(snapshot.shards, unescape(root), name, parameters[name])
            state[name] = take_tree(values, f"{root}/{escape(name)}", "replicated", snapshot, late=True, part=part)
        else:
            rest[str(number)] = values
    record |= {"class": type(optimizer).__name__, "groups": described, "state": state}
    record["rest"] = take_tree(rest, f"{root}/_rest", "replicated", snapshot)


def describe_group(group: Mapping[str, Any], members: Sequence[str], root: str) -> Json:
    """JSON of one group of parameters, whose names these are. Raises DataError."""
    options = {key: value for key, value in group.items() if key not in _NOT_OPTIONS}
    found: dict[str, Any] = {}
    described: Json = {"params": list(members), "options": encode(options, f"{root}: options", found)}
    if found:
        raise DataError(f"{next(iter(found))} is a tensor of several elements, which a hyperparameter cannot be")
    return described


def is_plain(optimizer: Any) -> bool:
    """Whether its state is all in `state` and `param_groups`, with nothing but tensors and numbers per parameter."""
    import torch

    kind = torch.optim.Optimizer
    if not isinstance(optimizer, kind) or type(optimizer).state_dict is not kind.state_dict:
        return False
    if optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks:
        return False
    if not {id(key) for key in optimizer.state} <= {id(p) for group in optimizer.param_groups for p in group["params"]}:
        return False
    kinds = {type(value) for values in optimizer.state.values() for value in values.values()}
    return kinds <= {torch.Tensor, torch.nn.Parameter, float, int, bool, str, type(None)}


def prepare_optimizer(
    optimizer: Any, entry: str, names: Mapping[int, tuple[str, str]], source: Source, restore: Restore
) -> None:
    there, record = source.entries[entry]
    stored = _Stored(entry, there, record, restore)
    mine = groups_of(optimizer, names)
    here = {name for group in mine for name in group}
    problems = len(restore.problems)
    restore.compare([f"{entry}: {name}" for name in here], {f"{entry}: {name}" for name in stored.all})
    if len(restore.problems) > problems:
        if not names:
            restore.problems.append(f"{entry} has parameters of no module in this State: give it the model, too")
        return
    if why := _another(optimizer, mine, stored):
        restore.mismatched(entry, f"{entry} {why}")
        return
    options = _options(entry, mine, stored, restore)
    if len(restore.problems) > problems:
        return
    parameters, numbers = _by_name(optimizer, mine)
    live = optimizer.state_dict()
    groups = [
        {**group, **own, "params": _numbers(optimizer, group["params"])}
        for group, own in zip(live["param_groups"], options, strict=True)
    ]
    # Parameters that the checkpoint does not know keep what they have; the state itself, not a copy of it.
    state: dict[Any, Any] = {
        numbers[name]: live["state"][numbers[name]] for name in here - stored.all if numbers[name] in live["state"]
    }
    loaded = {}
    for name, values in stored.state.items():
        if name in parameters:
            parameter = parameters[name]
            part = _part(restore.shards, entry, name, parameter)
            make = maker(source.leaves, restore, parameter.device, optimizer.state.get(parameter, {}), part)
            loaded[name] = decode(values, make)
    rest = decode(record["rest"], maker(source.leaves, restore))
    if not isinstance(rest, dict) or not all(isinstance(values, dict) for values in loaded.values()):
        raise DataError(f"the checkpoint's state of {entry} is not as it should be")
    restore.report.loaded.append(entry)

    def make_all() -> Callable[[], None]:
        for name, values in loaded.items():
            state[numbers[name]] = complete(values)
        state.update(complete(rest))
        return hand_over

    def hand_over() -> None:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        # torch converts state to the parameter's dtype; what was stored otherwise stays as it was. Only where the
        # parameter itself was converted, its state goes along.
        for name, values in loaded.items():
            parameter = parameters[name]
            for key, value in values.items():
                if not is_tensor(value) or optimizer.state[parameter][key].dtype == value.dtype:
                    continue
                if restore.converted.get(id(parameter)) != dtype_of(value):
                    optimizer.state[parameter][key] = value

    restore.steps.append(make_all)


def _numbers(optimizer: Any, numbers: list[int]) -> Sequence[int]:
    """The numbers of a group's parameters for `load_state_dict`. torch looks through them for each value of the state.

    Of 10,000 parameters with Adam that takes a second in a list, and next to nothing in a range.
    """
    import torch

    plain = type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
    span = range(numbers[0], numbers[0] + len(numbers)) if numbers else range(0)
    return span if plain and not optimizer._optimizer_load_state_dict_pre_hooks and numbers == list(span) else numbers


def _part(shards: Mapping[str, Region], entry: str, name: str, parameter: Any) -> tuple[Shape, Region] | None:
    """(Local shape, region) of the state tensors that are of a parameter's shape, where that is a part of a tensor."""
    region = region_of(shards, entry, name)
    if region is None:
        return None
    check_local(parameter, region, f"{entry}: the parameter {name}")
    return tuple(parameter.shape), region


class _Stored:
    """An optimizer's record with parameters by their names here. Raises DataError where it is not as it should be."""

    def __init__(self, entry: str, there: str, record: Any, restore: Restore) -> None:
        def here(name: str) -> str:
            path = restore.partial.renamed(f"{escape(there)}/{escape(name)}")
            return unescape(path.removeprefix(f"{escape(entry)}/"))

        try:
            self.groups = [[here(name) for name in group["params"]] for group in record["groups"]]
            self.options: list[dict[str, Any]] = [
                {key: value for key, value in decode(group["options"], None).items() if key not in _NOT_OPTIONS}
                for group in record["groups"]
            ]
            self.state = {here(name): values for name, values in record["state"].items()}
            self.kind = str(record.get("class", ""))
            record["rest"]
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"the checkpoint's record of {entry} is not as it should be: {error!r}") from error
        names = [name for group in self.groups for name in group]
        self.all = set(names)
        if len(names) != len(self.all):
            raise DataError(f"the checkpoint's groups of {entry} are not as they should be")
        if strange := set(self.state) - self.all:
            raise DataError(f"the checkpoint has state of {entry} for {min(strange)!r}, which is in none of its groups")


def _by_name(optimizer: Any, mine: Sequence[Sequence[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters, and their numbers in this optimizer's own state_dict, by name."""
    parameters: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    packed = optimizer.state_dict()["param_groups"]
    for group, numbered, members in zip(optimizer.param_groups, packed, mine, strict=True):
        parameters.update(zip(members, group["params"], strict=True))
        numbers.update(zip(members, numbered["params"], strict=True))
    return parameters, numbers


def _options(entry: str, mine: Sequence[Sequence[str]], stored: _Stored, restore: Restore) -> list[dict[str, Any]]:
    """The stored options for each group here: of the stored group that its parameters are in."""
    options: list[dict[str, Any]] = []
    used: dict[int, str] = {}
    place = {name: index for index, group in enumerate(stored.groups) for name in group}
    empty = [index for index, group in enumerate(stored.groups) if not group]
    for number, members in enumerate(mine):
        known = [name for name in members if name in place]
        partners = {place[name] for name in known} or set(empty[:1] if not members else [])
        why = None
        if len(partners) > 1:
            other = next(name for name in known if place[name] != place[known[0]])
            why = f"{other} is with {known[0]} here, but not in the checkpoint"
        elif partners & set(used):
            why = f"{known[0]} is not with {used[place[known[0]]]} here, but in the checkpoint"
        if why:
            restore.mismatched(f"{entry}: group {number}", f"{entry} groups its parameters differently: {why}")
            options.append({})
            continue
        used.update(dict.fromkeys(partners, (known or [""])[0]))
        if not members:
            empty = empty[1:]
        options.append(stored.options[partners.pop()] if partners else {})
    return options


def _another(optimizer: Any, mine: Sequence[Sequence[str]], stored: _Stored) -> str | None:
    """Why the stored state cannot be this optimizer's, None where it can."""
    here = {key for group in optimizer.param_groups for key in group} - _NOT_OPTIONS
    there = {key for options in stored.options for key in options}
    name = type(optimizer).__name__
    # One of the same class may have got and lost settings over its versions, and of another one may be compatible.
    if stored.kind not in ("", name) and here - there and there - here:
        return f"is of the class {name} here and {stored.kind} in the checkpoint"
    if any(kind.__name__ == _IN_ORDER for kind in type(optimizer).__mro__) and list(map(list, mine)) != stored.groups:
        return f"is an {_IN_ORDER}, whose state depends on the order of the parameters, which is another here"
    return None
