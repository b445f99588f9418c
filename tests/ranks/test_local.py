"""Local steps on real ranks: what all have after a round, and what others see in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.config import Horovod, Train
from harness.parallel.local import LocalSteps
from harness.parallel.settings import Outer
from harness.update import Update
from harness.world import World

CPU = torch.device("cpu")
X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sum(1, keepdim=True).sin()


def model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(dtype)


def loss_of(net: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    """Of eight samples that only this rank has in this step."""
    at = (torch.arange(8) + 8 * rank + 3 * step) % 64
    return ((net(X[at]) - Y[at]) ** 2).mean()


def common(net: torch.nn.Module, lr: float = 0.1, momentum: float = 0.0, **changes: Any) -> dict[str, Any]:
    train_settings = Train.model_validate({"steps": 1, "global_batch": 1, **changes})
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    return {"optimizer": optimizer, "train": train_settings, "horovod": Horovod(), "passes": 1, "device": CPU}


def go(update: Update, net: torch.nn.Module, steps: int, rank: int) -> None:
    for step in range(steps):
        update.begin(1.0)
        update.backward(loss_of(net, rank, step))
        update.synchronize()
        update.step()
        update.share(step + 1)


def vector(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_local_step_of_sgd_is_synchronous_sgd(world: World, momentum: float) -> None:
    """To rounding: the mean of w - lr g over ranks, against w - lr times the mean of g."""
    nets = [model(), model()]
    sync = Update(nets[0], ranks=world.size, **common(nets[0], momentum=momentum))
    local = LocalSteps(nets[1], ranks=world.size, every=1, weight=1 / world.size, **common(nets[1], momentum=momentum))
    for update, net in zip((sync, local), nets, strict=True):
        go(update, net, 6, world.rank)
    # each rank's own momentum is linear in its gradients, so the mean of steps is the step of the mean
    torch.testing.assert_close(vector(nets[0]), vector(nets[1]), rtol=1e-13, atol=1e-14)


def test_where_nothing_is_rounded_they_are_equal_by_bits(world: World) -> None:
    """Whole numbers, powers of two: on 1, 2 and 4 ranks no operation rounds."""
    results = []
    for form in ("sync", "local"):
        net = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.constant_(net.weight, 2.0)
        settings = common(net, lr=0.25)
        if form == "sync":
            update = Update(net, ranks=world.size, **settings)
        else:
            update = LocalSteps(net, ranks=world.size, every=1, weight=1 / world.size, **settings)
        for step in range(4):
            update.begin(1.0)
            x = torch.tensor([[1.0, 2.0, 4.0, 8.0]]) * (world.rank + 1 + step)
            update.backward(net(x).sum())
            update.synchronize()
            update.step()
            update.share(step + 1)
        results.append(vector(net))
    assert torch.equal(*results)


@pytest.mark.parametrize("outer", [None, Outer(lr=0.7, momentum=0.9), Outer(lr=1.0, momentum=0.0)])
def test_rounds_are_what_one_process_computes(world: World, outer: Outer | None) -> None:
    """All ranks' steps one after the other here, unequal weights, torch's SGD with Nesterov momentum outside."""
    weights = np.arange(1, world.size + 1) / sum(range(1, world.size + 1))
    net = model()
    update = LocalSteps(
        net, ranks=world.size, every=3, weight=float(weights[world.rank]), outer=outer, **common(net, momentum=0.5)
    )
    go(update, net, 9, world.rank)

    nets = [model() for _ in range(world.size)]
    singles = [Update(one, ranks=1, **common(one, momentum=0.5)) for one in nets]
    shared = vector(nets[0]).requires_grad_()
    kept = outer or Outer(lr=1.0, momentum=0.0)
    outside = torch.optim.SGD([shared], lr=kept.lr, momentum=kept.momentum, nesterov=kept.momentum > 0)
    for step in range(9):
        for rank, (one, single) in enumerate(zip(nets, singles, strict=True)):
            single.begin(1.0)
            single.backward(loss_of(one, rank, step))
            single.step()
        if (step + 1) % 3 == 0:
            mean = sum(float(weight) * vector(one) for weight, one in zip(weights, nets, strict=True))
            shared.grad = shared.detach() - mean
            outside.step()
            for one in nets:
                torch.nn.utils.vector_to_parameters(shared.detach().clone(), one.parameters())
    torch.testing.assert_close(vector(net), shared.detach(), rtol=1e-12, atol=1e-13)
    assert update.sent == 3 * 2 * (world.size - 1) / world.size * vector(net).nbytes


def test_others_see_the_mean_and_ranks_keep_their_own(world: World) -> None:
    net = model()
    update = LocalSteps(net, ranks=world.size, every=5, weight=1 / world.size, **common(net, momentum=0.5))
    go(update, net, 3, world.rank)
    own = vector(net)
    everyone = torch.from_numpy(world.exchange(own.tolist(), "test/own"))
    assert world.size == 1 or not torch.equal(everyone[0], everyone[1])
    with update.shared(state=True):
        torch.testing.assert_close(vector(net), everyone.mean(0), rtol=1e-13, atol=1e-14)
        seen = torch.from_numpy(world.exchange(vector(net).tolist(), "test/seen"))
        assert all(torch.equal(row, seen[0]) for row in seen), "the same bits on all ranks"
    assert torch.equal(vector(net), own)


def test_what_crosses_the_network_is_counted(world: World) -> None:
    """Gradients of every step, as they travel, against parameters of every third."""
    told = {}
    for form in ("sync", "fp16", "local"):
        net = model(torch.float32)
        settings = common(net) | {"horovod": Horovod(compression="fp16" if form == "fp16" else "none")}
        if form == "local":
            update = LocalSteps(net, ranks=world.size, every=3, weight=1 / world.size, **settings)
        else:
            update = Update(net, ranks=world.size, **settings)
        for step in range(6):
            update.backward(net(X.float()[step : step + 4]).mean())
            update.synchronize()
            update.step()
            update.share(step + 1)
        told[form] = update.sent / (2 * (world.size - 1) / world.size or 1.0)
    size = 4 * vector(model()).numel() if world.size > 1 else 0
    parameters = 4  # travel with a count each
    assert told["sync"] == pytest.approx(6 * (size + 4 * parameters * (size > 0)))
    assert told["fp16"] == pytest.approx(told["sync"] / 2)
    assert told["local"] == pytest.approx(2 * size)
