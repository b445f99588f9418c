"""What is decided about cut layers without another rank; their mathematics: `tests/ranks/parallel/`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.config import Config
from harness.errors import ConfigError
from harness.parallel.groups import ALONE, Group
from harness.parallel.tensor import ColumnLinear, RowLinear, cut

SECOND = Group((4, 5), 1)
"""A group as its second rank sees it. Nothing here is sent, so it needs no process set."""


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "no layer that can be cut"),
        (nn.Sequential(ColumnLinear(4, 6), nn.BatchNorm1d(6)), "1 is a batch normalization"),
        (nn.Sequential(ColumnLinear(4, 7)), "parallel.model 2 does not divide the 7 rows or columns of 0.weight"),
        (nn.Sequential(ColumnLinear(4, 4), nn.Embedding(4, 4, sparse=True)), "1 has sparse gradients"),
    ],
    ids=["plain", "norm", "odd", "sparse"],
)
def test_what_cannot_be_cut_is_refused(model: nn.Module, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cut(model, SECOND)


def test_a_cut_keeps_this_ranks_part_of_every_parameter() -> None:
    model = nn.Sequential(ColumnLinear(4, 6), nn.ReLU(), RowLinear(6, 4), nn.LayerNorm(4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert cut(model, ALONE) == {}
    regions = cut(model, SECOND)
    parts = {"0.weight": (slice(3, 6),), "0.bias": (slice(3, 6),), "2.weight": (slice(None), slice(3, 6))}
    assert regions.keys() == parts.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][parts.get(name, (slice(None),))])
        if name in regions:
            assert regions[name].shape == before[name].shape


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"horovod": {"op": "adasum"}}, "does not go with horovod.op=adasum"),
        ({"train": {"steps": 1, "global_batch": 8, "precision": "fp16"}}, "does not go with train.precision=fp16"),
        ({"optim": {"name": "torch.optim:Adafactor"}}, "does not go with optim.name=torch.optim:Adafactor"),
    ],
)
def test_what_does_not_go_with_a_cut_model_is_refused(changes: dict[str, object], told: str) -> None:
    run = {"name": "x", "task": {"name": "charlm"}, "train": {"steps": 1, "global_batch": 8}, **changes}
    Config.model_validate(run)
    with pytest.raises(ValueError, match=told):
        Config.model_validate({**run, "parallel": {"model": 2}})
