"""The batch arithmetic: a fixed global batch, cut over ranks, accumulation passes and samples. Pure.

The global batch is part of the mathematics of a run, the number of ranks is not: the same config gives the same
gradients on 1 or 64 ranks, with as many accumulation passes as it takes.

>>> plan_batch(global_batch=512, ranks=4, micro_batch=16)
BatchPlan(global_batch=512, ranks=4, passes=8, micro_batch=16)
"""

from __future__ import annotations

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
            hint=f"{_nearest('train.global_batch', global_batch, ranks)}, or {_ranks_that_divide(global_batch, ranks)}",
        )
    per_rank = global_batch // ranks
    micro = per_rank if micro_batch is None else min(micro_batch, per_rank)
    if per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        below = max((d for d in divisors if d < micro), default=1)
        above = min((d for d in divisors if d > micro), default=per_rank)
        raise ConfigError(
            f"train.micro_batch {micro} does not divide the {_count(per_rank, 'sample')} that each of"
            f" {_count(ranks, 'rank')} takes of the global batch {global_batch}",
            hint=f"use train.micro_batch={below} or {above},"
            f" or {_nearest('train.global_batch', global_batch, ranks * micro)}",
        )
    return BatchPlan(global_batch, ranks, per_rank // micro, micro)


def _nearest(name: str, value: int, divisor: int) -> str:
    below = value // divisor * divisor
    numbers = [number for number in (below, below + divisor) if number > 0]
    return f"use {name}=" + " or ".join(map(str, numbers))


def _ranks_that_divide(global_batch: int, ranks: int) -> str:
    fewer = max(n for n in range(1, ranks) if global_batch % n == 0)
    more = next((n for n in range(ranks + 1, global_batch + 1) if global_batch % n == 0), None)
    return f"{_count(fewer, 'rank')}" if more is None else f"{fewer} or {_count(more, 'rank')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
