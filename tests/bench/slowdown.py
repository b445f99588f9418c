"""How much slower a training is while a save is in flight all the time: the same steps, without saves and with them.

A step is a product of matrices of about 20 ms on each rank, and then all ranks wait for each other, as they do for
their gradients. Used by `saving.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from harness.bench.contents import change
from harness.bench.state import Training
from harness.checkpoint import Manager, keep_last
from harness.checkpoint.comm import Mpi

STEP = 0.02
"""Seconds."""
EACH = 5
"""Steps between two requests to save, of which those are skipped that come while a save is in flight."""


class Slowdown:
    """`seconds`: how long the steps without saves take in a round."""

    def __init__(self, folder: Path, comm: Mpi, training: Training, *, seconds: float) -> None:
        self.folder, self.comm, self.training, self.seconds = folder / "slowdown", comm, training, seconds
        self._matrix = torch.randn(256, 256)
        self._products = self._count_products()
        self._saves = 0

    def work(self, number: int) -> dict[str, float]:
        count = max(5, round(self.seconds / STEP))
        manager = Manager(self.folder, self.comm, keep=keep_last(1), log=lambda line: None)
        self._save(manager, wait=True)  # the first save of a run is another one
        found = {}
        for saves in (False, True) if number % 2 else (True, False):
            found["training and saves" if saves else "training"] = self._steps(count, manager if saves else None)
        manager.close()
        return found

    def _steps(self, count: int, manager: Manager | None) -> float:
        change(self.training.tensors)
        self.comm.barrier()
        began = time.perf_counter()
        for step in range(count):
            if manager is not None and step % EACH == 0:
                self._save(manager, wait=False)
            for _ in range(self._products):
                self._matrix @ self._matrix
            self.comm.barrier()
        taken = time.perf_counter() - began
        if manager is not None:
            manager.wait()
        return taken

    def _save(self, manager: Manager, *, wait: bool) -> None:
        self._saves += 1
        manager.save(self._saves, self.training.state, wait=wait)

    def _count_products(self) -> int:
        """How many make a step: the same on all ranks."""
        for _ in range(5):
            self._matrix @ self._matrix
        began = time.perf_counter()
        for _ in range(20):
            self._matrix @ self._matrix
        mine = max(1, round(20 * STEP / (time.perf_counter() - began)))
        return min(int(str(told)) for told in self.comm.all_gather(mine))
