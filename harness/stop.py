"""Asking a run to stop: a signal to any rank, a file in the run directory, or the clock. Handlers only set a flag.

Ranks agree about it when they next ask each other (`pulse.py`); then the state is saved and all exit 75. A checkpoint
is asked for in the same way, by a file or by the clock.

The clock: the end of the allocation or `stop.time`, minus what stopping takes. Since the question is asked now and
then, that is `stop.margin`, the longest time there has been between two questions (evaluations included), and twice
the longest save (one that is under way, and the last one).
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

DEADLINE = "HARNESS_DEADLINE"
"""Set by `harness run` for its ranks: unix seconds at which they must be gone."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""All that can be asked with; `stop.signals` says which are."""
RECENT = 100
"""Of so many times between two questions the longest counts."""
SAFETY = 1.5

_early: list[int] = []


def listen(names: Sequence[str]) -> None:
    """From now on remember USR1 and USR2 that come before training, which would end this process. Main thread only."""
    for number in _numbers(names):
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: _early.append(number))


def deadline(after: float | None, environ: Mapping[str, str] = os.environ) -> float | None:
    """The unix time at which this rank's job ends: what `harness run` says, else Slurm's, or `after` seconds from now.

    None where nothing ends it. Values that are no times are as good as none.
    """
    for name in (DEADLINE, "SLURM_JOB_END_TIME"):
        with suppress(ValueError):
            given = float(environ.get(name, ""))
            if 0 < given < 1e11:
                own = time.time() + after if after is not None and name != DEADLINE else given
                return min(given, own)
    return None if after is None else time.time() + after


class StopRequest:
    """This rank's wish to stop. On rank 0, which has `file` and `ends`, `wanted()` also looks at these.

    file: the run's stop file. ends: the unix time at which the job is ended by others, or None.
    """

    def __init__(
        self,
        file: Path | None,
        *,
        signals: Sequence[str] = ("TERM", "INT", "USR1", "USR2"),
        ends: float | None = None,
        margin: float = 30.0,
    ) -> None:
        self.file, self.margin = file, margin
        self.reason: str | None = None
        """Why this rank wants to stop."""
        self._signals = _numbers(signals)
        self._until = None if ends is None else time.monotonic() + ends - time.time()  # clocks are set, and jump
        self._asked: float | None = None
        self._gaps: deque[float] = deque(maxlen=RECENT)
        self._save = 0.0

    @property
    def flag(self) -> bool:
        return self.reason is not None

    def install(self) -> None:
        """Take the signals over, also those that came since `listen`. Main thread only."""
        for number in self._signals:
            signal.signal(number, self._note)
        if _early:
            self._note(_early[0], None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"signal {signal.Signals(number).name.removeprefix('SIG')}"
        if number == signal.SIGINT:  # the second Ctrl-C ends at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long until it was durable."""
        self._save = max(self._save, seconds)

    def needs(self) -> float:
        """Seconds before the end at which a question must be answered with yes."""
        return self.margin + SAFETY * max(self._gaps, default=0.0) + 2 * SAFETY * self._save

    def wanted(self) -> bool:
        """Whether to stop. Asked where ranks agree about it."""
        now = time.monotonic()
        if self._asked is not None:
            self._gaps.append(now - self._asked)
        self._asked = now
        # os.path: False, where Path.exists would raise, when a file system stumbles
        if self.reason is None and self.file is not None and os.path.exists(self.file):
            self.reason = _told(self.file)
        if self.reason is None and self._until is not None and now + self.needs() >= self._until:
            self.reason = f"the time is up in {max(0.0, self._until - now):.0f} s"
        return self.flag


class SaveRequest:
    """The wish for a checkpoint, on rank 0: so many seconds after the last one, or when there is a file `save`."""

    def __init__(self, file: Path | None, interval: float | None) -> None:
        self.file, self.interval = file, interval
        self.last = time.monotonic()

    def wanted(self) -> bool:
        if self.file is None:
            return False
        late = self.interval is not None and time.monotonic() - self.last >= self.interval
        return late or os.path.exists(self.file)

    def granted(self) -> None:
        """A checkpoint is being made."""
        self.last = time.monotonic()
        if self.file is not None:
            with suppress(OSError):
                os.unlink(self.file)


def _told(file: Path) -> str:
    """Why there is a stop file, as far as it says so itself."""
    text = ""
    with suppress(OSError), open(file, encoding="utf-8", errors="replace") as handle:
        text = " ".join("".join(filter(str.isprintable, handle.read(200).partition("\n")[0])).split())
    return f"the stop file: {text}" if text else "the stop file"


def _numbers(names: Sequence[str]) -> tuple[signal.Signals, ...]:
    return tuple(signal.Signals[f"SIG{name}"] for name in names)
