"""The distributed update against one process that takes the whole global batch: the same mathematics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from harness.config import Horovod, Optim, Train
from harness.errors import ConfigError
from harness.optim import BUILT_IN, make_optimizer
from harness.update import Update
from harness.world import World

BATCH, STEPS = 16, 4
CPU = torch.device("cpu")


def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def conv() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (6, 1, 1)),
        torch.nn.Conv2d(6, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    ).to(memory_format=torch.channels_last)


class Words(torch.nn.Module):
    """Sparse gradients; rows repeat within and between ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 3, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table((x.abs() * 10).long() % 7).sum(dim=1)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)


def take_steps(
    update: Update, model: torch.nn.Module, rank: int, ranks: int, steps: Iterable[int] = range(STEPS)
) -> None:
    """Steps on this rank's contiguous part of each batch."""
    share = BATCH // ranks
    for step in steps:
        x, y = (part[rank * share : (rank + 1) * share].chunk(update.passes) for part in data(step))
        for xs, ys in zip(x, y, strict=True):
            with update.autocast():
                loss = (model(xs) - ys).pow(2).mean()
            update.backward(loss)
        update.synchronize()
        update.step()


def train(
    model: torch.nn.Module, optim: Optim, *, ranks: int, rank: int, passes: int, horovod: Horovod, **train: Any
) -> Update:
    """STEPS steps on this rank's contiguous parts; with ranks=1 the plain reference."""
    update = Update(
        model,
        make_optimizer(model.parameters(), optim, lr=optim.lr),
        train=Train.model_validate({"steps": STEPS, "global_batch": BATCH, **train}),
        horovod=horovod,
        passes=passes,
        ranks=ranks,
        device=CPU,
    )
    take_steps(update, model, rank, ranks)
    return update


def compare(
    world: World,
    build: Callable[[], torch.nn.Module] = mlp,
    optim: Optim | None = None,
    *,
    passes: int = 1,
    horovod: Horovod | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    **train_settings: Any,
) -> None:
    optim = optim or Optim(name="momentum", lr=0.05)
    settings = {"ranks": 1, "rank": 0, "passes": 1, "horovod": Horovod()}
    reference, model = build(), build()
    train(reference, optim, **settings, **train_settings)
    train(
        model, optim, ranks=world.size, rank=world.rank, passes=passes, horovod=horovod or Horovod(), **train_settings
    )
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda told, name=name: f"{name}: {told}")
    equal_on_all(world, model)


def equal_on_all(world: World, model: torch.nn.Module) -> None:
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    copies = world.comm.all_gather([float(value) for value in flat])
    assert all(one == copies[0] for one in copies), "ranks diverged"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("passes", [1, 2])
def test_every_optimizer_with_and_without_accumulation(world: World, name: str, passes: int) -> None:
    compare(world, optim=Optim(name=name, lr=0.01, weight_decay=0.01), passes=passes)


@pytest.mark.parametrize(
    "horovod",
    [
        Horovod(predivide=2.0),
        Horovod(bucket=64),
        Horovod(bucket=64, predivide=2.0),
        Horovod(sparse_as_dense=True),
    ],
    ids=str,
)
def test_horovod_settings_change_nothing(world: World, horovod: Horovod) -> None:
    compare(world, horovod=horovod)


def test_fp16_compression_changes_little(world: World) -> None:
    compare(world, horovod=Horovod(compression="fp16"), rtol=1e-2, atol=1e-2)


def test_clipping_acts_on_the_averaged_gradient(world: World) -> None:
    compare(world, clip_norm=0.05, passes=2)
    compare(world, clip_value=0.01)


def test_bf16(world: World) -> None:
    compare(world, precision="bf16", rtol=3e-2, atol=3e-2)


def test_channels_last_with_fused_optimizer(world: World) -> None:
    compare(world, conv, Optim(name="adamw", lr=0.01, args={"fused": True}))


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
@pytest.mark.parametrize("dense", [False, True])
def test_sparse_gradients(world: World, name: str, dense: bool) -> None:
    compare(world, Words, Optim(name=name, lr=0.1), passes=2, horovod=Horovod(sparse_as_dense=dense))


def test_sum_is_the_average_times_ranks(world: World) -> None:
    by_sum, by_average = mlp(), mlp()
    for model, op, lr in ((by_sum, "sum", 0.05 / world.size), (by_average, "average", 0.05)):
        train(
            model,
            Optim(name="gd", lr=lr),
            ranks=world.size,
            rank=world.rank,
            passes=1,
            horovod=Horovod.model_validate({"op": op}),
        )
    for a, b in zip(by_sum.parameters(), by_average.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_adasum_of_equal_gradients_is_that_gradient(world: World) -> None:
    """Adasum (Maleki et al. 2020, arXiv:2006.02924) averages parallel gradients; orthogonal ones it adds."""
    if world.size > 1 and world.controller == "gloo":
        with pytest.raises(ConfigError, match="needs MPI"):
            train(mlp(), Optim(), ranks=world.size, rank=world.rank, passes=1, horovod=Horovod(op="adasum"))
        return
    model, reference = mlp(), mlp()
    for candidate, ranks in ((model, world.size), (reference, 1)):
        update = Update(
            candidate,
            make_optimizer(candidate.parameters(), Optim(name="gd", lr=0.05), lr=0.05),
            train=Train(steps=1, global_batch=BATCH),
            horovod=Horovod(op="adasum"),
            passes=1,
            ranks=ranks,
            device=CPU,
        )
        x, y = data(0)
        update.backward((candidate(x) - y).pow(2).mean())  # the same data on all ranks
        update.synchronize()
        update.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    equal_on_all(world, model)


def test_adasum_refuses_sparse_gradients(world: World) -> None:
    if world.size == 1:
        return
    with pytest.raises(ConfigError, match="sparse"):
        train(Words(), Optim(name="sgd"), ranks=world.size, rank=world.rank, passes=1, horovod=Horovod(op="adasum"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_on_one_rank_is_agreed_by_all_and_skipped(world: World, bad: float) -> None:
    model = mlp()
    update = Update(
        model,
        make_optimizer(model.parameters(), Optim(name="adam"), lr=0.01),
        train=Train(steps=1, global_batch=BATCH, nonfinite="skip"),
        horovod=Horovod(),
        passes=2,
        ranks=world.size,
        device=CPU,
    )
    before = copy.deepcopy(model.state_dict())
    for spoiled in (True, False):
        for micro in range(2):
            x, y = data(micro)
            factor = bad if spoiled and world.rank == world.size - 1 and micro == 0 else 1.0
            update.backward((model(x) - y).pow(2).mean() * factor)
        update.synchronize()
        result = update.step()
        assert (result.finite, result.taken) == (not spoiled, not spoiled)
        unchanged = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert unchanged == spoiled
    equal_on_all(world, model)


def test_the_gradient_scaler_is_undone_before_clipping_and_skips_on_all_ranks(world: World) -> None:
    """The way fp16 goes on GPUs, with a CPU scaler: the same result as without it; infinities are skipped."""
    optim, settings = Optim(name="momentum", lr=0.05), {"clip_norm": 0.05}
    reference, model = mlp(), mlp()
    train(reference, optim, ranks=1, rank=0, passes=1, horovod=Horovod(), **settings)
    update = Update(
        model,
        make_optimizer(model.parameters(), optim, lr=optim.lr),
        train=Train.model_validate({"steps": STEPS, "global_batch": BATCH, **settings}),
        horovod=Horovod(),
        passes=1,
        ranks=world.size,
        device=CPU,
    )
    update.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    share = BATCH // world.size
    for step in (0, "overflow", 1, 2, 3):
        x, y = (part[world.rank * share : (world.rank + 1) * share] for part in data(step if step != "overflow" else 0))
        factor = math.inf if step == "overflow" and world.rank == world.size - 1 else 1.0
        update.backward((model(x) - y).pow(2).mean() * factor)
        update.synchronize()
        assert update.step().finite == (step != "overflow")
    assert update.scaler.get_scale() == 512.0
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    equal_on_all(world, model)


class Branches(torch.nn.Module):
    """Parts of which not every rank, or no rank, makes use; one has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(6, 3) for _ in range(3))
        self.table = torch.nn.Embedding(7, 3, sparse=True)

    def forward(self, x: torch.Tensor, used: str) -> torch.Tensor:
        parts = {"a": self.a, "b": self.b, "c": self.c}
        y = sum(parts[name](x) for name in used if name in parts)
        return y + self.table((x.abs() * 10).long() % 7).sum(dim=1) if "t" in used else y


@pytest.mark.parametrize("bucket", [1, 60, 1 << 20])
@pytest.mark.parametrize("op", ["average", "sum"])
def test_ranks_may_use_different_parameters_in_different_passes(world: World, bucket: int, op: str) -> None:
    """As one process that adds up what the ranks do; what nobody used has no gradient, so nothing decays it."""
    reference, model = Branches(), Branches()
    update, alone = (
        Update(
            candidate,
            torch.optim.SGD(
                [
                    {"params": [p for name, p in candidate.named_parameters() if "table" not in name]},
                    {"params": [candidate.table.weight], "weight_decay": 0.0},  # decay knows no sparse gradients
                ],
                lr=0.1,
                weight_decay=0.5,
            ),
            train=Train(steps=1, global_batch=BATCH),
            horovod=Horovod.model_validate({"op": op if ranks > 1 else "sum", "bucket": bucket}),
            passes=passes,
            ranks=ranks,
            device=CPU,
        )
        for candidate, ranks, passes in ((model, world.size, 2), (reference, 1, 2 * world.size))
    )

    def losses(candidate: torch.nn.Module, rank: int, step: int) -> list[torch.Tensor]:
        used = [("abt", "b"), ("a", "at")][(rank + step) % 2] if rank else ("a", "ab")  # c: never; t: not on rank 0
        return [candidate(data(step * 20 + rank)[0], which).pow(2).mean() for which in used]

    for step in range(3):
        for loss in losses(model, world.rank, step):
            update.backward(loss)
        update.synchronize()
        update.step()
        for rank in range(world.size):
            for loss in losses(reference, rank, step):
                alone.backward(loss * (world.size if op == "sum" else 1))
        alone.synchronize()
        alone.step()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda told, name=name: f"{name}: {told}")
    assert torch.equal(model.c.weight, Branches().c.weight)
    equal_on_all(world, model)


def test_dtypes_and_layouts_travel_together(world: World) -> None:
    """fp32, fp64 and bf16 parameters, one that is not contiguous, one element and none."""

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ParameterDict(
            {
                "fp32": torch.nn.Parameter(torch.randn(6, 3)),
                "fp64": torch.nn.Parameter(torch.randn(6, 3).double()),
                "bf16": torch.nn.Parameter(torch.randn(6, 3).bfloat16()),
                "turned": torch.nn.Parameter(torch.randn(3, 6).t()),
                "scalar": torch.nn.Parameter(torch.randn(())),
                "empty": torch.nn.Parameter(torch.randn(0, 3)),
                "frozen": torch.nn.Parameter(torch.randn(6, 3), requires_grad=False),
            }
        )

    optim = Optim(name="adam", lr=0.01)
    results = []
    for ranks in (1, world.size):
        model = build()
        update = Update(
            model,
            make_optimizer(model.parameters(), optim, lr=optim.lr),
            train=Train(steps=1, global_batch=BATCH),
            horovod=Horovod(bucket=100),
            passes=1,
            ranks=ranks,
            device=CPU,
        )
        x, y = data(0)
        share = BATCH // ranks
        part = slice(world.rank * share, (world.rank + 1) * share) if ranks > 1 else slice(None)
        for _ in range(2):
            out = sum(
                (x[part].to(p.dtype) @ p).double() for name, p in model.items() if name not in ("scalar", "empty")
            )
            update.backward((out * model["scalar"] + model["empty"].sum() - y[part]).pow(2).mean())
            update.synchronize()
            for parameter in model.values():
                if parameter.grad is not None:
                    assert (parameter.grad.dtype, parameter.grad.stride()) == (parameter.dtype, parameter.stride())
            update.step()
        results.append(model)
    for name, parameter in results[1].items():
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if name == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(parameter, results[0][name], **tolerance)
    equal_on_all(world, results[1])


def test_the_same_sums_every_time(world: World) -> None:
    """Bit for bit, whatever is ready first: here ranks begin their backward passes at different times."""
    results = []
    for _ in range(3):
        model = mlp()
        train(model, Optim(name="adam"), ranks=world.size, rank=world.rank, passes=1, horovod=Horovod(bucket=200))
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_second_gradient_in_one_backward_pass_is_refused(world: World) -> None:
    """A bucket that travels already would be added to: reentrant checkpointing does so."""
    if world.size == 1:
        return
    model = mlp()
    update = Update(
        model,
        make_optimizer(model.parameters(), Optim(), lr=0.1),
        train=Train(steps=1, global_batch=BATCH),
        horovod=Horovod(),
        passes=1,
        ranks=world.size,
        device=CPU,
    )
    x, _ = data(0)
    update.backward(model(x).pow(2).mean())
    with pytest.raises(ConfigError, match=r"parameter \d\.\w+ got its gradient twice"):
        model(x).pow(2).mean().backward()
    update.synchronize()


def test_another_update_takes_over_the_model(world: World) -> None:
    """After `close` gradients go the way of the new one only, and nothing of the old one's is left."""
    fresh, used = mlp(), mlp()
    settings = {"passes": 1, "train": Train(steps=STEPS, global_batch=BATCH), "device": CPU, "ranks": world.size}
    before = Update(used, torch.optim.SGD(used.parameters(), lr=0.0), horovod=Horovod(bucket=64), **settings)
    take_steps(before, used, world.rank, world.size)
    sent = before.sent
    before.close()
    for model in (fresh, used):
        after = Update(model, torch.optim.SGD(model.parameters(), lr=0.05), horovod=Horovod(), **settings)
        take_steps(after, model, world.rank, world.size)
    for a, b in zip(fresh.parameters(), used.parameters(), strict=True):
        assert torch.equal(a, b)
    assert before.sent == sent
    equal_on_all(world, used)
