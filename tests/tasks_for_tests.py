"""Tasks that misbehave in one known way; `task.name: tasks_for_tests:NAME`."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from harness.tasks.digits import Digits


class Small(Digits):
    """Digits with a tiny model; calls `trouble` with the number of losses computed so far and this process's rank."""

    def __init__(self, at: int = 5, rank: int = 1) -> None:
        super().__init__(width=4)
        self.at, self.rank, self.calls = at, rank, 0

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        import horovod.torch as hvd

        if model.training:
            self.calls += 1
            if self.calls == self.at and hvd.rank() == self.rank:
                self.trouble()
        return super().loss(model, batch)

    def trouble(self) -> None:
        pass


class Raises(Small):
    def trouble(self) -> None:
        raise ValueError("label 17 is out of range")


class Dies(Small):
    def trouble(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(Small):
    def trouble(self) -> None:
        raise SystemExit(3)


class Slow(Small):
    """50 ms per step, so that somebody can press Ctrl-C in the middle."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            time.sleep(0.05)
        return super().loss(model, batch)


class Nothing(Small):
    def data(self, split: str) -> Any:
        return []


class BadData(Small):
    """The third sample that a loader reads cannot be read."""

    def data(self, split: str) -> Any:
        return Unreadable()


class Unreadable(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        raise OSError(5, "Input/output error", f"sample-{index}")


class Incomplete:
    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)


class WrongConstructor(Small):
    def __init__(self, needed: int) -> None:
        super().__init__()
