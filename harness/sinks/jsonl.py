"""Metrics as JSON lines: one object per record, appended, so that a restarted run goes on in the same file.

>>> {"kind": "train", "step": 10, "time": 1700000000.0, "attempt": 1, "loss": 2.31}    # one line  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path

from harness.rundir import storage_errors
from harness.sinks import Record


class JsonLines:
    """Adds `time` (unix seconds) and `attempt`. A number that is not finite becomes null, since JSON has none."""

    def __init__(self, path: Path, *, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        with storage_errors(path):
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def record(self, record: Record) -> None:
        entry = {"time": time.time(), "attempt": self.attempt} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with storage_errors(self.path):
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a record that could not be written has been told of already
            self.file.close()
