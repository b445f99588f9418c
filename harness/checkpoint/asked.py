"""Was anybody asked to save or to stop? What one rank notices (a signal, the clock, a file), all ranks learn of.

They ask each other about once a second, at steps that all of them know beforehand. A signal's handler only sets a flag.
A file `stop` or `save` in the checkpoints' directory asks for it too: the way that works under any launcher.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from harness.checkpoint.comm import Comm
from harness.checkpoint.policy import When

PACE = 1.0
"""Seconds between two exchanges."""
_MOST = 1000
"""Steps between two exchanges, at most."""


@dataclass(frozen=True)
class Answer:
    """What the ranks have agreed on."""

    save: bool = False
    stop: bool = False


class Asked:
    """Watches from its construction to `close`. Signals are taken over in the main thread only."""

    def __init__(self, directory: Path, comm: Comm, when: When) -> None:
        self._directory, self._comm = directory, comm
        self._period = min(when.seconds, default=None)
        self._watching = bool(when.signals) or self._period is not None
        self._stop = False
        self._next: int | None = None
        self._asked_at = self._saved_at = time.monotonic()
        self._asked_step = 0
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in when.signals}

    def after(self, step: int) -> Answer:
        """What is asked for after this step. Collective about once a second, else nothing."""
        if not self._watching or (self._next is not None and step < self._next):
            return Answer()
        now = time.monotonic()
        done = step - self._asked_step if self._next is not None else 0
        pace = (now - self._asked_at) / done if done > 0 else PACE
        save = self._comm.rank == 0 and (self._due(now) or self._file("save"))
        stop = self._stop or (self._comm.rank == 0 and self._file("stop"))
        said: list[Any] = self._comm.all_gather([save, stop, min(_MOST, max(1, int(PACE / max(pace, 1e-9))))])
        self._asked_at, self._asked_step, self._next = time.monotonic(), step, step + said[0][2]
        return Answer(said[0][0], any(wish[1] for wish in said))

    def saved(self) -> None:
        """A save has begun: the clock starts anew."""
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Put the signals' handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _due(self, now: float) -> bool:
        return self._period is not None and now - self._saved_at >= self._period

    def _file(self, name: str) -> bool:
        """Whether the file is there; that of a save has then done its duty."""
        path = self._directory / name
        if not os.path.exists(path):
            return False
        if name == "save":
            try:
                os.unlink(path)
            except OSError:
                return False  # it would ask for ever
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._stop and number == signal.SIGINT:  # the second Ctrl-C ends at once
            raise KeyboardInterrupt
        self._stop = True
