"""The first thing of each save: the state as leaves and JSON, faster where only values have changed (`known`).

    taken = collector.collect(step, state, metrics)     # at the beginning of a save
    collector.remember(state, taken)                    # at its end, before anything can have changed

What `collect` returns refers to the tensors; `staging` copies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.checkpoint.comm import Comm
from harness.checkpoint.known import Known
from harness.checkpoint.snapshot import Schema
from harness.checkpoint.state import State, take
from harness.checkpoint.tree import encode
from harness.checkpoint.writing import Taken
from harness.errors import DataError


class Collector:
    """Remembers the last state; one save after another. Not collective."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._known: Known | None = None
        self._schema: Schema | None = None

    def collect(self, step: int, state: State, metrics: Mapping[str, float] | None) -> Taken:
        """What there is to save. Tensors are referred to, not copied. Raises DataError."""
        if step < 0:
            raise DataError(f"the step is {step}; steps count from 0")
        encoded: Any = encode(dict(metrics or {}), "metrics", {})
        again = None if self._known is None else self._known.again(state)
        if again is not None:
            return Taken(again.snapshot, again.record, again.snapshot.schema().hash, encoded)
        self._known = None
        snapshot = take(state, self._comm.rank, self._comm.size, before=self._schema)
        self._schema = snapshot.schema()
        return Taken(snapshot, lambda: snapshot.record, self._schema.hash, encoded)

    def remember(self, state: State, taken: Taken) -> None:
        """So that the next save finds what has not changed since `collect`. The save that runs does not wait for it."""
        if self._known is None:
            self._known = Known.of(state, taken.snapshot)

    def forget(self) -> None:
        """Let go of the objects of the last state."""
        self._known = None
