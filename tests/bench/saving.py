"""The ranks of `checkpoints.py`: all contenders save and restore each workload, in turns, in rounds.

    mpirun -np 2 python tests/bench/saving.py --folder scratch --out found.json --scale 0.1 --rounds 3 A B

In each round and for each contender: other numbers, a save until files and folders are synced, a restore with the page
cache dropped before, one more, and after each a look whether all bytes are what was saved. The limit is what the same
ranks reach with plain writes and reads of the same bytes. Rank 0 writes the seconds of the slowest rank as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from contenders import Absent, Way, ways, world
from workloads import NAMES, Workload, make

from harness.bench import raw
from harness.bench.checkpoints import Plain
from harness.bench.contents import change, digest, wipe
from harness.bench.rounds import Contender, run_rounds, timed
from harness.bench.saves import Ours, total, traffic
from harness.checkpoint.blocks import SEGMENT, THREADS
from harness.checkpoint.comm import Mpi
from harness.checkpoint.commit import sync_directory
from harness.checkpoint.engines import EngineName
from harness.checkpoint.engines.filesystem import filesystem
from harness.checkpoint.pages import aligned
from harness.checkpoint.tensors import Bytes

WITH_BB = ("rank-0 torch.save",)
"""What saves BB besides ours: it is there for the first save of many tensors."""


class Theirs:
    """One contender, for `run_rounds`."""

    def __init__(self, way: Way, folder: Path, workload: Workload, comm: Mpi) -> None:
        self.way, self.folder, self.workload, self.comm = way, folder, workload, comm

    def work(self, number: int) -> dict[str, float]:
        tensors, name = self.workload.training.tensors, self.way.name
        change(tensors)
        _fresh(self.folder)
        watch = Memory() if number == 0 else None
        held: list[float | None] = []
        seconds = timed(lambda: held.append(self.way.save(self.folder, self.workload)), self.comm)
        found = {f"save {name}": seconds, f"held up {name}": seconds if held[0] is None else held[0]}
        if watch is not None:
            found[f"memory {name}"] = watch.added()
        saved = digest(tensors)
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        for kind, restore in self.way.restores.items():
            for heat in ("cold", "warm"):
                self.comm.barrier()
                if heat == "cold":
                    raw.drop(files)
                wipe(tensors)
                before = traffic()
                found[f"{heat} {kind}"] = timed(lambda: restore(self.folder, self.workload), self.comm)  # noqa: B023
                if heat == "cold":
                    found[f"device {kind}"] = total(before, traffic(), self.comm).device
                _compare(saved, tensors, f"{name}, {kind}")
        _fresh(self.folder)
        return found


class OursToo:
    """One of our engines, for `run_rounds`. `restores`: also reads what it has saved.

    It holds no memory between rounds: that of all contenders would be too much. So it saves once before the save that
    counts, as a training does that saves again and again; in the first round the first save counts.
    """

    def __init__(self, make: Callable[[], Ours], *, restores: bool) -> None:
        self.make, self.restores, self.cold = make, restores, True

    def work(self, number: int) -> dict[str, float]:
        watch = Memory() if number == 0 else None
        ours = self.make()
        found = ours.save(number)
        if watch is not None:
            found[f"memory {ours.name}"] = watch.added()
        else:
            found |= ours.save(number)
        if self.restores:
            found |= {key.replace("restore ", "") + " ours": value for key, value in ours.restore(number).items()}
            found["device ours"], found["called ours"] = ours.read.device, ours.read.called
            self.cold = self.cold and ours.cold
        ours.close()
        return found


class Placed:
    """What no restore can do without: plain reads of this rank's share, while as many bytes are copied as it restores.

    Threads read ahead, as ours do; the copies are from memory to memory, without tensors, digests or other ranks.
    """

    def __init__(self, folder: Path, comm: Mpi, size: int) -> None:
        self.path, self.comm, self.way = folder / f"placed-{comm.rank}", comm, raw.ways(folder)[0]
        self.share = raw.pages(-(-size // comm.size))

    def work(self, number: int) -> dict[str, float]:
        data, target = aligned(self.share), aligned(self.share)
        data[:], target[:] = number, 1
        raw.write(self.path, data, self.way)
        raw.drop([self.path])
        self.comm.barrier()
        found = {"read and copied": timed(lambda: self._read(data, target), self.comm)}
        self.path.unlink()
        return found

    def _read(self, data: Bytes, target: Bytes) -> None:
        def read(at: int) -> int:
            raw.read(self.path, data[at : at + SEGMENT], self.way, offset=at)
            return at

        with ThreadPoolExecutor(THREADS) as pool:
            for at in pool.map(read, range(0, self.share, SEGMENT)):
                for _ in range(self.comm.size):
                    target[at : at + SEGMENT] = data[at : at + SEGMENT]


class Memory:
    """How much more memory this process has had at its peak than when this was made, in bytes. Linux."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        self.before = psutil.Process().memory_info().rss

    def added(self) -> float:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return float(int(lines["VmHWM"].split()[0]) * 1024 - self.before)


def _compare(saved: str, tensors: Any, what: str) -> None:
    if digest(tensors) != saved:
        raise AssertionError(f"rank {world.rank}: {what}: what was restored is not what was saved")


def _fresh(folder: Path) -> None:
    """Empty, on all ranks."""
    world.Barrier()
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sync_directory(folder.parent)
    world.Barrier()


def tried(others: list[Way | Absent], folder: Path, comm: Mpi) -> list[Way | Absent]:
    """The same; those that fail with a small state, here and now, are absent for that reason."""
    found: list[Way | Absent] = []
    for way in others:
        problem = None
        if isinstance(way, Way):
            try:
                Theirs(way, folder / "tried", make("D", 0.001, comm.rank, comm.size), comm).work(1)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"[:300]
        told = [str(one) for one in comm.all_gather(problem) if one is not None]
        found.append(Absent(way.name, told[0]) if told else way)
    return found


def measure(name: str, args: argparse.Namespace, others: list[Way | Absent], comm: Mpi) -> dict[str, Any]:
    workload = make(name, args.scale, comm.rank, comm.size)
    skipped = {one.name: one.why for one in others if isinstance(one, Absent)}
    plain = Plain(args.folder, comm, workload.nbytes)
    placed = Placed(args.folder, comm, workload.nbytes)
    kinds: list[tuple[str, EngineName]] = [("direct", "direct"), ("mpio", "mpio")]
    if name in ("A", "BB"):  # only an optimizer's state can wait
        kinds.append(("lazy", "direct"))
    ours = []
    for kind, engine in kinds:
        one = partial(Ours, kind, args.folder, comm, workload.training, engine=engine, lazy=kind == "lazy")
        ours.append(OursToo(one, restores=kind == "direct"))
    contenders = [Contender("plain", plain.work), Contender("plain reads and copies", placed.work)]
    contenders += [Contender(kind, one.work) for (kind, _), one in zip(kinds, ours, strict=True)]
    for way in others:
        if isinstance(way, Way) and (name != "BB" or way.name in WITH_BB):
            contenders.append(Contender(way.name, Theirs(way, args.folder / "theirs", workload, comm).work))
    began = time.perf_counter()

    def told(number: int, contender: str) -> None:
        if comm.rank == 0:
            print(
                f"{time.perf_counter() - began:6.0f} s  {name}, round {number} of {args.rounds}: {contender}",
                flush=True,
            )

    rounds = run_rounds(contenders, args.rounds, comm, told=told)
    return {
        "workload": name,
        "ranks": comm.size,
        "scale": args.scale,
        "bytes": workload.nbytes,
        "tensors": workload.count,
        "filesystem": filesystem(args.folder),
        "cold": plain.cold and all(one.cold for one in ours),
        "skipped": skipped,
        "rounds": [dict(one) for one in rounds.table],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workloads", nargs="+", choices=NAMES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = Mpi(world)
    try:
        others = tried(ways(), args.folder, comm)
        found = [measure(name, args, others, comm) for name in args.workloads]
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stderr.flush()
        world.Abort(1)  # the others wait for this rank
        raise
    if comm.rank == 0:
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
