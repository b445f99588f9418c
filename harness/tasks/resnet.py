"""ResNet-18 and ResNet-50 on images in HDF5 files, or on synthetic images for throughput.

    task: {name: resnet, args: {depth: 50, images: /data/train-*.h5, held_out: /data/val.h5, classes: 1000, size: 224}}

A file holds `images`, uint8 (n, height, width, channels) or (n, channels, height, width), and `labels`, integers (n,).
He et al. 2015, arXiv:1512.03385; as in Goyal et al. 2017 the last normalisation of each residual begins at zero.
BatchNorm sees one rank's micro batch, as is usual under Horovod: results depend a little on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import ConfigError, DataError
from harness.hdf5data import Hdf5Dataset
from harness.order import Ids, Seeds, uniform
from harness.task import Split, Task

Pair = tuple[Tensor, Tensor]
"""Images uint8 (samples, 3, size, size), labels int64 (samples,)."""

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class ResNet(Task):
    """Images from `images` and `held_out` (None: the last 5 % of `images`), or `samples` synthetic ones.

    Training takes a random `size` x `size` part of each image, after `pad` black pixels are put around it, and mirrors
    every other one; evaluation takes the centre. `small` keeps the resolution in the first layers, as is done for
    images of 32 x 32 pixels; unset, it depends on `size`.
    """

    def __init__(
        self,
        depth: int = 18,
        classes: int = 10,
        size: int = 32,
        width: int = 64,
        small: bool | None = None,
        images: str | list[str] | None = None,
        held_out: str | list[str] | None = None,
        pad: int = 0,
        samples: int = 4096,
    ) -> None:
        if depth not in BLOCKS:
            raise ConfigError(f"task.args.depth is {depth}", hint="use 18 or 50")
        if min(classes, size, width, samples) < 1 or pad < 0:
            raise ConfigError("task.args: classes, size, width and samples are at least 1, pad at least 0")
        self.depth, self.classes, self.size, self.width, self.pad = depth, classes, size, width, pad
        self.small = size < 64 if small is None else small
        self.images, self.held_out, self.samples = images, held_out, samples

    def model(self) -> nn.Module:
        return Net(BLOCKS[self.depth], self.depth >= 50, self.classes, self.width, self.small)

    def data(self, split: Split) -> Any:
        train = split == "train"
        if self.images is None:
            count = max(self.samples // 20, 1)
            first, samples = (count, self.samples) if train else (0, count)
            return Synthetic(first, samples, self.size, self.classes)
        paths = self.images if train or self.held_out is None else self.held_out
        files = Hdf5Dataset(paths, ("images", "labels"), transform=Crop(self.size, self.pad, train))
        shape, dtype = files.shapes["images"]
        if len(shape) != 3 or dtype != np.uint8 or 3 not in (shape[0], shape[-1]) or files.shapes["labels"][0] != ():
            raise DataError(
                f"{files.paths[0]}: images are {dtype} {shape}, labels {files.shapes['labels'][0]}",
                hint="images are uint8 (n, height, width, 3) or (n, 3, height, width), labels are numbers (n,)",
            )
        if min(sorted(shape)[1:]) + 2 * self.pad < self.size:
            raise ConfigError(
                f"task.args.size {self.size} does not fit into the images, {shape}", hint="use less, or task.args.pad"
            )
        if self.held_out is not None:
            return files
        boundary = len(files) - max(len(files) // 20, 1)
        return Part(files, 0, boundary) if train else Part(files, boundary, len(files))

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, batch: Pair) -> Mapping[str, Tensor]:
        logits = model(batch[0])
        right = (logits.argmax(1) == batch[1]).float().mean()
        return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": right}


@dataclass(frozen=True)
class Synthetic:
    """Images that cost next to nothing: noise, seeded by the sample's number, over a pattern for its class."""

    first: int
    samples: int
    size: int
    classes: int

    def __len__(self) -> int:
        return self.samples

    def batch(self, ids: Ids, seeds: Seeds) -> Pair:
        labels = ids % self.classes
        shape = (3, self.size, self.size)
        noise = np.stack([_bytes(1, self.first + int(number), shape) for number in ids])
        patterns = np.stack([_bytes(2, int(label), (3, 4, 4)) for label in range(self.classes)])
        rows = np.arange(self.size) * 4 // self.size
        pattern = patterns[labels][:, :, rows][:, :, :, rows]
        return torch.from_numpy(noise // 2 + pattern // 2), torch.from_numpy(labels)


def _bytes(key: int, number: int, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    count = int(np.prod(shape))
    random = np.random.Philox(key=np.array([key, number], np.uint64)).random_raw(-(-count // 8))
    return random.astype("<u8").view(np.uint8)[:count].reshape(shape)


@dataclass(frozen=True)
class Part:
    """Samples [start, stop) of a data set."""

    whole: Hdf5Dataset
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def batch(self, ids: Ids, seeds: Seeds) -> Any:
        return self.whole.batch(ids + self.start, seeds)


@dataclass(frozen=True)
class Crop:
    """Cut (samples, 3, size, size) out of images of either memory order: anywhere and mirrored, or the centre."""

    size: int
    pad: int
    random: bool

    def __call__(self, batch: Pair, seeds: Seeds) -> Pair:
        images, labels = batch
        if images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        if self.pad:
            images = F.pad(images, (self.pad,) * 4)
        rest = np.array(images.shape[2:]) - self.size
        draws = uniform(seeds, 3) if self.random else np.full((len(seeds), 3), 0.5)
        corners = (draws[:, :2] * (rest + self.random)).astype(int)
        out = torch.empty(len(images), 3, self.size, self.size, dtype=torch.uint8)
        for number, (y, x) in enumerate(corners):
            part = images[number, :, y : y + self.size, x : x + self.size]
            out[number] = part.flip(2) if self.random and draws[number, 2] < 0.5 else part
        return out, labels.long()


class Net(nn.Module):
    """uint8 images (samples, 3, height, width) -> logits (samples, classes)."""

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, classes: int, width: int, small: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Identity() if small else nn.MaxPool2d(3, 2, 1),
        )
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage and number == 0 else 1
                stages.append(Residual(channels, width * 2**stage, stride, bottleneck))
                channels = width * 2**stage * (4 if bottleneck else 1)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = (images.to(self.head.weight.dtype) / 255 - 0.45) / 0.225  # mean and deviation of natural images, roughly
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


class Residual(nn.Module):
    """relu(shortcut(x) + convolutions(x)): two of 3 x 3, or 1 x 1, 3 x 3, 1 x 1 with four times the channels."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = width * 4 if bottleneck else width
        if bottleneck:
            body = [*_normed(channels, width, 1), nn.ReLU(), *_normed(width, width, 3, stride), nn.ReLU()]
            body += _normed(width, out, 1)
        else:
            body = [*_normed(channels, width, 3, stride), nn.ReLU(), *_normed(width, out, 3)]
        nn.init.zeros_(next(body[-1].parameters()))  # the last normalisation's weight: the block begins as the identity
        self.body = nn.Sequential(*body)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_normed(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.body(x))


def _normed(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]
