"""How long a run stands still after a rank has died, part by part, beside a job that only imports the same.

    python tests/bench/restarts.py --ranks 2 --rounds 5

In each round `harness run` trains, one rank is killed (SIGKILL) in the middle of a step, and the run goes on from its
newest checkpoint; after it comes a job under the same launcher that imports torch, Horovod, mpi4py and h5py, starts
Horovod, makes an optimizer (for which torch imports its compiler) and ends. Medians over the rounds; ratios are taken
within a round. It is no test: nothing here passes or fails by its speed.

died      death -> `harness run` has recorded how the attempt ended: mpirun notices and ends the other ranks
again     -> mpirun is started again (the first restart of a row does not wait)
world     -> all ranks have imported torch and met: MPI and Horovod
built     -> the model and the data are there, the checkpoint is read, the first batch is
step      -> the first new step is done
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("died", "again", "world", "built", "step")
NOTHING = """
import h5py, torch
from mpi4py import MPI
import horovod.torch as hvd
hvd.init(comm=MPI.COMM_WORLD)
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
MPI.COMM_WORLD.Barrier()
"""
TASK = """
import json, os, signal, time
import torch
from harness.env import identify
from harness.task import Task

def note(what):
    with open(f"times.{os.environ['HARNESS_ATTEMPT']}.{identify().rank}", "a") as file:
        file.write(json.dumps([what, time.time()]) + "\\n")

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 256
    def __getitem__(self, index):
        return torch.full((64,), index / 256), torch.tensor([1.0])

class Dies(Task):
    def __init__(self):
        note("world")
        self.losses = 0
    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))
    def data(self, split):
        return Points() if split == "train" else None
    def loss(self, model, batch):
        self.losses += 1
        if self.losses <= 2:
            note("built" if self.losses == 1 else "step")
        if os.environ["HARNESS_ATTEMPT"] == "1" and self.losses == 15 and identify().rank == identify().size - 1:
            note("died")
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
"""
CONFIG = """
name: run
task: {name: "dies:Dies"}
train: {steps: 20, global_batch: 64}
optim: {name: momentum, lr: 0.01}
checkpoint: {every: 5, mode: wait}
log: {every: 5}
restart: {most: 1}
"""


def times(folder: Path, attempt: int) -> dict[str, float]:
    """When the last rank came to each point of an attempt, in unix seconds."""
    found: dict[str, float] = {}
    for file in folder.glob(f"times.{attempt}.*"):
        for what, when in map(json.loads, file.read_text().splitlines()):
            found[what] = max(found.get(what, 0.0), when)
    return found


def restart(environment: dict[str, str], ranks: int) -> dict[str, float]:
    """Seconds of each part, of one run in which a rank dies."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(CONFIG)
        (folder / "dies.py").write_text(TASK)
        command = [sys.executable, "-m", "launch.cli", "run", "run.yaml", "-n", str(ranks)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        attempts = folder / "runs/run/attempts"
        first, second = times(folder, 1), times(folder, 2)
        points = [
            first["died"],
            json.loads((attempts / "0001/ending.json").read_text())["time"],
            json.loads((attempts / "0002/command.json").read_text())["time"],
            *(second[part] for part in PARTS[2:]),
        ]
        return dict(zip(PARTS, (end - begin for begin, end in itertools.pairwise(points)), strict=True))


def nothing(environment: dict[str, str], argv: list[str]) -> float:
    """Seconds of a job under the same launcher that imports the same and ends."""
    began = time.perf_counter()
    subprocess.run([*argv, sys.executable, "-c", NOTHING], env=environment, check=True, timeout=500)
    return time.perf_counter() - began


def launcher(environment: dict[str, str], ranks: int) -> list[str]:
    """mpirun and its options as `harness show` tells them for the same run."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "run.yaml").write_text(CONFIG)
        run = [sys.executable, "-m", "launch.cli", "run", "run.yaml", "-n", str(ranks), "train.steps=1"]
        (Path(name) / "dies.py").write_text(TASK)
        subprocess.run(run, cwd=name, env=environment, check=True, capture_output=True, timeout=500)
        told: dict[str, Any] = json.loads((Path(name) / "runs/run/attempts/0001/command.json").read_text())
    argv: list[str] = told["argv"]
    environment |= told["env"]
    return argv[: argv.index(sys.executable)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    plain = dict(environment)
    argv = launcher(plain, arguments.ranks)  # warms the caches as well
    rounds, ratios, starts = [], [], []
    for number in range(arguments.rounds):
        parts = restart(environment, arguments.ranks)
        starts.append(nothing(plain, argv))
        rounds.append(parts)
        ratios.append(sum(parts.values()) / starts[-1])
        told = "  ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        print(
            f"round {number + 1}: {told}; in all {sum(parts.values()):.2f} s; only imports {starts[-1]:.2f} s",
            flush=True,
        )
    print(f"medians of {arguments.rounds} rounds, {arguments.ranks} ranks:")
    for part in PARTS:
        print(f"  {part:<8} {statistics.median(one[part] for one in rounds):6.2f} s")
    whole = statistics.median(sum(one.values()) for one in rounds)
    print(f"death to first new step {whole:.2f} s = {statistics.median(ratios):.2f} x a job that only imports the same")
    print(f"                        ({statistics.median(starts):.2f} s; ratios {min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
