"""A task in which something happens at a given place: `task.name: troubled:Troubled`. It imports little."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.env import identify
from harness.task import Task


class Points(torch.utils.data.Dataset[Any]):
    """64 points near a plane; calls `look` before each batch."""

    def __init__(self, look: Callable[[], None]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(64, 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(64, 1, generator=generator)
        self.look = look

    def __len__(self) -> int:
        return 64

    def batch(self, ids: Any, seeds: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.look()
        at = torch.from_numpy(ids)
        return self.x[at], self.y[at]


class Troubled(Task):
    """A plane through points. `plan` holds for each attempt (place, how, at, rank): what happens there, how soon.

    `pause`: seconds that each step takes longer.
    """

    def __init__(self, plan: Sequence[tuple[str, str, int, int]] = (), path: str = "", pause: float = 0.0) -> None:
        self.pause = pause
        attempt = int(os.environ.get("HARNESS_ATTEMPT", "1"))
        self.path = Path(f"{path}.{attempt}")
        self.place, self.how, self.at, rank = plan[attempt - 1] if attempt <= len(plan) else ("", "", 0, -1)
        self.armed = identify().rank == rank
        self.reached("start")
        if self.place == "save":  # in the middle of writing
            write = os.pwrite

            def pwrite(*arguments: Any) -> int:
                self.reached("save")
                return write(*arguments)

            os.pwrite = pwrite

    def reached(self, place: str) -> None:
        if not self.armed or place != self.place:
            return
        self.at -= 1
        if self.at > 0:
            return
        self.armed = False
        self.path.write_text(str(time.time()))
        match self.how:
            case "sleep":
                time.sleep(600)
            case "raise":
                raise ValueError("trouble")
            case "kill" | "stop":
                os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)
            case "kill launcher":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(600)
            case "kill supervisor":
                os.kill(parent(os.getppid()), signal.SIGKILL)
                time.sleep(600)
            case "kill host":  # the rank, and the daemon of mpirun that stands for its host
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            case "usr2":
                os.kill(parent(os.getppid()), signal.SIGUSR2)
                time.sleep(1)  # long enough to be heard of while the save goes on
            case "interrupt twice":
                for _ in range(2):
                    os.kill(parent(os.getppid()), signal.SIGINT)
                    time.sleep(1)
                time.sleep(600)

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(4, 1)

    def data(self, split: str) -> Points:
        return Points(lambda: self.reached("data")) if split == "train" else Points(lambda: None)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        self.reached("step")
        time.sleep(self.pause)
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        self.reached("evaluation")
        return {"loss": torch.nn.functional.mse_loss(model(batch[0]), batch[1])}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class ComesAndGoes(Troubled):
    """A plane through points, for elastic runs; what happens is told by files in the working directory.

    trouble "kill": the 23rd step of the first world of two ranks kills its rank 0. "raise": the 12th step of the first
    attempt raises on all ranks. Steps are slow until there is a file `go`.
    """

    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.trouble, self.calls = trouble, 0

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        import horovod.torch as hvd

        if model.training:
            self.calls += 1
            if self.trouble == "kill" and self.calls == 23 and hvd.rank() == 0 and not os.path.exists("killed"):
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "raise" and self.calls == 12 and os.environ["HARNESS_ATTEMPT"] == "1":
                raise ValueError("label 17 is out of range")
            if self.calls > 23 or hvd.size() == 1:
                time.sleep(0.0 if os.path.exists("go") else 0.1)
        return super().loss(model, batch)
