"""The batch arithmetic: a fixed global batch, cut over replicas, accumulation passes and samples. Pure.

The global batch is part of the mathematics of a run, the number of ranks is not: the same config gives the same
gradients on 1 or 64 ranks, with as many accumulation passes as it takes. A replica is what takes samples of its own:
one rank, or `each` ranks that share one model (`parallel/groups.py`).

>>> plan_batch(global_batch=512, ranks=4, micro_batch=16)
BatchPlan(global_batch=512, replicas=4, passes=8, micro_batch=16, each=1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harness.config import Config
from harness.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch = replicas * passes * micro_batch` samples per optimizer step."""

    global_batch: int
    replicas: int
    passes: int
    micro_batch: int
    each: int = 1
    """Ranks of a replica."""

    @property
    def per_replica(self) -> int:
        """Samples each replica contributes to one step."""
        return self.passes * self.micro_batch

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {_replicas(self.replicas, self.each)} x {self.passes} accumulation"
            f" x {_count(self.micro_batch, 'sample')}"
        )


def plan_of(config: Config, ranks: int) -> BatchPlan:
    """How so many ranks share the global batch of a config. Raises ConfigError, naming what would fit."""
    return plan_batch(
        global_batch=config.train.global_batch,
        ranks=ranks,
        micro_batch=config.train.micro_batch,
        each=config.parallel.model,
    )


def plan_batch(*, global_batch: int, ranks: int, micro_batch: int | None, each: int = 1) -> BatchPlan:
    """Cut a global batch. `micro_batch` is the most samples a replica takes at once (None: all of its share).

    Raises ConfigError, naming the nearest numbers that fit, when ranks or batch do not divide.
    """
    if ranks % each:
        near = " or ".join(str(number) for number in (ranks // each * each, -(-ranks // each) * each) if number)
        raise ConfigError(
            f"{_count(ranks, 'rank')} cannot be cut into replicas of {each} ranks (section parallel)",
            hint=f"start {near} ranks",
        )
    replicas = ranks // each
    if replicas < 1 or global_batch < 1 or (micro_batch is not None and micro_batch < 1):
        raise ConfigError("the global batch, the micro batch and the number of ranks are at least 1")
    if global_batch % replicas:
        raise ConfigError(
            f"train.global_batch {global_batch} does not divide by {_replicas(replicas, each)}",
            hint=_nearest(global_batch, replicas, micro_batch)
            + _ranks_that_fit(global_batch, replicas, micro_batch, each),
        )
    share = global_batch // replicas
    micro = share if micro_batch is None else min(micro_batch, share)
    if share % micro:
        divisors = _divisors(share)
        below, above = max(d for d in divisors if d < micro), min(d for d in divisors if d > micro)
        raise ConfigError(
            f"train.micro_batch {micro} does not divide the {_count(share, 'sample')} that each of"
            f" {_replicas(replicas, each)} takes of the global batch {global_batch}",
            hint=f"use train.micro_batch={below} or {above}; or {_nearest(global_batch, replicas, micro)}",
        )
    return BatchPlan(global_batch, replicas, share // micro, micro, each)


def _nearest(global_batch: int, replicas: int, micro_batch: int | None) -> str:
    """The nearest global batches that fit: a replica takes a multiple of the micro batch, or anything smaller."""
    micro, share = micro_batch or 1, global_batch // replicas
    below = share // micro * micro if share >= micro else share
    above = -(-(share + 1) // micro) * micro if share + 1 >= micro else share + 1
    return "use train.global_batch=" + " or ".join(str(number * replicas) for number in (below, above) if number)


def _ranks_that_fit(global_batch: int, replicas: int, micro_batch: int | None, each: int) -> str:
    fits = [n for n in _divisors(global_batch) if micro_batch is None or _fits(global_batch // n, micro_batch)]
    near = [max((n for n in fits if n < replicas), default=0), min((n for n in fits if n > replicas), default=0)]
    return "; or " + " or ".join(_count(n * each, "rank") for n in near if n)


def _fits(share: int, micro_batch: int) -> bool:
    return share % min(micro_batch, share) == 0


def _divisors(number: int) -> list[int]:
    """All divisors of a number up to 10**12, and of a larger one those that need no search beyond 10**6."""
    small = [d for d in range(1, min(math.isqrt(number), 10**6) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _replicas(number: int, each: int) -> str:
    return _count(number, "rank") if each == 1 else f"{_count(number, 'replica')} of {each} ranks"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
