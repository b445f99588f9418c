"""Optimizers by name, the learning-rate rules, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from harness.config import Optim, Schedule
from harness.errors import ConfigError
from harness.optim import BUILT_IN, make_optimizer, peak_lr
from harness.schedule import factor


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_optimizer_descends(name: str) -> None:
    (weight,) = params = parameters()
    optimizer = make_optimizer(params, Optim(name=name, lr=0.1), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
    assert float((weight.detach() ** 2).sum()) < 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gd", {"momentum": 0}), ("momentum", {"momentum": 0.9, "nesterov": False}), ("nesterov", {"nesterov": True})],
)
def test_settings_reach_torch(name: str, expected: dict[str, object]) -> None:
    group = make_optimizer(parameters(), Optim(name=name), lr=0.5).param_groups[0]
    assert group["lr"] == 0.5
    assert {key: group[key] for key in expected} == expected


def test_gd_is_the_textbook_rule() -> None:
    (weight,) = params = parameters()
    optimizer = make_optimizer(params, Optim(name="gd"), lr=0.25)
    (weight**2).sum().backward()
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((3,), 1.0 - 0.25 * 2.0))


def test_any_torch_optimizer_by_path() -> None:
    made = make_optimizer(parameters(), Optim(name="torch.optim:NAdam", args={"momentum_decay": 0.01}), lr=0.1)
    assert isinstance(made, torch.optim.NAdam)
    assert made.param_groups[0]["momentum_decay"] == 0.01


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Optim(name="torch.optim:Nope"), "cannot be imported"),
        (Optim(name="no.such.module:X"), "cannot be imported"),
        (Optim(name="collections:OrderedDict"), "is not a torch optimizer"),
        (Optim(name="torch.optim:LBFGS"), "closure"),
        (Optim(name="adam", momentum=0.9), "optim.momentum does not apply to adam"),
        (Optim(name="gd", momentum=0.9), "optim.momentum does not apply to gd"),
        (Optim(name="sgd", betas=(0.9, 0.99), eps=1e-8), "optim.betas and optim.eps do not apply"),
        (Optim(name="sgd", args={"colour": 1}), "optim.args.colour does not apply"),
        (Optim(name="nesterov", args={"dampening": 0.5}), "does not accept its settings"),
    ],
)
def test_what_does_not_fit_is_refused(settings: Optim, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_optimizer(parameters(), settings, lr=0.1)


def test_learning_rate_scaling() -> None:
    settings = {rule: Optim(lr=0.1, lr_scaling=rule, base_batch=256) for rule in ("none", "linear", "sqrt")}
    assert peak_lr(settings["none"], 1024) == 0.1
    assert peak_lr(settings["linear"], 1024) == pytest.approx(0.4)
    assert peak_lr(settings["sqrt"], 1024) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedules_rise_to_one_and_never_rise_again(name: str, warmup: int) -> None:
    schedule = Schedule.model_validate({"name": name, "warmup": warmup, "final": 0.1})
    values = [factor(schedule, step, 100) for step in range(100)]
    peak = max(warmup - 1, 0)
    assert values[peak] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(values[: peak + 1]))
    assert all(a >= b for a, b in pairwise(values[peak:]))
    if name in ("linear", "cosine"):
        assert values[-1] == pytest.approx(0.1)


def test_schedule_formulas() -> None:
    step = Schedule(name="step", every=10, gamma=0.5, warmup=4)
    assert [factor(step, at, 100) for at in (3, 4, 13, 14, 24)] == [1.0, 1.0, 1.0, 0.5, 0.25]
    assert factor(Schedule(name="inverse_sqrt", warmup=4), 15, 100) == pytest.approx(0.5)
    assert factor(Schedule(name="cosine"), 5, 11) == pytest.approx(0.5)
    assert math.isclose(factor(Schedule(name="linear", warmup=2), 3, 6), 0.5)


def test_a_run_of_one_step_has_a_factor() -> None:
    for name in ("constant", "linear", "cosine", "inverse_sqrt"):
        assert factor(Schedule.model_validate({"name": name}), 0, 1) == 1.0
