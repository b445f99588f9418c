"""The batch arithmetic: a fixed global batch, cut over ranks, accumulation passes and samples. Pure.

The global batch is part of the mathematics of a run, the number of ranks is not: the same config gives the same
gradients on 1 or 64 ranks, with as many accumulation passes as it takes.

>>> plan_batch(global_batch=512, ranks=4, micro_batch=16)
BatchPlan(global_batch=512, ranks=4, passes=8, micro_batch=16)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch = ranks * passes * micro_batch` samples per optimizer step."""

    global_batch: int
    ranks: int
    passes: int
    micro_batch: int

    @property
    def per_rank(self) -> int:
        """Samples each rank contributes to one step."""
        return self.passes * self.micro_batch

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {_count(self.ranks, 'rank')} x {self.passes} accumulation"
            f" x {_count(self.micro_batch, 'sample')}"
        )


def plan_batch(*, global_batch: int, ranks: int, micro_batch: int | None) -> BatchPlan:
    """Cut a global batch. `micro_batch` is the most samples a rank takes at once (None: all of its share).

    Raises ConfigError, naming the nearest batches that fit, when the batch does not divide.
    """
    if ranks < 1 or global_batch < 1 or (micro_batch is not None and micro_batch < 1):
        raise ConfigError("the global batch, the micro batch and the number of ranks are at least 1")
    if global_batch % ranks:
        raise ConfigError(
            f"train.global_batch {global_batch} does not divide by {_count(ranks, 'rank')}",
            hint=_nearest(global_batch, ranks, micro_batch) + _ranks_that_fit(global_batch, ranks, micro_batch),
        )
    per_rank = global_batch // ranks
    micro = per_rank if micro_batch is None else min(micro_batch, per_rank)
    if per_rank % micro:
        divisors = _divisors(per_rank)
        below, above = max(d for d in divisors if d < micro), min(d for d in divisors if d > micro)
        raise ConfigError(
            f"train.micro_batch {micro} does not divide the {_count(per_rank, 'sample')} that each of"
            f" {_count(ranks, 'rank')} takes of the global batch {global_batch}",
            hint=f"use train.micro_batch={below} or {above}; or {_nearest(global_batch, ranks, micro)}",
        )
    return BatchPlan(global_batch, ranks, per_rank // micro, micro)


def _nearest(global_batch: int, ranks: int, micro_batch: int | None) -> str:
    """The nearest global batches that fit: a rank takes a multiple of the micro batch, or anything smaller than it."""
    micro, share = micro_batch or 1, global_batch // ranks
    below = share // micro * micro if share >= micro else share
    above = -(-(share + 1) // micro) * micro if share + 1 >= micro else share + 1
    return "use train.global_batch=" + " or ".join(str(number * ranks) for number in (below, above) if number)


def _ranks_that_fit(global_batch: int, ranks: int, micro_batch: int | None) -> str:
    fits = [n for n in _divisors(global_batch) if micro_batch is None or _fits(global_batch // n, micro_batch)]
    near = [max((n for n in fits if n < ranks), default=0), min((n for n in fits if n > ranks), default=0)]
    return "; or " + " or ".join(_count(n, "rank") for n in near if n)


def _fits(share: int, micro_batch: int) -> bool:
    return share % min(micro_batch, share) == 0


def _divisors(number: int) -> list[int]:
    """All divisors of a number up to 10**12, and of a larger one those that need no search beyond 10**6."""
    small = [d for d in range(1, min(math.isqrt(number), 10**6) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
