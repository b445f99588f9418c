"""Forms of training and what they do not go together with: told when the config is read, all at once."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from harness.config import Config

RUN = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 8}}
SHARDS = {"parallel": {"optimizer_shards": "all"}}
LOCAL = {"parallel": {"average_every": 4}}
SERVER = {"parallel": {"strategy": "parameter_server"}}
FP16 = {"train": {"steps": 1, "global_batch": 8, "precision": "fp16", "ema": 0.9}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (LOCAL | {"horovod": {"op": "sum"}}, "average_every=4 averages parameters, not gradients: .* with horovod.op"),
        (LOCAL | {"horovod": {"compression": "fp16"}}, "does not go with horovod.compression"),
        (LOCAL | FP16, "does not go with train.precision=fp16 and train.ema"),
        (LOCAL | {"checkpoint": {"mode": "lazy"}}, "does not go with checkpoint.mode=lazy"),
        (LOCAL | {"launch": {"elastic": True}}, "does not go with launch.elastic"),
        (SHARDS | {"launch": {"elastic": True}}, "does not go with launch.elastic"),
        (SERVER | {"launch": {"elastic": True}}, "does not go with launch.elastic"),
        ({"parallel": {"average_every": 4, "model": 2}}, "average_every takes whole models"),
        (SERVER | {"horovod": {"op": "adasum"}}, "parameter_server has its own way .* does not go with horovod.op"),
        (SERVER | {"train": RUN["train"] | {"clip_norm": 1.0}}, "does not go with train.clip_norm"),
        (SERVER | {"optim": {"name": "mine:Muon"}}, "does not go with optim.name=mine:Muon"),
        ({"parallel": {"strategy": "parameter_server", "model": 2}}, "a form of its own: it does not go with model=2"),
        ({"parallel": {"staleness": 2}}, "servers and staleness need strategy"),
        ({"parallel": {"strategy": "parameter_server", "staleness": -1}}, "staleness"),
        ({"parallel": {"outer": {}}}, "outer needs average_every"),
        ({"parallel": {"average_every": 4, "optimizer_shards": "node"}}, "does not go with optimizer_shards=node"),
        (
            {"parallel": {"average_every": 4, "pipeline": 2}, "launch": {"hosts": "a:2", "hostfile": "h"}},
            "average_every takes whole models and optimizers: it does not go with pipeline=2",
        ),
        (
            {"parallel": {"pipeline": 2}, "horovod": {"op": "adasum"}, "train": RUN["train"] | {"clip_norm": 1.0}},
            "adasum cannot clip.*; parallel.model and parallel.pipeline give .* with horovod.op=adasum",
        ),
        (SHARDS | {"horovod": {"op": "adasum"}}, "optimizer_shards=all cuts parameters .* with horovod.op=adasum"),
        (SHARDS | {"optim": {"name": "torch.optim:Adafactor"}}, "does not go with optim.name=torch.optim:Adafactor"),
        (SHARDS | {"optim": {"name": "mine:Adam"}}, "does not go with optim.name=mine:Adam"),
        ({"parallel": {"average_every": 0}}, "greater than 0"),
    ],
)
def test_wrong_combinations(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Config.model_validate(RUN | changes)


def test_right_combinations() -> None:
    config = Config.model_validate(RUN | {"parallel": {"average_every": 4, "outer": {"lr": 0.5}}})
    assert config.parallel.local and config.parallel.outer is not None and config.parallel.outer.momentum == 0.9
    assert not Config.model_validate(RUN).parallel.local
    for name in ("momentum", "torch.optim:NAdam"):
        assert Config.model_validate(RUN | SHARDS | {"optim": {"name": name}}).parallel.optimizer_shards == "all"
