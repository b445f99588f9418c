"""When the ranks ask each other whether anyone was asked to stop or to save, between log lines too.

They do before the first step and with every log line, evaluation and checkpoint. So that a wish need not wait for a
log line that is far away, they also do after steps that adapt to how long a step takes: about `PATIENCE` apart. All
ranks must meet after the same steps, so these are computed from what all of them have heard.

    pulse = Pulse(first)
    pulse.hear(first, world.exchange(pulse.ask(stop, save, announced), "pulse")).stop
    if pulse.due(done): ...
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

PATIENCE = 10.0
"""Seconds between two questions, where that is more than a step."""
GROWTH = 4
"""So many times as many steps at most as there were before the last question: the first steps are no measure."""
ASKED = 4
"""Numbers per rank in a question."""


@dataclass(frozen=True)
class Wishes:
    """What some rank was asked for, known to all."""

    stop: bool = False
    save: bool = False
    announced: bool = False
    """Other ranks will take part."""


class Pulse:
    """The steps after which to ask; the same on all ranks."""

    def __init__(self, first: int) -> None:
        self._last, self._next = first, first + 1
        self._begin = time.perf_counter()

    def due(self, done: int) -> bool:
        """Whether to ask after `done` steps, whatever else happens then."""
        return done >= self._next

    def ask(self, stop: bool, save: bool, announced: bool) -> list[float]:
        """This rank's question, `ASKED` numbers: its wishes, and the seconds since the last one."""
        return [stop, save, announced, time.perf_counter() - self._begin]

    def hear(self, done: int, table: np.ndarray) -> Wishes:
        """All ranks' questions after `done` steps, float64 [ranks, ASKED]: what they come to, and when to ask again."""
        self._next = done + steps_until(done - self._last, float(table[:, 3].max()))
        self._last, self._begin = done, time.perf_counter()
        return Wishes(*(bool(wish.any()) for wish in table[:, :3].T))


def steps_until(steps: int, seconds: float) -> int:
    """Steps until the next question, at least 1, where the last `steps` took so many seconds. Pure."""
    return int(max(1.0, min(GROWTH * steps, PATIENCE * steps / max(seconds, 1e-9))))
