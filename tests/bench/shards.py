"""What a sharded optimizer saves: memory of each rank, bytes sent and time, beside the whole optimizer.

    mpirun -np 4 python tests/bench/shards.py --million 25

AdamW on a stack of linear layers, the same steps with `parallel.optimizer_shards` none and all, in rounds. Memory is
counted tensor by tensor, and beside it what the process has grown by (resident, after the first steps). Theory: whole,
a rank has 2 numbers of state per parameter; cut over n ranks, 2 / n, and 2 / n more for the slices and their gradients.
It is no test: nothing here passes or fails by its speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import horovod.torch as hvd
import psutil
import torch
from mpi4py import MPI

from harness.config import Horovod, Optim, Train
from harness.optim import make_optimizer
from harness.parallel.groups import arrange, groups_of
from harness.update import Update, shard

comm = MPI.COMM_WORLD
WIDTH = 512


def build(million: float) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = max(1, round(million * 1e6 / WIDTH**2))
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def make(model: torch.nn.Module, *, cut: bool) -> Update:
    settings, parameters, sharded = Horovod(), list(model.parameters()), None
    if cut:
        everybody = {tuple(range(comm.size)): hvd.global_process_set}
        groups = groups_of(arrange(["here"] * comm.size), comm.rank, everybody, "all")
        sharded, parameters = shard(model, parameters, settings, groups)
    return Update(
        model,
        make_optimizer(parameters, Optim(), lr=1e-4),
        train=Train(steps=1, global_batch=comm.size),
        horovod=settings,
        passes=1,
        ranks=comm.size,
        device=torch.device("cpu"),
        sharded=sharded,
    )


def step(model: torch.nn.Module, update: Update, x: torch.Tensor) -> float:
    comm.Barrier()
    began = time.perf_counter()
    update.backward(model(x).pow(2).mean())
    update.synchronize()
    update.step()
    return float(comm.allreduce(time.perf_counter() - began, MPI.MAX))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--million", type=float, default=25, help="parameters")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init(comm=comm)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(comm.rank))
    process, found = psutil.Process(), []
    for name, cut in (("none", False), ("all", True)):
        model = build(args.million)
        before = process.memory_info().rss
        update = make(model, cut=cut)
        step(model, update, x)
        grown = process.memory_info().rss - before
        state = [tensor for values in update.optimizer.state.values() for tensor in values.values()]
        own: list[Any] = [0] if not cut else [p.nbytes * 2 for g in update.optimizer.param_groups for p in g["params"]]
        sent = update.sent
        found.append((name, model, update, sum(tensor.nbytes for tensor in state), sum(own), grown, sent))
    for a, b in zip(found[0][1].parameters(), found[1][1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    times: dict[str, list[float]] = {"none": [], "all": []}
    for _ in range(args.rounds):
        for name, model, update, *_ in found:
            times[name].append(step(model, update, x))
    nbytes = sum(parameter.nbytes for parameter in found[0][1].parameters())
    lines = []
    for name, _, _, *numbers in found:
        state, own, grown, sent = (comm.allreduce(number, MPI.MAX) / 2**20 for number in numbers)
        lines.append(
            f"{name:<5} state {state:8.1f} MiB   slices {own:7.1f} MiB   grown by {grown:8.1f} MiB"
            f"   sent {sent:7.1f} MiB per step   {statistics.median(times[name]) * 1e3:8.1f} ms"
        )
    if comm.rank == 0:
        print(f"{comm.size} ranks, {nbytes / 2**20:.1f} MiB of parameters; the most of any rank; medians")
        print(*lines, sep="\n")
        ratios = sorted(cut / whole for whole, cut in zip(times["none"], times["all"], strict=True))
        print(f"a step takes {statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
