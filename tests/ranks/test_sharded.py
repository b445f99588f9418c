"""The optimizer cut over ranks against one process that has all of it: the same mathematics, bytes and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from test_training import OUT, assert_same_bits, bits, directory, finish, records, settings, start, stop_at
from test_update import BATCH, CPU, STEPS, Branches, conv, data, equal_on_all, mlp, take_steps
from test_update import train as train_whole

from harness.checkpoint import Manager, Single, State
from harness.config import Horovod, Optim, Train
from harness.errors import ConfigError
from harness.loop import restore
from harness.optim import BUILT_IN, make_optimizer
from harness.parallel.groups import Groups, arrange, groups_of
from harness.parallel.settings import ELEMENTWISE
from harness.update import Update, shard
from harness.world import World

SETTINGS = Horovod(bucket=300)
"""Small buckets, so that there are several and slices end within parameters."""


def over_all(world: World) -> Groups:
    every = tuple(range(world.size))
    return groups_of(arrange(["here"] * world.size), world.rank, {every: hvd.global_process_set}, "all")


@contextmanager
def over_nodes(world: World) -> Iterator[Groups]:
    """As if every two ranks had a node."""
    grid = arrange([f"node{rank // 2}" for rank in range(world.size)])
    made = [hvd.add_process_set(list(ranks)) for ranks in grid.sets("node")]
    sets = {tuple(one.ranks): one for one in made} | {tuple(range(world.size)): hvd.global_process_set}
    yield groups_of(grid, world.rank, sets, "node")
    for one in made:
        hvd.remove_process_set(one)


def sharded(
    model: torch.nn.Module, optim: Optim, groups: Groups, *, passes: int = 1, horovod: Horovod = SETTINGS, **train: Any
) -> Update:
    cut, slices = shard(model, model.parameters(), horovod, groups)
    return Update(
        model,
        make_optimizer(slices, optim, lr=optim.lr),
        train=Train.model_validate({"steps": STEPS, "global_batch": BATCH, **train}),
        horovod=horovod,
        passes=passes,
        ranks=groups.replicas.size,
        device=CPU,
        sharded=cut,
    )


def compare(
    world: World,
    optim: Optim,
    build: Any = mlp,
    *,
    groups: Groups | None = None,
    passes: int = 1,
    horovod: Horovod = SETTINGS,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    **train: Any,
) -> None:
    if world.size == 1:
        pytest.skip("one rank has all of it")
    reference, model = build(), build()
    train_whole(reference, optim, ranks=1, rank=0, passes=1, horovod=Horovod(), **train)
    update = sharded(model, optim, groups or over_all(world), passes=passes, horovod=horovod, **train)
    take_steps(update, model, world.rank, world.size)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda told, name=name: f"{name}: {told}")
    equal_on_all(world, model)


@pytest.mark.parametrize("name", [*BUILT_IN, *(f"torch.optim:{kind}" for kind in ELEMENTWISE)])
def test_every_elementwise_optimizer(world: World, name: str) -> None:
    compare(world, Optim(name=name, lr=0.01, weight_decay=0.0 if "Rprop" in name else 0.01))


@pytest.mark.parametrize(
    "changes",
    [
        {"passes": 2, "clip_norm": 0.05},
        {"clip_value": 0.01},
        {"precision": "bf16", "rtol": 3e-2, "atol": 3e-2},
        {"horovod": Horovod(bucket=300, compression="fp16"), "rtol": 1e-2, "atol": 1e-2},
        {"horovod": Horovod(bucket=300, predivide=2.0)},
        {"horovod": Horovod()},
        {"build": conv, "optim": Optim(name="adamw", lr=0.01, args={"fused": True})},
    ],
    ids=str,
)
def test_every_way_of_taking_a_step(world: World, changes: dict[str, Any]) -> None:
    compare(world, **{"optim": Optim(name="momentum", lr=0.05), **changes})


def test_shards_within_nodes_and_copies_between_them(world: World) -> None:
    if world.size < 4:
        pytest.skip("needs two nodes of two")
    with over_nodes(world) as groups:
        assert (groups.shards.size, groups.copies.size) == (2, 2)
        compare(world, Optim(name="adam", lr=0.01), groups=groups, clip_norm=0.05)
        compare(world, Optim(name="momentum", lr=0.05), groups=groups, horovod=Horovod(compression="fp16"), rtol=0.01)


def test_a_rank_has_its_part_of_the_state_only(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank has all of it")
    model = mlp()
    update = sharded(model, Optim(name="adamw"), over_all(world))
    take_steps(update, model, world.rank, world.size)
    elements = sum(parameter.numel() for parameter in model.parameters())
    held = [tensor for state in update.optimizer.state.values() for key, tensor in state.items() if key != "step"]
    mine = sum(tensor.numel() for tensor in held)
    total = sum(int(str(told)) for told in world.comm.all_gather(mine))
    assert total == 2 * elements, "every element once, with two moments"
    assert mine <= 2 * math.ceil(elements / world.size) + 2 * len(update.regions)
    assert all(parameter.grad is None for parameter in model.parameters())
    sent, nbytes = update.sent / STEPS, 4 * elements * 2 * (world.size - 1) / world.size
    assert nbytes <= sent < 1.3 * nbytes  # as an allreduce, with what fills up these tiny buckets


def test_what_nobody_uses_does_not_move_and_what_one_rank_uses_does(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank has all of it")
    model, start = Branches(), Branches()
    horovod = Horovod(bucket=100, sparse_as_dense=True)
    update = sharded(model, Optim(name="adamw", lr=0.1, weight_decay=0.5), over_all(world), horovod=horovod)
    for step in range(2):
        update.backward(model(data(step)[0], "ab" if world.rank == 0 else "a").pow(2).mean())
        update.synchronize()
        update.step()
    assert torch.equal(model.c.weight, start.c.weight) and torch.equal(model.table.weight, start.table.weight)
    assert not torch.equal(model.b.weight, start.b.weight)
    equal_on_all(world, model)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(world: World, scaled: bool) -> None:
    if world.size == 1:
        pytest.skip("one rank has all of it")
    model, reference = mlp(), mlp()
    optim = Optim(name="momentum", lr=0.05)
    train_whole(reference, optim, ranks=1, rank=0, passes=1, horovod=Horovod(), clip_norm=0.05)
    update = sharded(model, optim, over_all(world), clip_norm=0.05, nonfinite="skip")
    if scaled:
        update.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in (0, "overflow", 1, 2, 3):
        if step != "overflow":
            take_steps(update, model, world.rank, world.size, [step])
            continue
        before = [parameter.detach().clone() for parameter in model.parameters()]
        update.backward(model(data(0)[0]).pow(2).mean() * (math.inf if world.rank == 0 else 1.0))
        update.synchronize()
        result = update.step()
        assert (result.finite, result.taken) == (False, False)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if update.scaler is not None:
        assert update.scaler.get_scale() == 512.0
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    equal_on_all(world, model)


def test_what_cannot_be_cut_is_refused(world: World) -> None:
    if world.size == 1:
        pytest.skip("one rank has all of it")
    with pytest.raises(ConfigError, match="cannot cut sparse gradients"):
        sharded(Branches(), Optim(name="sgd"), over_all(world))
    with pytest.raises(ConfigError, match=f"so few parameters are no {world.size} parts"):
        sharded(torch.nn.ParameterList([torch.zeros(1)]), Optim(name="sgd"), over_all(world))


class Grouped(torch.nn.Module):
    """Two groups of parameters, one of them with a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.frozen

    def groups(self) -> list[dict[str, Any]]:
        biases = [parameter for name, parameter in self.named_parameters() if "bias" in name]
        return [
            {"params": [self.net[0].weight, self.net[2].weight, self.frozen], "weight_decay": 0.1},
            {"params": iter(biases), "lr": 0.02},
        ]


def test_saved_in_slices_restored_whole_and_back(world: World) -> None:
    """N ranks, sharded -> one process, unsharded -> N ranks, sharded; beside a run of one process from end to end."""
    if world.size == 1:
        pytest.skip("one rank has all of it")
    path = directory(world, "sharded-and-back")
    optim = Optim(name="adamw", lr=0.01)

    def on_all() -> tuple[Grouped, Update, State]:
        model = Grouped()
        cut, slices = shard(model, model.groups(), SETTINGS, over_all(world))
        update = Update(
            model,
            make_optimizer(slices, optim, lr=optim.lr),
            train=Train(steps=1, global_batch=BATCH),
            horovod=SETTINGS,
            passes=1,
            ranks=world.size,
            device=CPU,
            sharded=cut,
        )
        shards = {f"optimizer.{name}": region for name, region in update.regions.items()}
        return model, update, State(model=model, optimizer=update.optimizer, shards=shards)

    def on_one() -> tuple[Grouped, torch.optim.Optimizer, State]:
        model = Grouped()
        optimizer = make_optimizer(model.groups(), optim, lr=optim.lr)
        return model, optimizer, State(model=model, optimizer=optimizer)

    def alone(model: Grouped, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x, y = data(step)
            optimizer.zero_grad()
            (model(x) - y).pow(2).mean().backward()
            optimizer.step()

    model, update, state = on_all()
    take_steps(update, model, world.rank, world.size, range(2))
    manager = Manager(path, world.comm)
    manager.save(2, state, wait=True)
    manager.close()
    reference, optimizer, _ = on_one()
    alone(reference, optimizer, range(2))
    if world.is_root:
        whole, its, state = on_one()
        manager = Manager(path, Single())
        assert manager.restore(state) == 2
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-4, atol=1e-5)
        for mine, wanted in zip(its.state.values(), optimizer.state.values(), strict=True):
            for key, value in wanted.items():
                torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6)
        alone(whole, its, range(2, 4))
        manager.save(4, state, wait=True)
        manager.close()
    world.comm.barrier()
    model, update, state = on_all()
    manager = Manager(path, world.comm)
    assert manager.restore(state) == 4
    manager.close()
    take_steps(update, model, world.rank, world.size, range(4, 6))
    alone(reference, optimizer, range(2, 6))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_a_run_with_shards_repeats_and_goes_on_by_bits(world: World) -> None:
    """With averaged parameters; and as near to the run with whole optimizers as floats are."""
    if world.size == 1:
        pytest.skip("one rank has all of it")
    world = dataclasses.replace(world, groups=over_all(world))
    common = {"optim": {"name": "adamw", "lr": 0.01}, "train.ema": 0.9, "train.clip_norm": 1.0}
    cut = {**common, "parallel": {"optimizer_shards": "all"}, "horovod": {"bucket": 3000}}
    straight = start(world, settings("digits", directory(world, "sharded-straight"), **cut))
    finish(straight)
    config = settings("digits", directory(world, "sharded-resumed"), **cut, checkpoint={})
    stop_at(world, config, 5)
    resumed = start(world, config)
    finish(resumed)
    assert_same_bits(bits(resumed), bits(straight))
    none = groups_of(world.groups.grid, world.rank, {world.groups.replicas.ranks: hvd.global_process_set})
    whole = start(
        dataclasses.replace(world, groups=none), settings("digits", directory(world, "sharded-whole"), **common)
    )
    finish(whole)
    near = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)
    for a, b in zip(straight.model.parameters(), whole.model.parameters(), strict=True):
        near(a, b)
    assert straight.ema is not None and whole.ema is not None
    mine = sum(tensor.numel() for tensor in straight.ema.shadow.values())
    assert sum(int(str(told)) for told in world.comm.all_gather(mine)) == sum(
        p.numel() for p in whole.model.parameters()
    )
    before = [parameter.detach().clone() for parameter in straight.model.parameters()]
    with straight.ema.applied():
        for name, parameter in straight.model.named_parameters():
            near(parameter, whole.ema.shadow[name])
    assert_same_bits([parameter.detach() for parameter in straight.model.parameters()], before)
    if world.is_root:
        evals = [
            [record["loss"] for record in records(OUT / f"{world.size}-sharded-{name}", "eval")]
            for name in ("straight", "whole")
        ]
        assert len(evals[0]) == 2
        assert evals[0] == pytest.approx(evals[1], rel=1e-4)
    # what one form has saved the other goes on from, and back: averages, too
    ahead = start(
        dataclasses.replace(world, groups=none), settings("digits", OUT / f"{world.size}-sharded-resumed", **common)
    )
    assert restore(ahead) == 8
    assert ahead.ema is not None
    for name, value in ahead.ema.shadow.items():
        near(value, whole.ema.shadow[name])
    ahead.close()
    back = start(world, settings("digits", OUT / f"{world.size}-sharded-whole", **cut))
    assert restore(back) == 8
    assert back.ema is not None
    for name, value in back.ema.shadow.items():
        near(value, straight.ema.shadow[name])
    back.close()
