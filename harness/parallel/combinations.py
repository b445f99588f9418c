"""What the forms of training do not go together with; looked at when a config is read.

>>> check_parallel(config)                                                              # doctest: +SKIP
['parallel.average_every=8 averages parameters, not gradients: it does not go with train.ema']
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.parallel.settings import ELEMENTWISE

if TYPE_CHECKING:
    from harness.config import Config


def check_parallel(config: Config) -> list[str]:
    """All that is in the way, as sentences."""
    found: list[str] = []
    if config.parallel.local:
        found += _clashes(
            f"parallel.average_every={config.parallel.average_every} averages parameters, not gradients",
            {
                "horovod.op": config.horovod.op != "average",
                "horovod.compression": config.horovod.compression != "none",
                "train.precision=fp16": config.train.precision == "fp16",
                "train.ema": config.train.ema is not None,
                "checkpoint.mode=lazy": config.checkpoint.mode == "lazy",
                "launch.elastic": config.launch.elastic,
            },
        )
    if config.parallel.strategy == "parameter_server":
        found += _clashes(
            "parallel.strategy=parameter_server has its own way to combine gradients, in slices",
            {
                "horovod.op": config.horovod.op != "average",
                "horovod.compression": config.horovod.compression != "none",
                "train.precision=fp16": config.train.precision == "fp16",
                "train.ema": config.train.ema is not None,
                "train.clip_norm": config.train.clip_norm is not None,
                "train.clip_value": config.train.clip_value is not None,
                "checkpoint.mode=lazy": config.checkpoint.mode == "lazy",
                "launch.elastic": config.launch.elastic,
                f"optim.name={config.optim.name}": not _elementwise(config.optim.name),
            },
        )
    if config.parallel.optimizer_shards != "none":
        found += _clashes(
            f"parallel.optimizer_shards={config.parallel.optimizer_shards} cuts parameters anywhere",
            {
                "horovod.op=adasum": config.horovod.op == "adasum",
                "launch.elastic": config.launch.elastic,
                f"optim.name={config.optim.name}": not _elementwise(config.optim.name),
            },
        )
    if config.parallel.each > 1:
        found += _clashes(
            "parallel.model and parallel.pipeline give each rank a part of the model",
            {
                "horovod.op=adasum": config.horovod.op == "adasum",
                "train.precision=fp16": config.train.precision == "fp16",
                "launch.elastic": config.launch.elastic,
                f"optim.name={config.optim.name}": not _elementwise(config.optim.name),
            },
        )
    return found


def _elementwise(optimizer: str) -> bool:
    """Whether it treats every element alike, so that parameters can be cut anywhere."""
    module, _, name = optimizer.rpartition(":")
    return not module or (module == "torch.optim" and name in ELEMENTWISE)


def _clashes(why: str, wrong: dict[str, bool]) -> list[str]:
    found = [name for name, holds in wrong.items() if holds]
    return [f"{why}: it does not go with {' and '.join(found)}"] if found else []
