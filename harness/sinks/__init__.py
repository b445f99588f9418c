"""Where metrics go. A sink lives on rank 0 only; each is one small module with `record`, `say` and `close`.

A record is a flat dict: `kind` is train, eval, checkpoint or state, `step` is the number of steps done, the rest are
numbers and strings. A new destination is a new module here and one line in `open_sinks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from harness.config import Config
from harness.errors import StorageError
from harness.rundir import RunDir

Value = float | int | str | None
Record = Mapping[str, Value]


class Sink(Protocol):
    """A destination. `close` is called once, also after a failure."""

    def record(self, record: Record) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """All destinations as one; empty on ranks other than 0."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks
        self._failing: set[Sink] = set()

    def record(self, kind: str, step: int, **values: Value) -> None:
        """Hand one record to every sink. Training goes on where a full disk does not take it, and that is told once."""
        for sink in self.sinks:
            try:
                sink.record({"kind": kind, "step": step, **values})
                self._failing.discard(sink)
            except StorageError as error:
                if sink not in self._failing:
                    self._failing.add(sink)
                    self.say(f"warning: {error.message}; training goes on without it")

    def say(self, text: str) -> None:
        """A line for people."""
        for sink in self.sinks:
            sink.say(text)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def open_sinks(config: Config, run: RunDir, *, attempt: int, world_size: int, steps: int) -> Sinks:
    """The sinks that the config asks for. Rank 0 only. Raises StorageError or Unavailable."""
    from harness.sinks.console import Console
    from harness.sinks.jsonl import JsonLines
    from harness.sinks.status import StatusFile

    sinks: list[Sink] = [
        JsonLines(run.metrics, attempt=attempt),
        StatusFile(run.status, attempt=attempt, world_size=world_size, steps=steps),
        Console(steps=steps),
    ]
    if config.log.tensorboard:
        from harness.sinks.tensorboard import TensorBoard

        sinks.append(TensorBoard(run.tensorboard))
    return Sinks(sinks)
