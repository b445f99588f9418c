"""How long a training step takes: Harness beside Horovod by hand and torch's DistributedDataParallel (gloo).

    mpirun -np 2 python tests/bench/train.py --model 25M --rounds 15 [--bucket 8 64] [--quick]

One thread per rank, a GPT with tied embeddings, the same batches and plain SGD for all. In each round every contender
takes the same number of steps, one contender after the other, forwards and backwards in turn; a step's time is the
slowest rank's, ratios are taken within a round, and their median is told with the least and the greatest. Horovod is
shut down while others are measured, because its thread would disturb them. In the end all must have the same
parameters. CPU is what all threads of a rank used in a step. Nothing here passes or fails by its speed.

no communication    every rank trains by itself: what communication costs is counted from here
DDP                 DistributedDataParallel, as its documentation shows it
Horovod's example   DistributedOptimizer and broadcast_parameters, as Horovod's documentation shows them
bare Horovod loop   the least that somebody would write who knows what is fast: gradients in flat buffers that leave
                    as they fill, and nothing else: no check of the loss or the gradient, no clock, no data order
harness             a whole step of a run (`harness.loop.take_step`), the gradient's norm and the data included
harness, no loop    the update of a run (`harness.update.Update`) with a ready batch
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from plots import Panel
from torch import Tensor

from harness.bench.rounds import Contender, Rounds, Seconds, run_rounds
from harness.clock import Clock
from harness.config import Config, Horovod
from harness.env import identify
from harness.job import build
from harness.loop import batches_of, take_step
from harness.rundir import RunDir
from harness.task import Task
from harness.update import Update
from harness.world import World, bring_up

comm = MPI.COMM_WORLD
SIZES = {"tiny": (100, 32, 2, 2), "1M": (1000, 128, 4, 4), "25M": (12000, 512, 6, 8), "126M": (50304, 768, 12, 12)}
"""Vocabulary, width, layers, heads."""
LR = 1e-2
Step = Callable[[], None]


class Block(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[0], x.shape[1], 3, self.heads, x.shape[2] // self.heads
        q, k, v = self.qkv(self.before(x)).view(shape).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.down(torch.nn.functional.gelu(self.up(self.between(x))))


class GPT(torch.nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.token, self.place = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(context, width)
        self.blocks = torch.nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = torch.nn.LayerNorm(width)
        torch.nn.init.normal_(self.token.weight, std=0.02)  # else the loss is so steep that rounding errors grow
        torch.nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.blocks(self.token(x) + self.place.weight[: x.shape[1]]))
        return torch.nn.functional.linear(y, self.token.weight)


class Tokens(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """One sample for each rank, always the same."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __len__(self) -> int:
        return int(comm.size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(int(index))
        x, y = torch.randint(0, self.vocabulary, (2, self.length), generator=generator)
        return x, y


class Words(Task):
    """The GPT as a task of Harness."""

    def __init__(self, size: str, tokens: int) -> None:
        self.size, self.tokens = SIZES[size], tokens

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return GPT(*self.size, self.tokens)

    def data(self, split: str) -> Any:
        return Tokens(self.size[0], self.tokens) if split == "train" else None

    def loss(self, model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        out = model(batch[0])
        return torch.nn.functional.cross_entropy(out.view(-1, out.shape[-1]), batch[1].view(-1))


@dataclass
class Bench:
    """What contenders are made of: the same task, this rank's batch."""

    task: Words
    world: World
    folder: Path
    args: argparse.Namespace

    def __post_init__(self) -> None:
        x, y = self.task.data("train")[comm.rank]
        self.batch = x[None], y[None]

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        return self.task.loss(model, self.batch)

    def sgd(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=LR)

    def config(self, bucket: float | None = None) -> Config:
        """Of a run that takes the same steps. bucket: MiB."""
        told: dict[str, Any] = {
            "name": "bench",
            "task": {"name": "__main__:Words", "args": {"size": self.args.model, "tokens": self.args.tokens}},
            "data": {"shuffle": False},
            "train": {"steps": 10**6, "global_batch": comm.size},
            "optim": {"name": "sgd", "lr": LR},
            "horovod": {} if bucket is None else {"bucket": int(bucket * 2**20)},
        }
        return Config.model_validate(told)


def alone(bench: Bench) -> tuple[torch.nn.Module, Step]:
    model = bench.task.model()
    optimizer = bench.sgd(model)

    def step() -> None:
        bench.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def ddp(bench: Bench) -> tuple[torch.nn.Module, Step]:
    model = bench.task.model()
    wrapped, optimizer = torch.nn.parallel.DistributedDataParallel(model), bench.sgd(model)

    def step() -> None:
        bench.loss(wrapped).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def example(bench: Bench) -> tuple[torch.nn.Module, Step]:
    import horovod.torch as hvd

    model = bench.task.model()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer: Any = hvd.DistributedOptimizer(bench.sgd(model), named_parameters=model.named_parameters())

    def step() -> None:
        optimizer.zero_grad()
        bench.loss(model).backward()
        optimizer.step()

    return model, step


def bare(bench: Bench) -> tuple[torch.nn.Module, Step]:
    import horovod.torch as hvd

    model = bench.task.model()
    optimizer = bench.sgd(model)
    groups: list[list[torch.nn.Parameter]] = [[]]
    for parameter in reversed(list(model.parameters())):
        if sum(other.numel() for other in groups[-1]) + parameter.numel() > 25 * 2**20 // 4 and groups[-1]:
            groups.append([])
        groups[-1].append(parameter)
    handles: list[Any] = []

    def fill(number: int, group: list[torch.nn.Parameter]) -> Tensor:
        flat = torch.zeros(sum(parameter.numel() for parameter in group))
        missing, at = len(group), 0

        def arrived(parameter: Tensor) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                missing = len(group)
                handles.append(hvd.allreduce_async_(flat, name=f"bare/{number}", op=hvd.Average))

        for parameter in group:
            parameter.grad = flat[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
            parameter.register_post_accumulate_grad_hook(arrived)
        return flat

    flats = [fill(number, group) for number, group in enumerate(groups)]

    def step() -> None:
        bench.loss(model).backward()
        while handles:
            hvd.synchronize(handles.pop(0))
        optimizer.step()
        for flat in flats:
            flat.zero_()

    return model, step


def harness(bench: Bench, bucket: float | None = None) -> tuple[torch.nn.Module, Step]:
    job = build(bench.config(bucket), RunDir(bench.folder), 1, bench.world, Clock())
    batches, done = batches_of(job, 0).__enter__(), 0

    def step() -> None:
        nonlocal done
        take_step(job, batches, done)
        done += 1

    return job.model, step


def no_loop(bench: Bench) -> tuple[torch.nn.Module, Step]:
    model, config = bench.task.model(), bench.config()
    update = Update(
        model,
        bench.sgd(model),
        train=config.train,
        horovod=config.horovod,
        passes=1,
        ranks=comm.size,
        device=torch.device("cpu"),
    )

    def step() -> None:
        update.begin(1.0)
        update.backward(bench.loss(model))
        update.synchronize()
        update.step()

    return model, step


def used() -> float:
    """CPU seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def turn(name: str, step: Step, fusion: int | None, steps: int, number: int) -> Seconds:
    """Seconds and CPU seconds of a step. fusion: HOROVOD_FUSION_THRESHOLD; None: without Horovod."""
    import horovod.torch as hvd

    if hvd.is_initialized() and os.environ["HOROVOD_FUSION_THRESHOLD"] != str(fusion):
        hvd.shutdown()
    if fusion is not None and not hvd.is_initialized():
        os.environ["HOROVOD_FUSION_THRESHOLD"] = str(fusion)
        hvd.init(comm=comm)
    step()  # it warms caches that another contender has filled
    comm.Barrier()
    began, cpu = time.perf_counter(), used()
    for _ in range(steps):
        step()
    return {name: (time.perf_counter() - began) / steps, f"{name}, CPU": (used() - cpu) / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SIZES, default="25M")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="per contender and round, after one that does not count")
    parser.add_argument("--tokens", type=int, default=64, help="per rank and step")
    parser.add_argument("--bucket", type=float, nargs="+", default=[], help="MiB, besides the default")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--panel", type=Path, help="a file for what is to be plotted (plots.py)")
    parser.add_argument("--quick", action="store_true", help="only whether it works")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds, args.steps, args.tokens = "tiny", 1, 1, 8

    torch.set_num_threads(1)
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"  # with HOROVOD_CYCLE_TIME set, too, Horovod starts only once
    folder = tempfile.TemporaryDirectory() if comm.rank == 0 else None
    path = Path(comm.bcast(folder.name if folder is not None else ""))
    world = bring_up(identify(), Horovod(), path)
    port = comm.bcast(20000 + os.getpid() % 20000)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size
    )
    bench = Bench(Words(args.model, args.tokens), world, path, args)
    makers: dict[str, tuple[Callable[[Bench], tuple[torch.nn.Module, Step]], int | None]] = {
        "no communication": (alone, None),
        "DDP": (ddp, None),
        "Horovod's example": (example, 128 * 2**20),
        "bare Horovod loop": (bare, 0),
        "harness": (harness, 0),
        "harness, no loop": (no_loop, 0),
    }
    makers |= {f"harness, {size:g} MiB": (partial(harness, bucket=size), 0) for size in args.bucket}
    made = {name: (*make(bench), fusion) for name, (make, fusion) in makers.items() if name not in args.without}
    contenders = [
        Contender(name, partial(turn, name, step, fusion, args.steps)) for name, (_, step, fusion) in made.items()
    ]
    rounds = run_rounds(contenders, args.rounds, world.comm)
    if comm.rank == 0:
        report(args.model, made["harness"][0], list(made), rounds)
        if args.panel is not None:
            panel(args.model, list(made), rounds).save(args.panel)
    models = [model for name, (model, *_) in made.items() if name != "no communication"]
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.distributed.destroy_process_group()
    if folder is not None:
        folder.cleanup()


def report(name: str, model: torch.nn.Module, names: list[str], rounds: Rounds) -> None:
    """A row for each contender."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    count, load = rounds.seconds("harness").count, os.getloadavg()[0]
    print(
        f"\n{name}: {parameters / 1e6:.1f}M parameters, {comm.size} ranks; {count} rounds, medians; load {load:.1f}\n"
    )
    others = [other for other in ("DDP", "bare Horovod loop") if other in names]
    print(f"| contender | step | {' | '.join(f'x {other}' for other in others)} | communication | CPU of a step |")
    print(f"|---|---|{'---|' * len(others)}---|---|")
    for one in names:
        share = 1 - rounds.ratio("no communication", one).median
        ratios = " | ".join(str(rounds.ratio(one, other)) for other in others)
        step, cpu = rounds.seconds(one).median * 1e3, rounds.seconds(f"{one}, CPU").median * 1e3
        print(f"| {one} | {step:.1f} ms | {ratios} | {share:.0%} | {cpu:.1f} ms |")


def panel(name: str, names: list[str], rounds: Rounds) -> Panel:
    """Steps beside those of DDP; beside the first contender's where that was left out."""
    base = "DDP" if "DDP" in names else names[0]
    bars = {one: rounds.ratio(one, base) for one in reversed(names)}
    return Panel(
        f"{name} parameters, {comm.size} ranks: step, x {base}", bars, [one for one in names if "harness" in one]
    )


if __name__ == "__main__":
    main()
