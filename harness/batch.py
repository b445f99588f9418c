"""The batch arithmetic: a fixed global batch, cut over replicas, accumulation passes and samples. Pure.

The global batch is part of the mathematics of a run, the number of ranks is not: the same config gives the same
gradients on 1 or 64 ranks, with as many accumulation passes as it takes. A replica is what takes samples of its own:
one rank, or `each` ranks that share one model (`parallel/groups.py`).

A batch that does not divide is a mistake, but for an elastic run, whose number of ranks nobody chooses: there some
replicas take a sample more than others, and `weight` makes the mean of their gradients the mean over the batch.

>>> plan_batch(global_batch=512, ranks=4, micro_batch=16)
BatchPlan(global_batch=512, replicas=4, passes=8, micro_batch=16, each=1)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from harness.config import Config
from harness.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch = replicas * passes * micro_batch` samples per optimizer step; fewer where it is uneven."""

    global_batch: int
    replicas: int
    passes: int
    micro_batch: int
    each: int = 1
    """Ranks of a replica."""

    @property
    def even(self) -> bool:
        """All micro batches have the same number of samples."""
        return self.replicas * self.passes * self.micro_batch == self.global_batch

    def share(self, replica: int) -> tuple[int, int]:
        """The positions [first, stop) of a replica within the global batch."""
        return self.global_batch * replica // self.replicas, self.global_batch * (replica + 1) // self.replicas

    def cuts(self, replica: int) -> list[tuple[int, int]]:
        """The same for each of its micro batches."""
        first, stop = self.share(replica)
        bounds = [first + (stop - first) * number // self.passes for number in range(self.passes + 1)]
        return list(itertools.pairwise(bounds))

    def weight(self, samples: int) -> float:
        """What the mean loss of a micro batch counts, against one of the average size; 1.0 where all are even."""
        return samples * self.passes * self.replicas / self.global_batch

    def __str__(self) -> str:
        most = _count(self.micro_batch, "sample")
        return (
            f"global batch {self.global_batch} = {_replicas(self.replicas, self.each)} x {self.passes} accumulation"
            f" x {most if self.even else f'at most {most}'}"
        )


def plan_of(config: Config, ranks: int, *, uneven: bool = False) -> BatchPlan:
    """How so many ranks share the global batch of a config. Raises ConfigError, naming what would fit."""
    if (servers := config.parallel.without_samples) >= ranks:
        raise ConfigError(
            f"{_count(ranks, 'rank')}, of which the parameter server takes {servers}: none is left to train",
            hint=f"start at least {servers + 1} ranks" + (", or set parallel.servers to less" if servers > 1 else ""),
        )
    return plan_batch(
        uneven=uneven or config.launch.elastic,
        global_batch=config.train.global_batch,
        ranks=ranks - servers,
        micro_batch=config.train.micro_batch,
        each=config.parallel.each,
    )


def length_field(config: Config) -> str:
    """The field that says how long a run is."""
    return "train.steps" if config.train.steps is not None else "train.epochs"


def plan_batch(
    *, global_batch: int, ranks: int, micro_batch: int | None, each: int = 1, uneven: bool = False
) -> BatchPlan:
    """Cut a global batch. `micro_batch` is the most samples a replica takes at once (None: all of its share).

    Raises ConfigError, naming the nearest numbers that fit, when ranks or batch do not divide; `uneven`: only where
    there are more replicas than samples.
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
    if uneven and global_batch >= replicas:
        return _uneven(global_batch, replicas, micro_batch, each)
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


def _uneven(global_batch: int, replicas: int, micro_batch: int | None, each: int) -> BatchPlan:
    """As even as it goes. Every replica has a sample in each pass, so a micro batch of 1 may become one of 2."""
    least, most = global_batch // replicas, -(-global_batch // replicas)
    passes = min(least, -(-most // min(micro_batch or most, most)))
    return BatchPlan(global_batch, replicas, passes, -(-most // passes), each)


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
