"""How long saves take and hold training up, beside the raw limit of the same disk and Horovod's own advice.

    mpirun -np 2 python tests/bench/saves.py --size 512 --tensors 450 --rounds 7 --directory /scratch/me

In each round, one after the other: plain writes of the same bytes by the same ranks (around the page cache where the
file system can, else buffered; synced), `Manager.save` until it is durable, rank 0's `torch.save` with fsync. Times are
the slowest rank's, ratios are taken within a round, medians over the rounds after the first one. What was written is
read back and compared. It is no test: nothing here passes or fails by its speed.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from harness.checkpoint import Manager, State, keep_last, open_checkpoint
from harness.checkpoint.staging import IMAGE

comm = MPI.COMM_WORLD


def timed(work: Callable[[], object]) -> float:
    """Seconds until the slowest rank is through."""
    comm.Barrier()
    began = time.perf_counter()
    work()
    return float(comm.allreduce(time.perf_counter() - began, MPI.MAX))


def raw(path: Path, memory: mmap.mmap) -> None:
    """Plain positioned writes of this rank's share, synced."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT)
    except OSError:  # the file system has no such writes
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    view = memoryview(memory)
    for at in range(0, len(view), IMAGE):
        os.pwrite(descriptor, view[at : at + IMAGE], at)
    os.fdatasync(descriptor)
    os.close(descriptor)


def by_rank0(path: Path, state: dict[str, torch.Tensor]) -> None:
    """What Horovod's documentation advises, made durable."""
    if comm.rank == 0:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    comm.Barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=512, help="MiB of state")
    parser.add_argument("--tensors", type=int, default=450)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("bench-saves"))
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(1)
    count = (args.size << 20) // 4 // args.tensors
    state = {f"t{index:06d}": torch.randn(count, generator=generator) for index in range(args.tensors)}
    share = (args.size << 20) // comm.size // mmap.PAGESIZE * mmap.PAGESIZE
    memory = mmap.mmap(-1, share)
    memory.write(os.urandom(1 << 20) * (share >> 20) + bytes(share & ((1 << 20) - 1)))
    source, target = np.frombuffer(memory, np.uint8), np.ones(share, np.uint8)
    if comm.rank == 0:
        args.directory.mkdir(parents=True, exist_ok=True)
    comm.Barrier()

    manager = Manager(args.directory / "checkpoints", keep=keep_last(1), check_replicas=0)
    rounds = []
    for number in range(args.rounds):
        seconds = {"raw": timed(lambda: raw(args.directory / f"raw-{comm.rank}", memory))}
        seconds["memcpy"] = timed(lambda: np.copyto(target, source))
        held_up: list[float] = []

        def save(step: int = number, held_up: list[float] = held_up) -> None:
            began = time.perf_counter()
            manager.save(step, State(tensors=state))
            held_up.append(time.perf_counter() - began)
            manager.wait()

        seconds["save"] = timed(save)
        seconds["held up"] = float(comm.allreduce(held_up[0], MPI.MAX))
        seconds["rank 0 torch.save"] = timed(lambda: by_rank0(args.directory / "rank0.pt", state))
        rounds.append(seconds)
    manager.close()

    if comm.rank == 0:
        with open_checkpoint(args.directory / "checkpoints" / f"step-{args.rounds - 1:08d}") as checkpoint:
            for name in list(state)[:: max(1, len(state) // 20)]:
                assert np.array_equal(checkpoint.read(f"tensors/{name}"), state[name].numpy()), name
        print(f"{comm.size} ranks, {args.size} MiB in {args.tensors} tensors; {args.rounds - 1} rounds, medians")
        print(f"first save of these tensors {rounds[0]['save'] / rounds[0]['raw']:.2f} x raw writes")
        for name, other in (("save", "raw"), ("rank 0 torch.save", "raw"), ("held up", "memcpy")):
            ratios = sorted(seconds[name] / seconds[other] for seconds in rounds[1:])
            median = statistics.median(ratios)
            print(f"{name:<18} {median:6.2f} x {other}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        shutil.rmtree(args.directory)


if __name__ == "__main__":
    main()
