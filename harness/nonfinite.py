"""A loss or gradient that is not finite: skip the step, or stop with the step and the samples named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import InternalError
from harness.rundir import write_json

if TYPE_CHECKING:
    import torch

    from harness.job import Job

SKIPS_IN_A_ROW = 100
"""So many skipped steps in a row end the run: nothing is being learned."""
HINT = "a lower optim.lr or train.clip_norm may help; train.nonfinite=skip goes on without such steps"


def handle_nonfinite(job: Job, step: int, losses: list[torch.Tensor], skipped: int) -> None:
    """Every rank is here for the same step, since all have the same reduced gradient. Collective where it stops.

    `step`: as people count, from 1.

    Ranks that take steps of their own (`Update.together` is false) come here alone, and end alone.
    """
    policy = job.config.train.nonfinite
    if policy == "ignore":
        return
    if not job.update.together:
        _handle_alone(job, step, losses, skipped)
        return
    values = [str(told).split() for told in job.world.comm.all_gather(" ".join(str(float(x)) for x in losses))]
    begin = (step - 1) * job.plan.global_batch
    ids = job.order.ids(begin, begin + job.plan.global_batch)
    shares = [job.plan.share(job.world.groups.grid.place(rank).replica) for rank in range(job.world.size)]
    culprits = {
        rank: ids[slice(*shares[rank])].tolist()
        for rank, told in enumerate(values)
        if any(loss in ("nan", "inf", "-inf") for loss in told)
    }
    overflow = job.update.scaler is not None and not culprits  # fp16: the scaler looks for its scale
    if (policy == "skip" or overflow) and skipped < SKIPS_IN_A_ROW:
        job.sinks.say(f"step {step}: the gradient is not finite, skipped on all ranks")
        return
    report = job.run.root / f"nonfinite-step-{step}.json"
    if job.world.is_root:
        write_json(report, {"step": step, "losses": values, "ids": ids.tolist(), "ids_by_rank": culprits})
    what = "the gradient is not finite, though every loss is"
    if culprits:
        told = ", ".join(f"{' '.join(values[rank])} on rank {rank}" for rank in list(culprits)[:8])
        what = f"the loss is not finite ({told})"
    shown = next(iter(culprits.values()), ids.tolist())[:10]
    raise InternalError(
        f"step {step}: {what}; samples {', '.join(map(str, shown))}, ...: all are in {report}"
        + (f"; {skipped} steps in a row" if skipped > 1 else ""),
        hint=HINT,
    )


def _handle_alone(job: Job, step: int, losses: list[torch.Tensor], skipped: int) -> None:
    """Not collective: the error of one rank ends the run, and names the rank."""
    if job.config.train.nonfinite == "skip" and skipped < SKIPS_IN_A_ROW:
        print(f"step {step}: this rank's gradient is not finite, skipped here", flush=True)
        return
    begin = (step - 1) * job.plan.global_batch
    ids = job.order.ids(*(begin + at for at in job.plan.share(job.world.replica))).tolist()
    values = ", ".join(str(float(loss)) for loss in losses[:8])
    raise InternalError(
        f"step {step}: the loss ({values}) or its gradient is not finite on rank {job.world.rank}; samples"
        f" {', '.join(map(str, ids[:10]))}{', ...' if len(ids) > 10 else ''}"
        + (f"; {skipped} steps in a row" if skipped > 1 else ""),
        hint=HINT,
    )
