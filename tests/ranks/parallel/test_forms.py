"""The same run as replicas of one, two and four ranks: the same losses, and checkpoints that fit each other.

Curves and run directories are left in HARNESS_OUT for `tests/test_parallel.py`, which starts 4, then 2, then 1 rank.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import OUT, StopAt, directory, finish, records, settings, start, stop_at

from harness.checkpoint import latest, open_checkpoint
from harness.checkpoint.shards import Box, Region
from harness.errors import ConfigError, Stopped
from harness.job import Job
from harness.loop import restore, train
from harness.tasks.charlm import CharLM
from harness.world import World

Regroup = Callable[..., World]
CHANGES: dict[str, Any] = {
    "task.args": {
        "text": str(Path(__file__).resolve().parents[3] / "harness" / "loop.py"),
        "block": 16,
        "layers": 2,
        "width": 16,
        "heads": 4,
    },
    "train.micro_batch": 4,
    "train.clip_norm": 0.5,
    "train.ema": 0.9,
}
FORMS = [{"model": 1}, {"model": 2}, {"model": 4}, {"pipeline": 2}, {"model": 2, "pipeline": 2}]
PAIRS = [(1, 0), (1, 2), (2, 4), (4, 3)]
"""Which form goes on from what which other one saved."""


@pytest.fixture(autouse=True)
def _silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred letters, each of several collectives, take long on a busy machine."""
    monkeypatch.setattr(CharLM, "report", lambda task, model: None)


def forms(world: World) -> Iterator[dict[str, int]]:
    return (form for form in FORMS if world.size % math.prod(form.values()) == 0)


def label(form: dict[str, int]) -> str:
    return "-".join(f"{key}{value}" for key, value in form.items())


def configured(path: Path, form: dict[str, int], **changes: Any) -> Any:
    return settings("charlm", path, **{**CHANGES, "parallel": form, **changes})


def parameters(job: Job) -> dict[str, np.ndarray]:
    """Parameters as this rank has them."""
    return {name: parameter.detach().numpy().copy() for name, parameter in job.model.named_parameters()}


def test_all_forms_have_the_same_losses_and_norms(world: World, regrouped: Regroup) -> None:
    curves = {}
    for form in forms(world):
        path = directory(world, f"form-{label(form)}")
        finish(start(regrouped(**form), configured(path, form)))
        lines = records(path, "train")
        curves[label(form)] = [line["loss"] for line in lines + records(path, "eval")]
        curves[label(form)] += [line["grad_norm"] for line in lines]
        assert all(line["network_bytes_per_sample"] > 0 for line in lines) or world.size == 1
    for curve in curves.values():
        np.testing.assert_allclose(curve, curves["model1"], rtol=1e-4)
    if world.is_root:
        (OUT / f"curve-{world.size}.json").write_text(json.dumps(curves["model1"]))


def test_dropout_for_a_comparison_by_the_number_of_replicas(world: World, regrouped: Regroup) -> None:
    """Replicas draw their own masks, the ranks of one the same: `tests/test_parallel.py` compares 1 x 4 with 1 x 1."""
    for form in forms(world):
        path = directory(world, f"dropout-{label(form)}")
        args = {**CHANGES["task.args"], "dropout": 0.3}
        here = regrouped(**form)
        finish(start(here, configured(path, form, **{"task.args": args, "train.steps": 4})))
        if world.is_root:
            curve = [line["loss"] for line in records(path, "train")]
            (OUT / f"dropout-{here.replicas}-{label(form)}.json").write_text(json.dumps(curve))


def test_a_run_stopped_and_resumed_in_its_form_is_the_same_by_bits(world: World, regrouped: Regroup) -> None:
    form = {1: FORMS[0], 2: FORMS[1], 4: FORMS[4]}[world.size]
    here = regrouped(**form)
    straight = start(here, configured(directory(world, "straight"), form))
    finish(straight)
    config = configured(directory(world, "resumed"), form)
    stop_at(here, config, 3)
    resumed = start(here, config)
    finish(resumed)
    for name, value in parameters(straight).items():
        assert np.array_equal(value, parameters(resumed)[name]), name


def stopped_run(world: World, here: World, path: Path, form: dict[str, int]) -> None:
    job = start(here, configured(path, form))
    object.__setattr__(job, "stop", StopAt(4))
    with pytest.raises(Stopped, match="step 4 of 8"):
        train(job)
    job.sinks.close()
    job.close()
    world.comm.barrier()


def test_what_one_form_saves_every_other_goes_on_from(world: World, regrouped: Regroup) -> None:
    """Every tensor is bit for bit what was saved; the run then ends with the losses of an undisturbed one."""
    curve = records(OUT / f"{world.size}-form-model1", "train")
    saved: dict[str, Path] = {}
    possible = list(forms(world))
    for saves, reads in [(FORMS[a], FORMS[b]) for a, b in PAIRS]:
        if saves not in possible or reads not in possible:
            continue
        if label(saves) not in saved:
            saved[label(saves)] = directory(world, f"from-{label(saves)}")
            stopped_run(world, regrouped(**saves), saved[label(saves)], saves)
        path = directory(world, f"from-{label(saves)}-to-{label(reads)}")
        if world.is_root:
            shutil.copytree(saved[label(saves)], path)
            (path / "config.yaml").unlink()  # it names the other directory
        world.comm.barrier()
        job = start(regrouped(**reads), configured(path, reads))
        assert restore(job) == 4
        assert_as_stored(job, path)
        train(job)  # restores again, the same
        job.sinks.close()
        job.close()
        world.comm.barrier()
        losses = [line["loss"] for line in records(path, "train") if line["step"] > 4]
        np.testing.assert_allclose(losses, [line["loss"] for line in curve if line["step"] > 4], rtol=1e-4)


def assert_as_stored(job: Job, path: Path) -> None:
    newest = latest(path / "checkpoints")
    assert newest is not None and job.ema is not None
    with open_checkpoint(newest) as stored:
        state = job.update.optimizer.state_dict()["state"]
        for number, (name, parameter) in enumerate(job.model.named_parameters()):
            for leaf, mine in (
                (f"model/{name}", parameter),
                (f"ema/{name}", job.ema.shadow[name]),
                (f"optimizer/{name}/exp_avg", state[number]["exp_avg"]),
            ):
                whole = stored.read(leaf)
                assert np.array_equal(held(whole, job.spread.regions.get(name)), mine.detach().numpy()), leaf


def held(whole: np.ndarray, region: Region | None) -> np.ndarray:
    if region is None:
        return whole
    if isinstance(region, Box):
        return whole[tuple(slice(a, a + n) for a, n in zip(region.start, region.count, strict=True))]
    assert region.elements in (0, whole.size), "a stage has all of a parameter, or nothing"
    return whole if region.elements else whole.reshape(-1)[:0]


def test_a_checkpoint_of_four_ranks_is_read_by_fewer(world: World, regrouped: Regroup) -> None:
    """The first job leaves a run of model 2 on 4 ranks; the jobs on 2 and on 1 rank go on from a copy of it."""
    path = OUT / "left"
    if world.size == 4:
        stopped_run(world, regrouped(model=2), path, {"model": 2})
        return
    form = {"model": world.size}
    job = start(regrouped(**form), configured(path, form, **{"train.steps": 6 if world.size == 2 else 8}))
    assert restore(job) == (4 if world.size == 2 else 6)
    finish(job)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("rnn", {}, "no layer that can be cut"),
        (
            "charlm",
            {"task.args": {"block": 16, "layers": 1, "width": 18, "heads": 3}},
            "does not divide task.args.heads 3",
        ),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    world: World, regrouped: Regroup, name: str, changes: dict[str, Any], told: str
) -> None:
    if world.size == 1:
        pytest.skip("one rank cuts nothing")
    form = {"model": 2}
    config = settings(name, directory(world, "refused"), parallel=form, **changes)
    with pytest.raises(ConfigError, match=told):
        start(regrouped(**form), config)


def test_generators_are_those_of_the_replica(world: World, regrouped: Regroup) -> None:
    from harness.seeds import seed_generators

    here = regrouped(model=2 if world.size > 1 else 1)
    seed_generators(1, 2, here.replica)
    drawn = world.comm.all_gather(float(torch.rand(())))
    assert len(set(map(str, drawn))) == here.replicas
    assert drawn[here.groups.model.ranks[0]] == drawn[world.rank]
