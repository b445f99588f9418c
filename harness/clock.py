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
    """Sections do not overlap and may nest; the inner one's time counts for it alone.

    The watchdog's thread reads `place` at any moment; all else belongs to the thread that trains.
    """

    def __init__(self) -> None:
        self.done: int | None = None
        """Steps that were done before the one that is being taken."""
        self.place: tuple[str, float] = ("start", time.perf_counter())
        """The section, and when it was entered (by time.perf_counter): one value, so that both belong together."""
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # seconds of the sections within the current one

    @property
    def step(self) -> int | None:
        """The step that is being taken, as people count them: once step 5 is done, 5 steps are."""
        return None if self.done is None else self.done + 1

    @property
    def section(self) -> str:
        return self.place[0]

    @section.setter
    def section(self, name: str) -> None:
        self.place = (name, time.perf_counter())

    def begin(self, done: int) -> None:
        """A step begins, after so many; between its sections a rank is in `step`."""
        self.done = done
        self.section = "step"

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        outer, inner, self._inner = self.section, self._inner, 0.0
        self.section = section
        begin = time.perf_counter()
        # after an exception `section` stays: it names where that came from
        yield
        elapsed = time.perf_counter() - begin
        self.seconds[section] = self.seconds.get(section, 0.0) + elapsed - self._inner
        self._inner = inner + elapsed
        self.section = outer

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken
