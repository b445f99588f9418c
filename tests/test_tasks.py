"""The built-in tasks by a plain loop: linear and digits learn, all add up over ranks, every config fits its task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training import ROOT, config, evaluate, train

from harness.batch import plan_batch
from harness.optim import make_optimizer
from harness.order import sample_seeds
from harness.resolve import resolve
from harness.task import BUILT_IN, make_task
from harness.tasks.digits import Digits
from harness.tasks.linear import TRAIN, Linear

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_linear_reaches_the_least_squares_solution() -> None:
    settings = config("linear")
    assert (settings.optim.name, settings.train.global_batch) == ("gd", TRAIN)
    task = Linear()
    model, losses = train(task, settings)
    assert evaluate(task, model)["distance"] < 1e-4
    design = np.column_stack([task.x[:TRAIN].numpy(), np.ones(TRAIN)])
    target = task.y[:TRAIN, 0].numpy()
    exact = np.linalg.lstsq(design, target, rcond=None)[0]
    assert np.allclose(model.weight.detach().numpy()[0], exact[:-1], atol=1e-4)
    assert losses[-1] == pytest.approx(np.mean((design @ exact - target) ** 2), rel=1e-6)
    untrained = task.model()
    assert evaluate(task, untrained)["distance"] == pytest.approx(1.0), "the measure is of the model at hand"


def test_digits_are_read() -> None:
    task = Digits()
    model, _ = train(task, config("digits"))
    assert evaluate(task, model)["accuracy"] >= 0.98
    assert evaluate(task, model, ranks=4, batch=7)["accuracy"] == pytest.approx(evaluate(task, model)["accuracy"])


def test_held_out_digits_are_not_trained_on() -> None:
    task = Digits()
    train_images = {image.numpy().tobytes() for image in task.data("train").images}
    held_out = [image.numpy().tobytes() in train_images for image in task.data("eval").images]
    assert len(task.data("train")) + len(task.data("eval")) == 1797
    assert not any(held_out)


def test_digits_are_moved_by_a_pixel_at_most() -> None:
    data = Digits().data("train")
    ids = np.zeros(64, np.int64)
    images, labels = data.batch(ids, sample_seeds(0, 0, 64))
    padded = torch.nn.functional.pad(data.images[0, 0], (1, 1, 1, 1))
    allowed = {padded[y : y + 8, x : x + 8].numpy().tobytes() for y in range(3) for x in range(3)}
    assert {image.numpy().tobytes() for image in images[:, 0]} == allowed
    assert set(labels.tolist()) == {int(data.labels[0])}


SMALL: dict[str, tuple[str, ...]] = {
    "linear": (),
    "digits": (),
    "charlm": ("task.args.width=24", "task.args.heads=2", "task.args.layers=1", "task.args.limit=200000"),
    "rnn": ("task.args.width=24", "task.args.limit=200000"),
    "word2vec": ("task.args.limit=100000", "train.global_batch=64"),
}


@pytest.mark.parametrize("name", SMALL)
def test_ranks_add_up_to_the_same_training(name: str) -> None:
    settings = config(name, *SMALL[name])
    task = make_task(settings.task.name, settings.task.args)
    one, alone = train(task, settings, steps=4)
    for ranks in (2, 4):
        other, together = train(task, settings, ranks=ranks, steps=4)
        assert together == pytest.approx(alone, rel=1e-4)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)
        assert evaluate(task, one, ranks=ranks, batch=50) == pytest.approx(evaluate(task, one), rel=1e-5)
    again, same = train(task, settings, steps=4)
    assert same == alone
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_fits_its_task_and_1_2_and_4_ranks(path: Path) -> None:
    settings = resolve(path).config
    task = make_task(settings.task.name, settings.task.args)
    for ranks in (1, 2, 4):
        plan_batch(global_batch=settings.train.global_batch, ranks=ranks, micro_batch=settings.train.micro_batch)
    assert len(task.data("train")) >= settings.train.global_batch
    assert len(task.data("eval")) >= 4
    make_optimizer(task.parameters(task.model()), settings.optim, lr=settings.optim.lr)


def test_every_task_has_a_config() -> None:
    assert {resolve(path).config.task.name for path in CONFIGS} == set(BUILT_IN)
