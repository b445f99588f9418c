"""Pipelines without ranks: the order of a stage's work, how layers are shared out, what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harness.batch import plan_of
from harness.checkpoint.comm import Single
from harness.config import Config
from harness.errors import ConfigError, Unavailable
from harness.parallel.pipeline import balanced, check, schedule
from harness.parallel.spread import make_model
from harness.parallel.wire import Wire
from harness.seeds import Draws
from harness.task import Task
from harness.world import World


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 20))
def test_every_stage_takes_each_micro_batch_once_and_none_waits_for_ever(stages: int, passes: int) -> None:
    orders = [list(schedule(stage, stages, passes)) for stage in range(stages)]
    for stage, order in enumerate(orders):
        held = peak = 0
        for way in ("forward", "backward"):
            assert [number for what, number in order if what == way] == list(range(passes))
        for what, _ in order:
            held += 1 if what == "forward" else -1
            peak = max(peak, held)
        assert peak <= stages - stage, "what a stage holds at once"
    done: set[tuple[int, str, int]] = set()
    while any(orders):
        ready = [
            stage
            for stage, order in enumerate(orders)
            if order
            and (
                (order[0][0] == "forward" and (stage == 0 or (stage - 1, "forward", order[0][1]) in done))
                or (order[0][0] == "backward" and (stage == stages - 1 or (stage + 1, "backward", order[0][1]) in done))
            )
        ]
        assert ready, "stages wait for each other"
        for stage in ready:
            done.add((stage, *orders[stage].pop(0)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_layers_are_shared_out_as_evenly_as_can_be(weights: list[int], parts: int) -> None:
    if parts > len(weights):
        with pytest.raises(ConfigError, match=f"use at most parallel.pipeline={len(weights)}"):
            balanced(weights, parts)
        return
    runs = balanced(weights, parts)
    assert len(runs) == parts and all(runs)
    assert [number for run in runs for number in run] == list(range(len(weights)))
    ends = [(0, *middle, len(weights)) for middle in combinations(range(1, len(weights)), parts - 1)]
    best = min(max(sum(weights[a:b]) for a, b in pairwise(cut)) for cut in ends)
    assert max(sum(weights[number] for number in run) for run in runs) == best


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class Extra(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (tied(), "0.weight is used by stages 0 and 1"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "stage 1 of the pipeline has no parameters to train"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1 is a batch normalization"),
        (Extra(), "scale is in none of the layers"),
    ],
    ids=["tied", "empty", "norm", "extra"],
)
def test_models_that_cannot_lie_on_several_ranks_are_refused(model: nn.Sequential, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(model, list(model)[:2], [range(1), range(1, 2)])


def test_a_task_whose_layers_are_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Task does not say which\n .*method sequence\(model\)"):
        Task().sequence(nn.Linear(1, 1))
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    assert Task().sequence(model) == list(model)


def test_without_mpi_there_is_no_pipeline() -> None:
    with pytest.raises(Unavailable, match=r"parallel\.pipeline needs MPI"):
        Wire(None, torch.device("cpu"))


def test_stages_times_parts_are_a_replica() -> None:
    run = {"name": "x", "task": {"name": "charlm"}, "train": {"steps": 1, "global_batch": 12}}
    config = Config.model_validate({**run, "parallel": {"model": 2, "pipeline": 3}})
    plan = plan_of(config, 12)
    assert (plan.replicas, plan.each, plan.share(1)) == (2, 6, (6, 12))
    with pytest.raises(ConfigError, match="8 ranks cannot be cut into replicas of 6 ranks"):
        plan_of(config, 8)
    for changes, told in (({"horovod": {"op": "adasum"}}, "adasum"), ({"optim": {"name": "torch.optim:Muon"}}, "Muon")):
        with pytest.raises(ValueError, match=rf"does not go with .*{told}"):
            Config.model_validate({**run, **changes, "parallel": {"pipeline": 2}})


def test_what_a_layer_draws_depends_on_its_number_and_not_on_the_others() -> None:
    """Nor on what was drawn meanwhile; evaluations draw as torch does."""
    twice = nn.Dropout(0.5)
    layers = [nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0.5), twice, twice]
    draws, x = Draws(layers), torch.ones(64)
    draws.key = 1, 2, 3
    first, second, third, fourth, fifth = [layer(x) for layer in layers]
    masks = torch.stack([first, second, third, fourth, fifth]).unique(dim=0)
    assert len(masks) == 5, "all draw their own"
    torch.rand(5)
    assert torch.equal(layers[2](x), third) and torch.equal(layers[1](x), second)
    draws.key = 1, 2, 4
    assert not torch.equal(layers[1](x), second)
    layers[1].eval()
    state = torch.get_rng_state()
    assert torch.equal(layers[1](x), x) and torch.equal(torch.get_rng_state(), state)
    draws.close()
    draws.key = 1, 2, 3
    assert not torch.equal(layers[0](x), first)
    torch.jit.script(layers[0])


def test_a_loss_that_calls_its_model_twice_draws_twice() -> None:
    """Only a task that says which its layers are gets draws by layer, where there is no pipeline."""

    class Twice(Task):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Dropout(0.5))

    class Named(Twice):
        def sequence(self, model: nn.Module) -> list[nn.Module]:
            return list(model)

    x = torch.ones(64)
    for task, alike in ((Twice(), False), (Named(), True)):
        spread = make_model(task, World(0, 1, 0, 1, ("here",), torch.device("cpu"), Single(), "none"))
        spread.draws.key = 1, 2, 3
        assert torch.equal(spread.model(x), spread.model(x)) == alike
