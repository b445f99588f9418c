"""The run's `status.json`: what a launcher, a supervisor or a person wants to know without asking a rank."""

from __future__ import annotations

import math
import time
from pathlib import Path

from harness.rundir import write_json
from harness.sinks import Record, Value


class StatusFile:
    """Replaced as a whole with every record.

    Fields: state (starting, running, finished, stopped, failed), step, steps, rate (steps/s), eta_s, loss,
    last_checkpoint, attempt, world, time (unix seconds), summary.
    """

    def __init__(self, path: Path, *, attempt: int, world_size: int, steps: int) -> None:
        self.path = path
        self.fields: dict[str, Value] = {"state": "starting", "step": 0, "steps": steps, "attempt": attempt}
        self.fields["world"] = world_size
        self._write()

    def record(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "eval":
            return
        self.fields["step"] = record["step"]
        if kind == "train":
            names = ("rate", "eta_s", "loss")
            self.fields |= {"state": "running"} | {name: record[name] for name in names if name in record}
        elif kind == "checkpoint":
            self.fields["last_checkpoint"] = record["step"]
        elif kind == "state":
            self.fields |= {name: record[name] for name in ("state", "summary") if name in record}
        self._write()

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def _write(self) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.fields.items()}
        write_json(self.path, finite | {"time": time.time()})
