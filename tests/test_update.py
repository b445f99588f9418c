"""The update rule in one process, against torch alone; the same on many ranks is in `ranks/`."""

from __future__ import annotations

import math

import pytest
import torch

from harness.config import Horovod, Train
from harness.ema import Ema
from harness.errors import ConfigError
from harness.update import Update, _poison

CPU = torch.device("cpu")


def make(passes: int = 1, lr: float = 0.1, **train: object) -> tuple[torch.nn.Module, Update]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    settings = Train.model_validate({"steps": 1, "global_batch": 8, **train})
    update = Update(
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        train=settings,
        horovod=Horovod(),
        passes=passes,
        ranks=1,
        device=CPU,
    )
    return model, update


def run(model: torch.nn.Module, update: Update, data: torch.Tensor) -> object:
    for part in data.chunk(update.passes):
        with update.autocast():
            loss = model(part).pow(2).mean()
        update.backward(loss)
    update.synchronize()
    return update.step()


def test_accumulation_equals_the_whole_batch() -> None:
    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    whole, by_four = make(1), make(4)
    run(*whole, data)
    run(*by_four, data)
    for a, b in zip(whole[0].parameters(), by_four[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clip_by_norm_and_by_value() -> None:
    data = torch.full((8, 4), 10.0)
    model, update = make(clip_norm=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    result = run(model, update, data)
    moved = torch.cat([((p.detach() - q) / 0.1).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)
    assert result.grad_norm > 0.5
    model, update = make(clip_value=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    run(model, update, data)
    moved = torch.cat([((p.detach() - q) / 0.1).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(moved.abs().max()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_spoils_the_gradient_and_the_step_is_not_taken(bad: float) -> None:
    model, update = make(nonfinite="skip", passes=2)
    before = [p.detach().clone() for p in model.parameters()]
    data = torch.zeros(8, 4)
    data[5, 1] = bad
    result = run(model, update, data)
    assert (result.finite, result.taken) == (False, False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert run(model, update, torch.ones(8, 4)).taken


def test_ignore_takes_the_step_anyway() -> None:
    model, update = make(nonfinite="ignore")
    result = run(model, update, torch.full((8, 4), math.nan))
    assert result.taken
    assert result.grad_norm is None
    assert all(p.isnan().any() for p in model.parameters())


def test_poison_changes_no_bit_of_a_finite_loss() -> None:
    loss = torch.tensor(1.2345678, requires_grad=True)
    poisoned = _poison(loss)
    assert poisoned.item() == loss.item()
    poisoned.backward()
    assert loss.grad.item() == 1.0


def test_learning_rate_factor_multiplies_each_groups_own_rate() -> None:
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}], lr=0.5)
    model = torch.nn.ParameterList([a, b])
    settings = Train(steps=1, global_batch=1)
    update = Update(model, optimizer, train=settings, horovod=Horovod(), passes=1, ranks=1, device=CPU)
    for factor in (0.5, 0.25):
        update.begin(factor)
        update.backward((a + b).sum())
        update.step()
        assert [group["lr"] for group in update.optimizer.param_groups] == [factor, 0.1 * factor]


def test_sparse_gradients_are_counted_and_clipped_once_per_row() -> None:
    table = torch.nn.Embedding(10, 3, sparse=True)
    torch.nn.init.zeros_(table.weight)
    update = Update(
        table,
        torch.optim.SGD(table.parameters(), lr=1.0),
        train=Train(steps=1, global_batch=4, clip_norm=1.0),
        horovod=Horovod(),
        passes=1,
        ranks=1,
        device=CPU,
    )
    update.backward(table(torch.tensor([4, 4, 4, 7])).sum())
    result = update.step()
    assert result.grad_norm == pytest.approx(math.sqrt(3 * 9 + 3 * 1))
    assert float(table.weight.detach().norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("settings", "field"), [({"compression": "fp16"}, "compression"), ({"op": "adasum"}, "op")])
def test_what_horovod_cannot_do_with_sparse_gradients_is_refused(settings: dict[str, object], field: str) -> None:
    table = torch.nn.Embedding(10, 3, sparse=True)
    with pytest.raises(ConfigError, match=f"horovod.{field}=.* cannot reduce sparse gradients"):
        several(table, **settings)


def test_a_parameter_that_horovod_cannot_reduce_is_named() -> None:
    model = torch.nn.ParameterDict({"phase": torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    with pytest.raises(ConfigError, match=r"parameter phase is of torch\.complex64"):
        several(model)


def test_the_optimizer_holds_parameters_of_the_model_only() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model.parameters = lambda *_: iter([*other.parameters()])  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="2 parameters that the model does not have"):
        several(model)


def several(model: torch.nn.Module, **horovod: object) -> Update:
    """As on one of two ranks; nothing here communicates."""
    return Update(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        train=Train(steps=1, global_batch=4),
        horovod=Horovod.model_validate(horovod),
        passes=1,
        ranks=2,
        device=CPU,
    )


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        make(precision="fp16")


def test_bf16_computes_in_bf16_and_keeps_fp32_parameters() -> None:
    model, update = make(precision="bf16")
    with update.autocast():
        assert model(torch.ones(1, 4)).dtype == torch.bfloat16
    run(model, update, torch.ones(8, 4))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_ema_follows_the_formula_and_swaps_in_and_out() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, 0.9)
    torch.nn.init.constant_(model.weight, 2.0)
    ema.update()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert model.weight.item() == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
        raise RuntimeError("inside")
    assert model.weight.item() == 2.0
    assert ema.shadow["weight"].item() == pytest.approx(1.1)
