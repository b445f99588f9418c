"""Layers that can be cut over the ranks of a group (tensor parallel), and the cut.

A task builds its model of these layers in place of torch's; a rank alone computes what torch's compute. With
`parallel.model: M` the harness cuts the model once it is built, so that initial values do not depend on M:

    mlp = Sequential(ColumnLinear(64, 256), ReLU(), RowLinear(256, 64))
    regions = cut(mlp, group)            # {"0.weight": Box((256, 64), (0, 0), (128, 64)), ...}

A column-parallel layer computes a part of the outputs from whole inputs, a row-parallel one whole outputs from a part
of the inputs: one after the other they need one sum forward and one backward. What lies between must treat elements,
or heads, one by one. After Shoeybi et al. 2019, arXiv:1909.08053.

What is not here: pipelines, and gradients over replicas (`update.py`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.checkpoint.shards import Box
from harness.errors import ConfigError
from harness.parallel.collectives import copied, gathered, greatest, summed
from harness.parallel.groups import ALONE, Group


class ColumnLinear(nn.Linear):
    """(..., in) -> (..., out / group): this rank's outputs. Weight (out / group, in), bias (out / group)."""

    cuts: ClassVar = {"weight": 0, "bias": 0}
    group: Group = ALONE
    label = ""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(copied(x, self.group, self.label))


def columns(x: Tensor, *layers: ColumnLinear) -> list[Tensor]:
    """What each of the layers makes of x, with one sum backward for all."""
    x = copied(x, layers[0].group, layers[0].label)
    return [F.linear(x, layer.weight, layer.bias) for layer in layers]


class RowLinear(nn.Linear):
    """(..., in / group), a column-parallel layer's outputs -> (..., out). Weight (out, in / group), bias (out)."""

    cuts: ClassVar = {"weight": 1}
    group: Group = ALONE
    label = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.group.size == 1:
            return super().forward(x)
        y = summed(F.linear(x, self.weight), self.group, self.label)
        return y if self.bias is None else y + self.bias


class VocabEmbedding(nn.Embedding):
    """int64 (...) -> (..., width), each rank has a part of the vocabulary. Weight (vocabulary / group, width)."""

    cuts: ClassVar = {"weight": 0}
    group: Group = ALONE
    label = ""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.group.size == 1:
            return super().forward(tokens)
        local, here = _here(tokens, self.weight.shape[0], self.group)
        return summed(F.embedding(local, self.weight) * here[..., None], self.group, self.label)


def cross_entropy(logits: Tensor, targets: Tensor, group: Group, name: str = "cross_entropy") -> Tensor:
    """The mean over samples of -log softmax(logits)[target], a scalar.

    logits: (samples, vocabulary / group), a column-parallel layer's outputs; targets: int64 (samples).
    """
    if group.size == 1:
        return F.cross_entropy(logits, targets)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    logits = logits - greatest(logits.detach().amax(-1), group, f"{name}/max")[:, None]
    local, here = _here(targets, logits.shape[-1], group)
    target = logits.gather(-1, local[:, None])[:, 0] * here
    total, target = summed(torch.stack([logits.exp().sum(-1), target]), group, name)
    loss: Tensor = (total.log() - target).mean()
    return loss


def cut(model: nn.Module, group: Group) -> dict[str, Box]:
    """Keep this rank's part of every layer that can be cut: the region by parameter name, none for a rank alone.

    To be called before an optimizer has the parameters, with the same model on all ranks. Nothing is sent. Raises
    ConfigError for a layer that does not divide, and a model with nothing to cut or with what cannot be cut.
    """
    regions: dict[str, Box] = {}
    if group.size == 1:
        return regions
    parts: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for label, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{label} is a batch normalization, which does not go with parallel.model", hint="use another norm"
            )
        if getattr(layer, "sparse", False):
            raise ConfigError(f"{label} has sparse gradients, which do not go with parallel.model")
        if not isinstance(layer, (ColumnLinear, RowLinear, VocabEmbedding)):
            continue
        layer.group, layer.label = group, label
        for key, dimension in layer.cuts.items():
            parameter = getattr(layer, key)
            if parameter is None:
                continue
            name = f"{label}.{key}"
            if id(parameter) not in parts:
                regions[name] = box = region(tuple(parameter.shape), dimension, group, name)
                mine = parameter.detach().narrow(dimension, box.start[dimension], box.count[dimension])
                parts[id(parameter)] = nn.Parameter(mine.clone(), parameter.requires_grad)
            setattr(layer, key, parts[id(parameter)])
    if not regions:
        raise ConfigError(
            "parallel.model is more than 1, and the model has no layer that can be cut",
            hint="build it of the layers of harness.parallel.tensor, as task charlm does",
        )
    return regions


def region(shape: tuple[int, ...], dimension: int, group: Group, name: str) -> Box:
    """This rank's equal part of a tensor along a dimension. Raises ConfigError where there is none.

    >>> region((8, 6), 0, Group((4, 5), 1), "w")
    Box(shape=(8, 6), start=(4, 0), count=(4, 6))
    """
    length = shape[dimension]
    if length % group.size:
        raise ConfigError(
            f"parallel.model {group.size} does not divide the {length} rows or columns of {name}",
            hint=f"use a width that is a multiple of {group.size}",
        )
    start, count = [0] * len(shape), list(shape)
    count[dimension] = length // group.size
    start[dimension] = group.index * count[dimension]
    return Box(shape, tuple(start), tuple(count))


def dropout_mask(shape: tuple[int, ...], dimension: int, p: float, group: Group, like: Tensor) -> Tensor:
    """This rank's part, along a dimension of `shape`, of a mask of 0 and 1 / (1 - p).

    All ranks draw the whole mask, with generators in the same state, so that it does not depend on the group.
    """
    whole = list(shape)
    whole[dimension] *= group.size
    mask = torch.empty(whole, dtype=like.dtype, device=like.device).bernoulli_(1 - p)
    return mask.narrow(dimension, group.index * shape[dimension], shape[dimension]) / (1 - p)


def whole_logits(logits: Tensor, group: Group) -> Tensor:
    """(..., vocabulary / group) -> (..., vocabulary)."""
    return gathered(logits, group, "logits")


def _here(tokens: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor]:
    """Numbers among this rank's part of the vocabulary, 0 for those of others; which are its own."""
    local = tokens - group.index * count
    here = (local >= 0) & (local < count)
    return local * here, here
