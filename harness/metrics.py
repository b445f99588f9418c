"""What is measured between two log lines, and the one small collective that makes it a view of all ranks.

What is not here: where the numbers go (`sinks/`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.clock import OWN_WORK, SECTIONS, Clock
from harness.pulse import ASKED
from harness.world import World


@dataclass(frozen=True)
class Interval:
    """All ranks' steps since the last log line."""

    loss: float
    """Mean over the steps and all ranks' samples."""
    seconds: float
    """Wall time on rank 0."""
    sections: Mapping[str, float]
    """Seconds per step in each section, mean over ranks."""
    slowest: int
    """The rank whose own work (data, forward/backward, update) took longest."""
    slowdown: float
    """That rank's own work divided by the mean of all ranks."""
    sent: float
    """Bytes that all ranks have sent, at least (`parallel/traffic.py`)."""
    asked: np.ndarray
    """All ranks' questions, [ranks, ASKED]: see `pulse.py`."""


class Meter:
    """One rank's sums since the last log line. `add` waits for no device."""

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        self.steps = self.counted = 0
        self.begin = time.perf_counter()
        self.sent = 0.0

    def add(self, losses: Sequence[torch.Tensor]) -> None:
        """The mean losses of one step's micro batches on this rank, scalars; none on a rank without samples."""
        self.steps += 1
        if losses:
            loss = sum(losses[1:], losses[0]) / len(losses)
            self.loss = loss.double() if self.loss is None else self.loss + loss
            self.counted += 1

    def exchange(self, world: World, clock: Clock, *, sent: float, asked: Sequence[float]) -> Interval:
        """Combine all ranks' sums and begin anew. Collective: one allgather of 13 numbers per rank.

        sent: bytes that this rank has sent since the start. asked: this rank's question (`pulse.py`), which goes along.
        """
        loss = float("nan") if self.loss is None else float(self.loss)
        taken = clock.take()
        steps = max(self.steps, 1)
        told = [loss, self.counted, sent - self.sent]
        mine = [*asked, *told, *(taken.get(name, 0.0) for name in SECTIONS)]
        with clock("metrics"):
            table = world.exchange(mine, "log/interval")
        seconds = time.perf_counter() - self.begin
        self.loss, self.steps, self.counted = None, 0, 0
        self.begin, self.sent = time.perf_counter(), sent
        return summarize(table, seconds, steps)


def summarize(table: np.ndarray, seconds: float, steps: int) -> Interval:
    """The view of all ranks. Pure.

    `table`: float64 [ranks, ASKED + 3 + sections]: a question, losses, steps, sent, seconds in each section.
    """
    asked, table = table[:, :ASKED], table[:, ASKED:]
    times = table[:, 3:]
    own = times[:, [SECTIONS.index(name) for name in OWN_WORK]].sum(axis=1)
    mean = float(own.mean())
    return Interval(
        loss=float(table[table[:, 1] > 0, 0].mean() / steps),
        seconds=seconds,
        sections={name: float(column.mean()) / steps for name, column in zip(SECTIONS, times.T, strict=True)},
        slowest=int(own.argmax()),
        slowdown=float(own.max()) / mean if mean > 0 else 1.0,
        sent=float(table[:, 2].sum()),
        asked=asked,
    )
