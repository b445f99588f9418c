"""torch optimizers in a checkpoint: state by parameter *name*, hyperparameters of groups as JSON. See `state`.

    optimizer.state[model.fc.weight]["exp_avg"]  ->  leaf optimizer/fc.weight/exp_avg (replicated)

Numbers of parameters, which depend on the order of groups and of parameters in them, are not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.checkpoint.comm import Json
from harness.checkpoint.restoring import Restore, compare, maker
from harness.checkpoint.schema import Leaf, escape
from harness.checkpoint.snapshot import Snapshot, take_tree
from harness.checkpoint.tensors import is_tensor
from harness.checkpoint.tree import complete, decode, encode
from harness.errors import DataError


def _groups(optimizer: Any, names: Mapping[int, str]) -> list[list[str]]:
    """Names of the parameters of each group; `group<i>.<j>` for those of no module in the state."""
    return [
        [names.get(id(parameter), f"group{i}.{j}") for j, parameter in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def take_optimizer(
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


def prepare_optimizer(
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
