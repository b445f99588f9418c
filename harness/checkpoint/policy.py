"""Which checkpoints to keep: small rules that combine with `|` (what any of them keeps is kept). Pure.

>>> keep = keep_last(2) | keep_best("val/loss", 1, mode="min") | keep_every(steps=1000)
>>> keep.select([(500, {"val/loss": 0.1}), (1000, {}), (1500, {"val/loss": 0.3}), (2000, {}), (2500, {})])
{0, 1, 3, 4}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Candidate: TypeAlias = "tuple[int, Mapping[str, object]]"
"""(step, metrics) of one valid checkpoint."""


@dataclass(frozen=True)
class Keep:
    """A union of rules. A rule maps checkpoints, oldest first, to the indices of those it keeps."""

    rules: tuple[Callable[[Sequence[Candidate]], set[int]], ...]

    def __or__(self, other: Keep) -> Keep:
        return Keep(self.rules + other.rules)

    def select(self, checkpoints: Sequence[Candidate]) -> set[int]:
        """Indices to keep. The newest is always kept."""
        newest = {len(checkpoints) - 1} if checkpoints else set()
        return newest.union(*(rule(checkpoints) for rule in self.rules))


def keep_last(count: int) -> Keep:
    """The newest `count`."""
    _at_least_one(count)
    return Keep((lambda checkpoints: set(range(max(0, len(checkpoints) - count), len(checkpoints))),))


def keep_every(*, steps: int) -> Keep:
    """Those whose step is a multiple of `steps`, for ever."""
    _at_least_one(steps)
    return Keep((lambda checkpoints: {index for index, (step, _) in enumerate(checkpoints) if step % steps == 0},))


def keep_best(metric: str, count: int = 1, *, mode: Literal["min", "max"] = "min") -> Keep:
    """The `count` with the lowest (min) or highest (max) metric, of equal ones the newer; not those without it."""
    _at_least_one(count)
    if mode not in ("min", "max"):
        raise ValueError(f"mode is min or max, not {mode!r}")

    def rule(checkpoints: Sequence[Candidate]) -> set[int]:
        scored = []
        for index, (_, metrics) in enumerate(checkpoints):
            value = metrics.get(metric)
            if isinstance(value, (int, float)) and not math.isnan(value):
                scored.append((value if mode == "min" else -value, -index))
        return {-index for _, index in sorted(scored)[:count]}

    return Keep((rule,))


def keep_all() -> Keep:
    """Everything."""
    return Keep((lambda checkpoints: set(range(len(checkpoints))),))


def _at_least_one(count: int) -> None:
    if count < 1:
        raise ValueError(f"a number of checkpoints or steps is at least 1, not {count}")
