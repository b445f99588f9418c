"""After a change of the ranks all have the state of the rank that remembers the latest step."""

from __future__ import annotations

from typing import Any

import torch

from harness.checkpoint import State
from harness.elastic import Elastic
from harness.world import World


def make(world: World, seed: int) -> tuple[Any, Any, State]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    return model, optimizer, State(model=model, optimizer=optimizer, extra={"seed": seed})


def train(model: Any, optimizer: Any, steps: int) -> list[torch.Tensor]:
    for step in range(steps):
        model(torch.full((2, 4), step + 0.5) * torch.tensor([[1.0], [2.0]])).square().sum().backward()
        optimizer.step()
    moments = [value for values in optimizer.state_dict()["state"].values() for value in values.values()]
    return [tensor.clone() for tensor in [*model.state_dict().values(), *moments]]


def test_no_rank_remembers_anything(world: World) -> None:
    assert Elastic().recall(make(world, 0)[2], world) is None


def test_the_latest_step_counts_whoever_has_it(world: World) -> None:
    last = world.size - 1
    model, optimizer, state = make(world, seed=world.rank)
    mine = train(model, optimizer, 3 + world.rank)
    elastic = Elastic()
    if world.rank in (0, last):  # those between are new, with an optimizer that has no state yet
        elastic.remember(state, 3 + world.rank)
    found = make(world, seed=100 + world.rank)
    assert elastic.recall(found[2], world) == (3 + last, last)
    assert found[2].extra == {"seed": last} and elastic.memory is not None and elastic.memory.step == 3 + last

    reference, its_optimizer, _ = make(world, seed=last)
    expected = train(reference, its_optimizer, 3 + last)
    got = train(found[0], found[1], 0)
    assert len(got) == len(expected) == 7 + 3 * 4
    assert all(map(torch.equal, got, expected)), "bit for bit, with no step that an optimizer takes to make its state"
    assert world.rank != last or all(map(torch.equal, got, mine))


def test_a_failure_of_other_ranks_is_survived_and_nothing_else_is() -> None:
    from horovod.common.exceptions import HorovodInternalError

    elastic = Elastic()
    assert elastic.survives(HorovodInternalError("gone")) and not elastic.survives(RuntimeError("bug"))
