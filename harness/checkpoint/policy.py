"""Which checkpoints to keep, and when to make them: small rules that combine with `|` (any of them is enough). Pure.

>>> keep = keep_last(2) | keep_best("val/loss", 1, mode="min") | keep_every(steps=1000)
>>> keep.select([(500, {"val/loss": 0.1}), (1000, {}), (1500, {"val/loss": 0.3}), (2000, {}), (2500, {})])
{0, 1, 3, 4}
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Candidate: TypeAlias = "tuple[int, Mapping[str, object]]"
"""(step, metrics) of one valid checkpoint."""


@dataclass(frozen=True)
class Keep:
    """A union of rules. A rule maps checkpoints, oldest first, to the indices of those it keeps.

    `metrics`: those by which rules choose.
    """

    rules: tuple[Callable[[Sequence[Candidate]], set[int]], ...]
    metrics: tuple[str, ...] = ()

    def __or__(self, other: Keep) -> Keep:
        return Keep(self.rules + other.rules, self.metrics + other.metrics)

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

    return Keep((rule,), (metric,))


def keep_all() -> Keep:
    """Everything."""
    return Keep((lambda checkpoints: set(range(len(checkpoints))),))


def _at_least_one(count: int) -> None:
    if count < 1:
        raise ValueError(f"a number of checkpoints or steps is at least 1, not {count}")


@dataclass(frozen=True)
class When:
    """When `Manager.step` saves: whichever of these comes first. Made by `every`, `on_stop`, `at_end`; joins by `|`."""

    steps: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    signals: tuple[int, ...] = ()
    end: bool = False

    def __or__(self, other: When) -> When:
        return When(
            self.steps + other.steps,
            self.seconds + other.seconds,
            self.signals + other.signals,
            self.end or other.end,
        )

    def at(self, step: int) -> bool:
        """Whether a save is due after `step` steps, whatever the clock says: the same on all ranks."""
        return any(step % steps == 0 for steps in self.steps)


def every(*, steps: int | None = None, minutes: float | None = None) -> When:
    """After so many steps, or so many minutes after the last save began."""
    if (steps is None) == (minutes is None):
        raise ValueError("every takes steps or minutes: every(steps=500) | every(minutes=15)")
    if steps is not None:
        _at_least_one(steps)
        return When(steps=(steps,))
    assert minutes is not None
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes between checkpoints are more than 0, not {minutes}")
    return When(seconds=(60.0 * minutes,))


def on_stop(*signals: int) -> When:
    """When the job is asked to stop: by one of these signals (unset: SIGTERM, SIGINT, SIGUSR1, SIGUSR2) on any rank.

    `Manager.step` then saves and returns True: leave the loop.
    """
    return When(signals=signals or (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))


def at_end() -> When:
    """When the manager is closed, the last step that `Manager.step` saw."""
    return When(end=True)
