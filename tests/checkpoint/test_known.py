"""What has not changed since the last save is not looked at again; whatever has changed is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.checkpoint import Box, Manager, PerRank, Shard, State, keep_last, open_checkpoint
from harness.checkpoint import collecting as collecting_module
from harness.checkpoint.comm import Single
from harness.checkpoint.known import Known
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.state import take


class Work:
    """A model with buffers and tied weights, an optimizer with state, averages, arrays and plain values."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
        self.model[2].weight = self.model[0].weight
        self.optimizer: Any = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.average = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.arrays = {"a": np.arange(12.0).reshape(3, 4), "b": np.zeros(5, np.int32)}
        self.extra: dict[str, Any] = {"epoch": 1, "names": ["x"]}
        self.train()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 8)).square().sum().backward()
        self.optimizer.step()

    def state(self) -> State:
        """A new object each time, of the same things: as a training loop makes it."""
        scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5)
        return State(
            model=self.model, optimizer=self.optimizer, average=self.average, arrays=self.arrays,
            extra=dict(self.extra), scheduler=scheduler,
        )  # fmt: skip


def content(snapshot: Snapshot, record: dict[str, Any]) -> tuple[Any, ...]:
    """All that would be written: JSON, names, and the bytes of every tensor."""
    data = {name: buffer.read(0, buffer.nbytes).tobytes() for name, buffer in snapshot.buffers.items()}
    leaves = [str(leaf) for leaf in snapshot.leaves]
    return json.dumps(record, sort_keys=True), leaves, snapshot.aliases, data, snapshot.schema().hash


def known_of(state: State) -> Known:
    known = Known.of(state, take(state))
    assert known is not None
    return known


def test_values_that_change_are_those_of_now() -> None:
    work = Work()
    known = known_of(work.state())
    for epoch in range(3):
        work.train()
        work.arrays["a"] += 1
        work.extra = {"epoch": epoch, "best": float("nan")}
        for group in work.optimizer.param_groups:
            group["lr"] *= 0.5
        again = known.again(work.state())
        assert again is not None
        fresh = take(work.state())
        assert content(again.snapshot, again.record()) == content(fresh, fresh.record)


def grown(work: Work) -> None:
    work.model.append(torch.nn.Linear(8, 2))


def swapped(work: Work) -> None:
    work.model[0].bias = torch.nn.Parameter(torch.ones(8))


def moved(work: Work) -> None:
    work.model[0].bias.data = work.model[0].bias.data.clone() + 1


def halved(work: Work) -> None:
    work.model[0].bias.data = work.model[0].bias.data.half()


def shortened(work: Work) -> None:
    work.model[0].bias.data = work.model[0].bias.data[:4]


def turned(work: Work) -> None:
    work.model[0].weight.data = work.model[0].weight.data.t()


def seen_otherwise(work: Work) -> None:
    work.average["0.bias"].data = work.average["0.bias"].data.view(torch.int32)


def untied(work: Work) -> None:
    work.model[2].weight = torch.nn.Parameter(work.model[0].weight.detach().clone())


def renamed(work: Work) -> None:
    work.average["other"] = work.average.pop("0.bias")


def reordered(work: Work) -> None:
    work.arrays["a"] = work.arrays.pop("a").copy(order="F")


def reshaped(work: Work) -> None:
    work.arrays["a"].shape = (4, 3)


def gone(work: Work) -> None:
    work.model._non_persistent_buffers_set = set()
    work.model[1]._non_persistent_buffers_set.add("running_mean")


def emptied(work: Work) -> None:
    work.optimizer.state.clear()


def one_more_key(work: Work) -> None:
    work.optimizer.state[work.model[0].bias]["more"] = torch.ones(8)


def another_optimizer(work: Work) -> None:
    work.optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1, momentum=0.9)
    work.train()


def two_groups(work: Work) -> None:
    group = work.optimizer.param_groups[0]
    last = group["params"].pop()
    work.optimizer.param_groups.append({**group, "params": [last]})


def tensor_in_extra(work: Work) -> None:
    work.extra["tensor"] = torch.ones(3)


def demoted(work: Work) -> None:
    bias = work.model[0]._parameters.pop("bias")
    work.model[0]._buffers["bias"] = bias


CHANGES = [
    grown, swapped, moved, halved, shortened, turned, seen_otherwise, untied, renamed, reordered, reshaped, gone,
    demoted, emptied, one_more_key, another_optimizer, two_groups, tensor_in_extra,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_any_other_change_is_seen(change: Callable[[Work], None]) -> None:
    """Then everything is taken again: what is saved is what a first save would save."""
    work = Work()
    known = known_of(work.state())
    change(work)
    assert known.again(work.state()) is None
    assert known_of(work.state()).again(work.state()) is not None or change is tensor_in_extra


def test_there_may_be_many() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(400)]
    model = torch.nn.ParameterList(parameters)
    optimizer = torch.optim.SGD([{"params": parameters[:300]}, {"params": parameters[300:]}], momentum=0.9)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = State(model=model, optimizer=optimizer)
    assert known_of(state).again(state) is not None


class OwnState(torch.nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None: ...


class OwnNames(torch.nn.Linear):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return (("own." + name, value) for name, value in super().named_parameters(*args, **kwargs))


class OwnOptimizer(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


class Special(torch.Tensor): ...


def test_what_has_ways_of_its_own_is_always_taken() -> None:
    linear = torch.nn.Linear(2, 2)
    hooked = torch.optim.SGD(linear.parameters())
    hooked.register_state_dict_post_hook(lambda optimizer, state: state)
    sparse = torch.optim.SGD(linear.parameters(), momentum=0.9)
    sparse.state[linear.weight]["momentum_buffer"] = torch.eye(2).to_sparse()
    for entries in (
        {"model": OwnState(2, 2)},
        {"model": OwnNames(2, 2)},
        {"model": linear, "optimizer": OwnOptimizer(linear.parameters())},
        {"model": linear, "optimizer": hooked},
        {"tensors": {"a": torch.zeros(3).as_subclass(Special)}},
        {"own": PerRank({"a": np.zeros(2)})},
        {"model": linear, "optimizer": sparse},
    ):
        state = State(**entries)
        assert Known.of(state, take(state)) is None, entries


def test_shards_are_known_by_their_tensors() -> None:
    part = torch.zeros(4, 3)
    shards = {"a": Shard(part, Box((4, 3), (0, 0), (4, 3)))}
    state = State(tensors=shards)
    known = known_of(state)
    assert known.again(State(tensors=shards)) is not None
    part.data = torch.ones(4, 3)
    assert known.again(State(tensors=shards)) is None


def test_saves_of_a_loop_use_it_and_hold_the_values_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(collecting_module, "take", lambda *args, **rest: (taken.append(1), take(*args, **rest))[1])
    work, expected = Work(), {}
    with Manager(tmp_path, comm=Single(), keep=keep_last(9)) as manager:
        for step in range(1, 4):
            work.train()
            work.arrays["b"] += step
            expected[step] = (work.model[0].weight.detach().numpy().copy(), work.arrays["b"].copy())
            manager.save(step, work.state())
            manager.wait()
        assert len(taken) == 1
        work.model[0].bias.data = torch.full((8,), 7.0)  # the same object, other memory
        manager.save(4, work.state())
        manager.wait()
        assert len(taken) == 2
    for step, (weight, array) in expected.items():
        with open_checkpoint(tmp_path / f"step-{step:08d}") as checkpoint:
            assert np.array_equal(checkpoint.read("model/0.weight"), weight)
            assert np.array_equal(checkpoint.read("arrays/b"), array)
            steps = checkpoint.manifest.state["optimizer"]["state"]["0.bias"]["step"]  # type: ignore[index,call-overload]
            assert steps == {"$scalar": ["torch", "float32", float(step + 1)]}
    with open_checkpoint(tmp_path / "step-00000004") as checkpoint:
        assert np.array_equal(checkpoint.read("model/0.bias"), np.full(8, 7, np.float32))


def test_a_state_that_cannot_be_remembered_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(state: State, snapshot: Snapshot) -> Known:
        raise RuntimeError("not this one")

    monkeypatch.setattr(Known, "of", broken)
    work = Work()
    manager = Manager(tmp_path, Single(), log=lambda line: None)
    for step in (1, 2):
        work.train()
        path = manager.save(step, work.state(), wait=True)
        with open_checkpoint(path) as checkpoint:
            np.testing.assert_array_equal(checkpoint.read("model/0.weight"), work.model[0].weight.detach())
    manager.close()
