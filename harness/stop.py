"""Asking a run to stop: a file in the run directory, or a signal to any rank. The handler only sets a flag.

Ranks agree about it in the collective of the next log interval; then the state is saved and all exit 75. A checkpoint
is asked for in the same way, by a file or by the clock.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """This rank's wish to stop; `wanted()` on rank 0 also looks for the stop file."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.flag = False

    def install(self) -> None:
        """Take the signals over. Main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.flag = True
        if number == signal.SIGINT:  # the second Ctrl-C ends at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def wanted(self) -> bool:
        # os.path: False, where Path.exists would raise, when a file system stumbles
        return self.flag or (self.file is not None and os.path.exists(self.file))


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
