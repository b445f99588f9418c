"""Evaluation on all ranks: each sample once, exact sums and counts, one collective at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from harness.data import to_device
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.job import Job


@torch.no_grad()
def evaluate(job: Job) -> dict[str, float]:
    """Means over the whole evaluation set, by name; the averaged parameters are used where there are any.

    Collective: rank 0's buffers go to all ranks first (running statistics differ between ranks, and rank 0's are the
    ones a checkpoint holds), sums and counts are added at the end.
    """
    if job.eval_batches is None:
        return {}
    job.align_buffers("eval/buffers")
    job.model.eval()
    sums: dict[str, torch.Tensor] = {}
    count = 0
    with job.shown():
        for batch in job.eval_batches:
            with job.update.autocast():
                means = job.task.evaluate(job.spread.whole, to_device(batch.data, job.world.device))
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + mean.detach().double() * batch.samples
            count += batch.samples
        mine = {name: float(value) for name, value in sums.items()}
        speaks = job.world.groups.speaks  # all ranks of a replica have the same
        parts = job.world.comm.all_gather({"count": count if speaks else 0, "sums": mine if speaks else {}})
        means_of_all = combine(parts)
        # all ranks of a replica, as one alone cannot use a model that is cut over several
        if job.world.replica == 0 or job.world.is_root:
            means_of_all |= {name: float(x) for name, x in job.task.summarize(job.spread.whole, means_of_all).items()}
            if (text := job.task.report(job.spread.whole)) is not None:
                job.sinks.say(text)
    job.model.train()
    return means_of_all


def combine(parts: Sequence[Any]) -> dict[str, float]:
    """Means from every replica's `{"count": samples, "sums": {name: sum}}`. Pure. Raises HarnessError."""
    total = sum(int(part["count"]) for part in parts)
    if total == 0:
        raise HarnessError("the evaluation set gave no samples")
    every: list[Mapping[str, float]] = [part["sums"] for part in parts]
    names = sorted({name for sums in every for name in sums})
    return {name: _sum([sums.get(name, 0.0) for sums in every]) / total for name in names}


def _sum(values: Sequence[float]) -> float:
    # fsum does not depend on the order, but refuses infinities of both signs
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
