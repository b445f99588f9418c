"""ResNets: of the published size, they learn; images come from HDF5 files, cut and mirrored, or are synthetic."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from training import config, evaluate, train

from harness.batch import plan_batch
from harness.data import start_forkserver, train_batches
from harness.errors import ConfigError, DataError, InputMissing
from harness.order import Order, sample_seeds
from harness.task import make_task
from harness.tasks.resnet import Crop, ResNet


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (50, 25_557_032)])
def test_resnets_have_the_published_size(depth: int, parameters: int) -> None:
    """The numbers of parameters of the networks of He et al. 2015, as torchvision has them."""
    with torch.device("meta"):
        model = ResNet(depth=depth, classes=1000, size=224).model()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_residual_blocks_begin_as_the_identity() -> None:
    torch.manual_seed(0)
    model = ResNet(width=4, size=32).model().eval()
    block = model.stages[1]
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_resnet_learns_synthetic_images() -> None:
    task = ResNet(width=8, size=16, classes=4, samples=256)
    settings = config("resnet", "train.steps=40", "train.global_batch=32")
    model, losses = train(task, settings)
    assert losses[0] == pytest.approx(math.log(4), rel=0.3)
    assert evaluate(task, model)["accuracy"] > 0.9


def test_synthetic_images_are_those_of_the_sample() -> None:
    task = ResNet(size=20, samples=100)
    data, held_out = task.data("train"), task.data("eval")
    images, labels = data.batch(np.array([3, 13, 3]), sample_seeds(0, 0, 3))
    assert images.shape == (3, 3, 20, 20)
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], images[2])
    assert labels.tolist() == [3, 3, 3], "of ten classes"
    other = data.batch(np.array([4]), sample_seeds(0, 0, 1))[0][0].float()
    alike, unlike = ((images[0].float() - image).abs().mean() for image in (images[1].float(), other))
    assert alike < unlike, "images of a class are alike"
    parts = [part.batch(np.arange(len(part)), sample_seeds(0, 0, len(part)))[0] for part in (data, held_out)]
    everything = torch.cat(parts)
    assert len(torch.unique(everything, dim=0)) == 105, "nothing held out is trained on"


@pytest.mark.parametrize("order", ["last", "first"])
def test_resnet_reads_hdf5(order: str, tmp_path: Path) -> None:
    numbers = np.arange(40, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None, None], (40, 3, 12, 10) if order == "first" else (40, 12, 10, 3))
    for part in range(2):
        with h5py.File(tmp_path / f"{part}.h5", "w") as file:
            file["images"], file["labels"] = images[part * 20 : part * 20 + 20], numbers[part * 20 : part * 20 + 20] % 4
    start_forkserver()
    task = make_task("resnet", {"images": str(tmp_path / "*.h5"), "size": 8, "classes": 4, "width": 4})
    train_data, held_out = task.data("train"), task.data("eval")
    assert (len(train_data), len(held_out)) == (38, 2)
    plan = plan_batch(global_batch=4, ranks=1, micro_batch=None)
    stream = train_batches(train_data, Order(38, seed=0), plan, replica=0, start_step=0, stop_step=9, seed=0, workers=1)
    for batch in stream:
        pictures, labels = batch.data
        assert pictures.shape == (4, 3, 8, 8)
        assert pictures[:, 0, 0, 0].tolist() == batch.ids.tolist()
        assert labels.tolist() == [number % 4 for number in batch.ids]
    assert held_out.batch(np.array([1]), sample_seeds(0, 0, 1))[0][0, 0, 0, 0] == 39
    assert task.loss(task.model(), batch.data).item() > 0


def test_crops_are_anywhere_and_mirrored() -> None:
    picture = torch.arange(3 * 6 * 5, dtype=torch.uint8).reshape(1, 3, 6, 5)
    count = 400
    many = picture.expand(count, 3, 6, 5)
    seeds = sample_seeds(0, 0, count)
    cut, _ = Crop(4, 0, random=True)((many, torch.zeros(count)), seeds)
    expected = {
        (part.flip(2) if mirrored else part).numpy().tobytes()
        for y in range(3)
        for x in range(2)
        for part in [picture[0, :, y : y + 4, x : x + 4].contiguous()]
        for mirrored in (False, True)
    }
    assert {image.numpy().tobytes() for image in cut} == expected
    channels_last, _ = Crop(4, 0, random=True)((many.permute(0, 2, 3, 1), torch.zeros(count)), seeds)
    assert torch.equal(channels_last, cut)
    centre, _ = Crop(4, 0, random=False)((picture, torch.zeros(1)), seeds[:1])
    assert torch.equal(centre[0], picture[0, :, 1:5, 0:4])
    wide, _ = Crop(8, 2, random=False)((picture, torch.zeros(1)), seeds[:1])
    assert wide[0, :, 0].sum() == 0, "black around it"


def test_resnet_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="depth is 34"):
        ResNet(depth=34)
    with pytest.raises(ConfigError, match="at least 1"):
        ResNet(classes=0)
    with pytest.raises(InputMissing):
        ResNet(images=str(tmp_path / "gone.h5")).data("train")
    with h5py.File(tmp_path / "float.h5", "w") as file:
        file["images"], file["labels"] = np.zeros((4, 8, 8, 3), "f4"), np.zeros(4, "i8")
    with pytest.raises(DataError, match="images are float32"):
        ResNet(images=str(tmp_path / "float.h5")).data("train")
    with h5py.File(tmp_path / "small.h5", "w") as file:
        file["images"], file["labels"] = np.zeros((4, 8, 8, 3), "u1"), np.zeros(4, "i8")
    with pytest.raises(ConfigError, match="does not fit into the images"):
        ResNet(images=str(tmp_path / "small.h5"), size=9).data("train")
    assert len(ResNet(images=str(tmp_path / "small.h5"), size=9, pad=1).data("train")) == 3
