"""A state in host memory comes back bit for bit, into the same objects or into fresh ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from samples import OPTIMIZERS, Net, bits, train

from harness.checkpoint import State
from harness.checkpoint.memory import empty, outline, recall, remember
from harness.checkpoint.shards import Box
from harness.errors import DataError


def state(model: Any, optimizer: Any, **extra: Any) -> State:
    ema = {"head": torch.full((3,), 0.1, dtype=torch.bfloat16)}
    return State(model=model, optimizer=optimizer, ema=ema, extra={"best": None, "x": 0.1, **extra})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_never_gone_astray(name: str) -> None:
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(4))
    memory = remember(state(model, optimizer, step=4), 4)
    train(model, optimizer, range(4, 8))
    wanted = bits([model.state_dict(), optimizer.state_dict()])

    train(model, optimizer, range(8, 10))
    here = state(model, optimizer)
    recall(here, memory)
    assert here.extra == {"best": None, "x": 0.1, "step": 4} and memory.step == 4
    train(model, optimizer, range(4, 8))
    assert bits([model.state_dict(), optimizer.state_dict()]) == wanted

    fresh = Net(seed=1)
    new = OPTIMIZERS[name](fresh.parameters())
    given = empty(outline(memory))  # as another rank gets it
    for leaf, data in memory.leaves.items():
        given.leaves[leaf][:] = data
    recall(state(fresh, new), given)
    train(fresh, new, range(4, 8))
    assert bits([fresh.state_dict(), new.state_dict()]) == wanted


def test_memory_is_used_again() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    first = remember(state(model, optimizer), 0)  # no moments yet
    train(model, optimizer, range(2))
    second = remember(state(model, optimizer), 2, first)
    assert second.leaves["model/hidden.weight"] is first.leaves["model/hidden.weight"]
    before = bits(model.state_dict())
    train(model, optimizer, range(2, 3))
    recall(state(model, optimizer), second)
    assert bits(model.state_dict()) == before


def test_another_model_is_refused_and_unchanged() -> None:
    memory = remember(State(model=torch.nn.Linear(3, 2)), 7)
    other = torch.nn.Linear(3, 4)
    before = bits(other.state_dict())
    with pytest.raises(DataError, match=r"of step 7 in memory does not fit this program"):
        recall(State(model=other), memory)
    assert bits(other.state_dict()) == before


def test_a_part_of_a_tensor_is_refused() -> None:
    part = State(model=torch.nn.Linear(3, 2), shards={"weight": Box((4, 3), (0, 0), (2, 3))})
    with pytest.raises(DataError, match=r"model/weight is divided between the ranks"):
        remember(part, 1)


def test_numpy_arrays_and_empty_tensors() -> None:
    arrays = {"a": np.arange(5), "none": np.zeros((0, 3)), "t": torch.zeros(2, 2).t()}
    memory = remember(State(arrays=arrays), 1)
    arrays["a"][:] = 0
    arrays["t"].fill_(1)
    recall(State(arrays=arrays), memory)
    assert arrays["a"].tolist() == [0, 1, 2, 3, 4] and arrays["t"].sum() == 0
