"""What checkpoints cost the training that goes on in front of them.

    mpirun -np 2 python tests/bench/behind.py --model 25M --rounds 9 --directory /scratch/me [--quick]

The GPT of `train.py` with Adam, whose state is three times the parameters. In each round the same steps are taken
without saves, and with a save that is asked for at every step and begins where none is under way: one is always in
flight. Ratios are taken within a round, medians are told with the least and the greatest. What a save costs is what the
steps with saves take longer, over the saves that were made; once a minute it costs that in 60 seconds. The last
checkpoint is read back and compared. Nothing here passes or fails by its speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from plots import Panel
from train import SIZES, Words

from harness.bench.rounds import Contender, Rounds, Seconds, Spread, run_rounds, spread
from harness.checkpoint import Manager, State, keep_last, open_checkpoint
from harness.config import Config, Horovod
from harness.env import identify
from harness.update import Update
from harness.world import bring_up

comm = MPI.COMM_WORLD
NONE = "no saves"


class Training:
    """Steps of one rank, with or without saves."""

    def __init__(self, model: str, tokens: int) -> None:
        self.task = Words(model, tokens)
        x, y = self.task.data("train")[comm.rank]
        self.batch = x[None], y[None]
        self.model = self.task.model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        told = {"name": "bench", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": comm.size}}
        self.update = Update(
            self.model,
            self.optimizer,
            train=Config.model_validate(told).train,
            horovod=Horovod(),
            passes=1,
            ranks=comm.size,
            device=torch.device("cpu"),
        )
        self.state = State(model=self.model, optimizer=self.optimizer)
        self.done = 0

    def step(self) -> None:
        self.update.begin(1.0)
        self.update.backward(self.task.loss(self.model, self.batch))
        self.update.synchronize()
        self.update.step()
        self.done += 1

    def turn(self, name: str, manager: Manager | None, steps: int, number: int) -> Seconds:
        """Seconds of a step; how many saves began in a turn, and how long one held the step up."""
        self.step()
        comm.Barrier()
        began, held_up, saves = time.perf_counter(), 0.0, 0
        for _ in range(steps):
            self.step()
            if manager is not None:
                asked = time.perf_counter()
                saves += manager.save(self.done, self.state) is not None
                held_up += time.perf_counter() - asked
        seconds = time.perf_counter() - began
        if manager is None:
            return {name: seconds / steps}
        manager.wait()
        return {name: seconds / steps, f"{name}, saves": saves, f"{name}, held up": held_up / max(1, saves)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SIZES, default="25M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of a turn, after one that does not count")
    parser.add_argument("--tokens", type=int, default=64, help="per rank and step")
    parser.add_argument("--directory", type=Path, default=Path("bench-behind"))
    parser.add_argument("--panel", type=Path, help="a file for what is to be plotted (plots.py)")
    parser.add_argument("--quick", action="store_true", help="only whether it works")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds, args.steps, args.tokens = "tiny", 1, 3, 8

    torch.set_num_threads(1)
    world = bring_up(identify(), Horovod(), args.directory)
    training = Training(args.model, args.tokens)
    managers = {
        mode: Manager(
            args.directory / mode, world.comm, keep=keep_last(1), lazy=mode == "lazy", check_replicas=0, log=quiet
        )
        for mode in ("background", "lazy")
    }
    contenders = [Contender(NONE, partial(training.turn, NONE, None, args.steps))] + [
        Contender(name, partial(training.turn, name, manager, args.steps)) for name, manager in managers.items()
    ]
    rounds = run_rounds(contenders, args.rounds, world.comm)
    for manager in managers.values():
        path = manager.save(training.done, training.state, wait=True)
        manager.close()
        if comm.rank == 0 and path is not None:
            with open_checkpoint(path) as checkpoint:
                for name, parameter in training.model.named_parameters():
                    assert np.array_equal(checkpoint.read(f"model/{name}"), parameter.detach().numpy()), name
    if comm.rank == 0:
        report(args, training, list(managers), rounds)
        if args.panel is not None:
            bars = {name: rounds.ratio(name, NONE) for name in (*managers, NONE)}
            Panel(f"{args.model} parameters, {comm.size} ranks: step, x {NONE}", bars, list(managers)).save(args.panel)
        shutil.rmtree(args.directory)


def quiet(line: str) -> None:
    if line.startswith("warning"):
        print(line)


def cost(rounds: Rounds, name: str, steps: int) -> Spread:
    """Seconds that a save adds to the steps in front of it."""
    return spread((one[name] - one[NONE]) * steps / max(1.0, one[f"{name}, saves"]) for one in rounds.table[1:])


def report(args: argparse.Namespace, training: Training, names: list[str], rounds: Rounds) -> None:
    """A row for each way to save."""
    nbytes = 12 * sum(parameter.numel() for parameter in training.model.parameters())
    print(
        f"\n{args.model}: {nbytes / 2**20:.0f} MiB of state, {comm.size} ranks; {args.rounds} rounds, medians;", end=""
    )
    print(f" a step without saves {rounds.seconds(NONE).median * 1e3:.1f} ms; load {os.getloadavg()[0]:.1f}\n")
    print("| saves | step, x without | saves in a turn | a save holds up | a save costs | once a minute |")
    print("|---|---|---|---|---|---|")
    for name in names:
        saves, held_up = (rounds.seconds(f"{name}, {what}").median for what in ("saves", "held up"))
        each = cost(rounds, name, args.steps)
        least, median, most = (f"{seconds * 1e3:.0f}" for seconds in (each.least, each.median, each.most))
        print(
            f"| {name} | {rounds.ratio(name, NONE)} | {saves:g} in {args.steps} steps | {held_up * 1e3:.1f} ms"
            f" | {median} ms ({least} to {most}) | {each.median / 60:.2%} |"
        )


if __name__ == "__main__":
    main()
