"""How long a training step takes: Harness beside a bare Horovod loop and torch's DistributedDataParallel (gloo).

    mpirun -np 2 python tests/bench/train.py --model 25M --rounds 15 [--bucket 8 25 64]

One thread per rank, a GPT with tied embeddings, the same batches and plain SGD for all. In each round every contender
takes the same number of steps, one contender after the other, forwards and backwards in turn; a step's time is the
slowest rank's, ratios are taken within a round, and their median is told. Horovod is shut down while others are
measured, because its thread would disturb them; it packs what it packs by default. In the end all must have the same
parameters. CPU is what all threads of a rank used in a step. It is no test: nothing here passes or fails by its speed.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI

import harness.update
from harness.config import Horovod, Train

comm = MPI.COMM_WORLD
SIZES = {"1M": (1000, 128, 4, 4), "25M": (12000, 512, 6, 8), "126M": (50304, 768, 12, 12)}
"""Vocabulary, width, layers, heads."""


class Block(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.blocks(self.token(x) + self.place.weight[: x.shape[1]]))
        return torch.nn.functional.linear(y, self.token.weight)


class Contender:
    """A model and how it takes a step. `make` returns the step, which is given the loss's function."""

    def __init__(self, name: str, model: GPT, make: Callable[[GPT], Callable[..., None]], fusion: int | None) -> None:
        self.name, self.model = name, model
        self.fusion = None if fusion is None else str(fusion)
        """HOROVOD_FUSION_THRESHOLD; None: without Horovod."""
        self.step = make(model)
        self.rounds: list[tuple[float, float]] = []


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return torch.nn.functional.cross_entropy(out.view(-1, out.shape[-1]), y.view(-1))


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2)


def alone(model: GPT) -> Callable[..., None]:
    """No communication: every rank trains by itself."""
    optimizer = sgd(model)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ddp(model: GPT) -> Callable[..., None]:
    """DistributedDataParallel as its documentation shows it."""
    wrapped, optimizer = torch.nn.parallel.DistributedDataParallel(model), sgd(model)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss_of(wrapped, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_horovod(model: GPT) -> Callable[..., None]:
    """Horovod as its documentation shows it."""
    import horovod.torch as hvd

    optimizer: Any = hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters())

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(mebibytes: float, nonfinite: str = "ignore") -> Callable[[GPT], Callable[..., None]]:
    """The update of a run; with "ignore" without its look at the gradient's norm, which the others do not have."""

    def make(model: GPT) -> Callable[..., None]:
        update = harness.update.Update(
            model,
            sgd(model),
            train=Train.model_validate({"steps": 1, "global_batch": comm.size, "nonfinite": nonfinite}),
            horovod=Horovod(bucket=int(mebibytes * 2**20)),
            passes=1,
            ranks=comm.size,
            device=torch.device("cpu"),
        )

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            update.begin(1.0)
            update.backward(loss_of(model, x, y))
            update.synchronize()
            update.step()

        return step

    return make


def used() -> float:
    """CPU seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(contenders: list[Contender], args: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> None:
    import horovod.torch as hvd

    ends = time.monotonic() + args.seconds
    for number in range(args.rounds + 1):
        for contender in contenders if number % 2 else contenders[::-1]:
            if hvd.is_initialized() and os.environ["HOROVOD_FUSION_THRESHOLD"] != contender.fusion:
                hvd.shutdown()
            if contender.fusion is not None and not hvd.is_initialized():
                os.environ["HOROVOD_FUSION_THRESHOLD"] = contender.fusion
                hvd.init(comm=comm)
            times = []
            for take in range(args.steps + 1):
                comm.Barrier()
                began, cpu = time.perf_counter(), used()
                contender.step(x, y)
                mine = time.perf_counter() - began, used() - cpu
                if take:  # the first one warms caches that another contender has filled
                    times.append(tuple(comm.allreduce(value, MPI.MAX) for value in mine))
            if number:
                contender.rounds.append(tuple(map(statistics.median, zip(*times, strict=True))))  # type: ignore[arg-type]
        if comm.bcast(time.monotonic() > ends):
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SIZES, default="25M")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="per contender and round, after one that does not count")
    parser.add_argument("--tokens", type=int, default=64, help="per rank and step")
    parser.add_argument("--bucket", type=float, nargs="+", default=[Horovod().bucket / 2**20], help="MiB")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--seconds", type=float, default=300, help="no new round after this")
    args = parser.parse_args()

    torch.set_num_threads(1)
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"  # with HOROVOD_CYCLE_TIME set, too, Horovod starts only once
    import horovod.torch as hvd

    hvd.init(comm=comm)
    port = comm.bcast(20000 + os.getpid() % 20000)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size
    )
    makers: list[tuple[str, Callable[[GPT], Callable[..., None]], int | None]] = [
        ("no communication", alone, None),
        ("DDP", ddp, None),
        ("bare Horovod", bare_horovod, 128 * 2**20),
        ("harness, norm", ours(args.bucket[0], "stop"), 0),
        *((f"harness {mebibytes:g} MiB", ours(mebibytes), 0) for mebibytes in args.bucket),
    ]
    contenders = []
    for name, make, fusion in makers:
        if name not in args.without:
            torch.manual_seed(0)
            contenders.append(Contender(name, GPT(*SIZES[args.model], args.tokens), make, fusion))
    generator = torch.Generator().manual_seed(comm.rank)
    x, y = torch.randint(0, SIZES[args.model][0], (2, 1, args.tokens), generator=generator)
    measure(contenders, args, x, y)

    if comm.rank == 0:
        report(contenders)
    together = [contender for contender in contenders if contender.name != "no communication"]
    for contender in together[1:]:
        for a, b in zip(together[0].model.parameters(), contender.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.distributed.destroy_process_group()


def report(contenders: list[Contender]) -> None:
    parameters = sum(parameter.numel() for parameter in contenders[0].model.parameters())
    rounds, load = len(contenders[0].rounds), os.getloadavg()[0]
    print(f"{parameters / 1e6:.1f}M parameters, {comm.size} ranks; {rounds} rounds, medians; load {load:.1f}")
    reference = next((contender for contender in contenders if contender.name == "DDP"), contenders[0])
    for contender in contenders:
        seconds, cpu = (statistics.median(values) for values in zip(*contender.rounds, strict=True))
        ratios = sorted(mine[0] / its[0] for mine, its in zip(contender.rounds, reference.rounds, strict=True))
        print(
            f"{contender.name:<18} {seconds * 1e3:8.1f} ms   {statistics.median(ratios):5.2f} x {reference.name}"
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f})   best {min(contender.rounds)[0] * 1e3:.1f} ms"
            f"   CPU {cpu * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    main()
