"""How soon things answer: the first step of a run beside a script by hand, `harness --help`, `harness ckpt ls`.

    python tests/bench/starts.py --ranks 2 --rounds 7 [--quick]

In each round: `harness run` until all ranks have taken their first step, and a script that imports the same (torch,
mpi4py, Horovod, h5py) and takes a first step of the same model, as Horovod's documentation shows it, under the same
mpirun; both are timed from the start of the command. Then `harness --help` and `harness ckpt ls` on many checkpoints,
to their ends. Ratios are taken within a round, medians are told. Nothing here passes or fails by its speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plots import Panel

from harness.bench.rounds import Contender, Seconds, run_rounds
from harness.checkpoint.comm import Single

ROOT = Path(__file__).resolve().parents[2]
RUN, BY_HAND = "`harness run` to the first step", "a script by hand to the first step"
MODEL = "torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))"
TASK = f"""
import os, time, torch
from harness.env import identify
from harness.task import Task

class First(Task):
    def __init__(self):
        self.losses = 0
    def model(self):
        return {MODEL}
    def data(self, split):
        return torch.utils.data.TensorDataset(torch.rand(256, 64), torch.rand(256, 1)) if split == "train" else None
    def loss(self, model, batch):
        self.losses += 1
        if self.losses == 2:
            with open(f"first.{{identify().rank}}", "w") as file:
                file.write(repr(time.time()))
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
"""
CONFIG = """
name: run
task: {name: "first:First"}
train: {steps: 2, global_batch: 64}
optim: {name: momentum, lr: 0.01}
"""
HAND = f"""
import os, sys, time
import h5py, torch
from mpi4py import MPI
import horovod.torch as hvd
hvd.init(comm=MPI.COMM_WORLD)
torch.manual_seed(0)
model = {MODEL}
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
x, y = torch.rand(64 // hvd.size(), 64), torch.rand(64 // hvd.size(), 1)
torch.nn.functional.mse_loss(model(x), y).backward()
optimizer.step()
with open(f"first.{{hvd.rank()}}", "w") as file:
    file.write(repr(time.time()))
"""
SAVES = """
import sys
import numpy as np
from harness.checkpoint import Manager, State
from harness.checkpoint.comm import Single
from harness.checkpoint.policy import keep_last
manager = Manager(sys.argv[1], comm=Single(), keep=keep_last(10**6), background=False)
for step in range(int(sys.argv[2])):
    manager.save(step + 1, State(tensors={"x": np.arange(16.0)}), metrics={"loss": 1 / (step + 1)})
manager.close()
"""


def first_step(argv: Sequence[str], folder: Path, environment: dict[str, str], ranks: int) -> float:
    """Seconds from the start of a command to the moment when the last rank has taken its first step."""
    began = time.time()
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return max(float((folder / f"first.{rank}").read_text()) for rank in range(ranks)) - began


@dataclass
class Starts:
    """What is started, and how."""

    ranks: int
    environment: dict[str, str]
    checkpoints: Path
    """A directory with many of them."""
    launched: dict[str, str] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
    """The environment and the command line up to Python with which `harness run` starts its ranks, once it has."""

    @property
    def harness(self) -> str:
        return str(Path(sys.executable).with_name("harness"))

    def run(self, number: int) -> Seconds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "run.yaml").write_text(CONFIG)
            (folder / "first.py").write_text(TASK)
            argv = [self.harness, "run", "run.yaml", "-n", str(self.ranks)]
            seconds = first_step(argv, folder, self.environment, self.ranks)
            told = json.loads((folder / "runs/run/attempts/0001/command.json").read_text())
        self.launched = self.environment | told["env"]
        self.argv = told["argv"][: told["argv"].index(sys.executable)]
        return {RUN: seconds}

    def by_hand(self, number: int) -> Seconds:
        if not self.argv:
            self.run(number)
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "train.py").write_text(HAND)
            argv = [*self.argv, sys.executable, "train.py"]
            return {BY_HAND: first_step(argv, Path(name), self.launched, self.ranks)}

    def whole(self, *argv: str) -> None:
        """A command, to its end."""
        subprocess.run(argv, env=self.environment, check=True, capture_output=True, timeout=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--panel", type=Path, help="a file for what is to be plotted (plots.py)")
    parser.add_argument("--quick", action="store_true", help="once each, with 3 checkpoints: only whether it works")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.checkpoints = 0, 3
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        starts = Starts(args.ranks, environment, Path(name) / "checkpoints")
        starts.whole(sys.executable, "-c", SAVES, str(starts.checkpoints), str(args.checkpoints))
        listing = f"`harness ckpt ls` of {args.checkpoints:,} checkpoints"
        contenders = [
            Contender(RUN, starts.run),
            Contender(BY_HAND, starts.by_hand),
            Contender("`harness --help`", lambda number: starts.whole(starts.harness, "--help")),
            Contender(listing, lambda number: starts.whole(starts.harness, "ckpt", "ls", str(starts.checkpoints))),
            Contender("`python -c pass`", lambda number: starts.whole(sys.executable, "-c", "pass")),
        ]
        rounds = run_rounds(contenders, args.rounds, Single())
    print(f"\n{args.ranks} ranks; {args.rounds} rounds, medians; load {os.getloadavg()[0]:.1f}\n")
    print("| what | seconds (least to greatest) | the first time |\n|---|---|---|")
    for one in contenders:
        print(f"| {one.name} | {rounds.seconds(one.name)} | {rounds.first(one.name):.2f} |")
    print(f"\n{RUN} takes {rounds.ratio(RUN, BY_HAND)} times what {BY_HAND} takes")
    if args.panel is not None:
        bars = {one.name.replace("`", ""): rounds.seconds(one.name) for one in reversed(contenders)}
        ours = [name for name in bars if "harness" in name]
        Panel(f"{args.ranks} ranks: seconds of a start", bars, ours, line=None).save(args.panel)


if __name__ == "__main__":
    main()
