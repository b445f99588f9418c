"""A step's micro batches, forward and backward: how a rank takes them that computes its losses by itself.

What is not here: a rank that has some of the layers (`parallel/pipeline.py`), which takes them in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch

from harness.data import Batch, to_device

if TYPE_CHECKING:
    from harness.job import Job

Passes: TypeAlias = "Callable[[Job, Iterator[Batch]], list[torch.Tensor]]"
"""Takes `plan.passes` micro batches and adds their gradients; the losses, scalars, the same on all ranks of a replica.

Collective in the replica."""


def one_by_one(job: Job, batches: Iterator[Batch]) -> list[torch.Tensor]:
    """Each micro batch forward and backward before the next."""
    losses = []
    assert job.clock.done is not None
    for number in range(job.plan.passes):
        job.spread.draws.key = job.config.seed, job.clock.done, job.world.replica, number
        with job.clock("data"):
            batch = next(batches)
            data = to_device(batch.data, job.world.device)
        with job.clock("forward/backward"):
            with job.update.autocast():
                loss = job.task.loss(job.model, data)
            if not job.plan.even:
                loss = loss * job.plan.weight(batch.samples)
            job.update.backward(loss)
        losses.append(loss.detach())
    return losses
