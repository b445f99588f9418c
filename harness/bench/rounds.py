"""Measuring in rounds: contenders take turns, the slowest rank counts, and ratios are taken within a round.

A shared machine is fast in one minute and slow in the next one. Seconds of two contenders say little there; their ratio
within a round, as the median over the rounds, does. It knows nothing of what is measured.

>>> found = Rounds(({"a": 9.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 5.0, "b": 2.0}, {"a": 4.0, "b": 1.0}))
>>> str(found.ratio("a", "b")), found.first("a")
('3.00 (2.50 to 4.00)', 9.0)
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.checkpoint.comm import Comm
from harness.errors import InternalError

Seconds = Mapping[str, float]
"""By the name of what was measured."""


@dataclass(frozen=True)
class Contender:
    """Something to measure. `work` is given the number of the round, and is collective.

    It returns this rank's seconds by name; all ranks the same names. None: what the whole call takes, under `name`.
    """

    name: str
    work: Callable[[int], Seconds | None]


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of `count` values; nan where there are none."""

    median: float
    least: float
    most: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


@dataclass(frozen=True)
class Rounds:
    """The slowest rank's seconds by name, for each round. The first one warms up: it counts in `first` only."""

    table: tuple[Seconds, ...]

    def __contains__(self, name: str) -> bool:
        return any(name in one for one in self.table)

    def first(self, name: str) -> float:
        """Seconds in the first round; nan where it was not measured."""
        return self.table[0].get(name, math.nan)

    def seconds(self, *names: str) -> Spread:
        """Of several names: the least of them in each round."""
        return spread(value for one in self._counted() if (value := _least(one, names)) is not None)

    def ratio(self, name: str, *to: str) -> Spread:
        """`name` over `to`, of several the least, in rounds where both were measured: 2.0 is twice the time."""
        pairs = ((one.get(name), _least(one, to)) for one in self._counted())
        return spread(mine / other for mine, other in pairs if mine is not None and other)

    def _counted(self) -> Sequence[Seconds]:
        return self.table[1:]


def spread(values: Iterable[float]) -> Spread:
    """Of any values."""
    found = sorted(values)
    if not found:
        return Spread(math.nan, math.nan, math.nan, 0)
    return Spread(statistics.median(found), found[0], found[-1], len(found))


def run_rounds(
    contenders: Sequence[Contender],
    count: int,
    comm: Comm,
    *,
    told: Callable[[int, str], None] = lambda number, name: None,
) -> Rounds:
    """All contenders, `count` times after a first round. Collective; the result is the same on all ranks.

    They follow each other forwards and backwards in turn, as each leaves its traces to the next one (dirty pages, a
    full cache). `told` hears before each: number of the round, name.
    """
    table: list[dict[str, float]] = []
    for number in range(count + 1):
        table.append({})
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            told(number, contender.name)
            comm.barrier()
            began = time.perf_counter()
            mine = contender.work(number)
            table[-1] |= slowest({contender.name: time.perf_counter() - began} if mine is None else mine, comm)
    return Rounds(tuple(table))


def timed(work: Callable[[], object], comm: Comm) -> float:
    """This rank's seconds for something that all ranks begin together. Collective."""
    together(comm)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def together(comm: Comm) -> None:
    """All ranks begin at the same time, and none has to collect what others before have left. Collective.

    Python looks through all objects now and then, for 0.3 s where there are half a million: whoever came next paid it.
    """
    gc.collect()
    comm.barrier()


def slowest(mine: Seconds, comm: Comm) -> dict[str, float]:
    """The most of all ranks, by name. Collective. Raises InternalError where ranks measured different things."""
    ranks = comm.all_gather(dict(mine))
    found: dict[str, float] = {}
    for rank, theirs in enumerate(ranks):
        if not isinstance(theirs, dict) or theirs.keys() != mine.keys():
            raise InternalError(f"rank {rank} measured other things than rank {comm.rank}: {theirs}")
        for name, value in theirs.items():
            found[name] = max(value, found.get(name, value))
    return found


def _least(one: Seconds, names: Iterable[str]) -> float | None:
    return min((one[name] for name in names if name in one), default=None)
