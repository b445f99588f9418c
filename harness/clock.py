"""Where a rank is and where its time goes: the current step and section, and seconds per section.

>>> clock = Clock()
>>> with clock("data"):
...     pass
>>> clock.section, list(clock.take())
('start', ['data'])
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SECTIONS = ("data", "forward/backward", "communication", "update", "evaluation", "checkpoint")
OWN_WORK = ("data", "forward/backward", "update")
"""What a rank does without waiting for others."""


class Clock:
    """Sections do not overlap and may nest; the inner one's time counts for it alone."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.section = "start"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        outer, self.section = self.section, section
        inner_before = sum(self.seconds.values())
        begin = time.perf_counter()
        try:
            yield
        except BaseException:
            raise  # `section` stays: it names where the exception came from
        else:
            spent = time.perf_counter() - begin - (sum(self.seconds.values()) - inner_before)
            self.seconds[section] = self.seconds.get(section, 0.0) + spent
            self.section = outer

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken
