"""Asking a run to stop: a file in the run directory, or a signal to any rank. The handler only sets a flag.

Ranks agree about it in the collective of the next log interval; then the state is saved and all exit 75.
"""

from __future__ import annotations

import os
import signal
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
