"""A job that trains and saves until it is killed. Started by `test_checkpoint_kills.py` under mpirun:

python ranks_kills.py DIRECTORY direct|lazy|mpio [STEPS]

It resumes from the newest checkpoint, after making sure that this is what the step must have. In DIRECTORY it keeps
`checkpoints/`; `pids/<rank>` once it trains; `claimed`, how many seconds it took to take the lease over; and in
`durable` one line for each checkpoint that was reported to be durable.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ending import all_or_none

from harness.checkpoint import Manager, State, keep_last
from harness.checkpoint.writing import Outcome

EVERY = 3
"""Steps between two saves."""


class Arrays:
    """A state that one step decides alone."""

    def __init__(self) -> None:
        self.arrays = {"large": np.zeros(500_000), "odd": np.zeros(33_333, np.float32), "step": np.zeros(1, np.int64)}
        self.state = State(arrays=self.arrays)

    def to(self, step: int) -> None:
        generator = np.random.default_rng(step)
        self.arrays["large"][:] = generator.standard_normal(500_000)
        self.arrays["odd"][:] = generator.standard_normal(33_333)
        self.arrays["step"][:] = step

    def bits(self) -> list[bytes]:
        return [array.tobytes() for array in self.arrays.values()]


class Trained:
    """A state that an optimizer makes, step after step; the same bits in any process."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch, self.at = torch, 0
        self.model = torch.nn.Linear(500, 401)
        with torch.no_grad():
            self.model.weight.fill_(1.0)
            self.model.bias.fill_(-1.0)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.state = State(model=self.model, optimizer=self.optimizer)

    def to(self, step: int) -> None:
        while self.at < step:
            self.at += 1
            generator = self.torch.Generator().manual_seed(self.at)
            for parameter in self.model.parameters():
                parameter.grad = self.torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()

    def bits(self) -> list[bytes]:
        moments = [self.optimizer.state.get(parameter, {}) for parameter in self.model.parameters()]
        found = [*self.model.parameters(), *(value for moment in moments for value in moment.values())]
        return [tensor.detach().numpy().tobytes() for tensor in found]


def make(mode: str) -> Any:
    return Trained() if mode == "lazy" else Arrays()


def main(directory: Path, mode: str, steps: int) -> None:
    import mpi4py.MPI  # noqa: F401

    durable = os.open(directory / "durable", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def saved(outcome: Outcome) -> None:
        os.write(durable, f"{outcome.step}\n".encode())

    manager = Manager(
        directory / "checkpoints",
        engine="mpio" if mode == "mpio" else "direct",
        lazy=mode == "lazy",
        busy="wait",
        keep=keep_last(2),
        timeout=60.0,
        saved=saved,
        log=lambda line: print(line, flush=True),
    )
    began = time.monotonic()
    manager.claim()
    if manager.comm.rank == 0:
        (directory / "claimed").write_text(str(time.monotonic() - began))
    work, expected = make(mode), make(mode)
    start = manager.restore(work.state) or 0
    if start:
        expected.to(start)
        assert work.bits() == expected.bits(), f"what was resumed is not step {start}"
    work.at = start
    (directory / "pids" / str(manager.comm.rank)).write_text(str(os.getpid()))
    for step in range(start + 1, start + steps + 1):
        work.to(step)
        if step % EVERY == 0:
            manager.save(step, work.state)
        manager.poll()
    manager.close()


if __name__ == "__main__":
    all_or_none(
        lambda: main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1_000_000), mpi=True
    )
