"""The ranks of `harness ckpt bench`: plain writes and reads, each engine, lazy mode, digests; in turns, in rounds.

    mpirun -np 2 python -m harness.bench.checkpoints FOLDER '{"size": 8589934592, "tensors": 450, "rounds": 5,
                                                              "engines": ["direct", "mpio"]}'

FOLDER is empty and for this alone; whoever started the ranks removes it. Rank 0 prints a line `HARNESS_BENCH {json}`
before each measurement and for the result; a rank that fails prints one, too, and ends the others.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.bench import raw
from harness.bench.contents import fill
from harness.bench.memory import available
from harness.bench.rounds import Contender, Rounds, run_rounds, timed
from harness.bench.saves import Ours, without_digests
from harness.bench.state import Training, lengths, make
from harness.checkpoint import Comm, detect
from harness.checkpoint.digest import block_digests
from harness.checkpoint.engines.filesystem import filesystem
from harness.checkpoint.engines.mpio import unavailable
from harness.checkpoint.pages import aligned
from harness.env import identify
from harness.errors import Exit, HarnessError, StorageError, Unavailable
from harness.units import show_size

MARK = "HARNESS_BENCH "
BLOCK = 4 << 20


@dataclass(frozen=True)
class Wanted:
    """What to measure: bytes and tensors of the state, rounds after the first one, names of engines."""

    size: int
    tensors: int
    rounds: int
    engines: tuple[str, ...]


def measure(wanted: Wanted, folder: Path, comm: Comm, told: Callable[..., None]) -> dict[str, Any]:
    """All of it, as JSON (`_result`). Collective; the same on all ranks. Raises HarnessError, OSError.

    `told` hears before each measurement: round, name, done and total, by keyword.
    """
    counts = lengths(wanted.size, wanted.tensors)
    _check_memory(4 * 3 * sum(counts), comm)
    training = make(counts)
    missing = {}
    if "mpio" in (name.partition("-")[0] for name in wanted.engines) and (problem := unavailable(comm)):
        missing = {name: problem for name in wanted.engines if name.startswith("mpio")}
    engines = [name for name in wanted.engines if name not in missing]
    plain = Plain(folder, comm, training.nbytes)
    ours: dict[str, Ours] = {}
    contenders = [Contender("plain writes and reads", plain.work)]
    for name in engines:
        ours[name] = Ours(name, folder, comm, training, engine=name)  # type: ignore[arg-type]
        contenders.append(Contender(f"engine {name}", _work(ours[name], restores=name == engines[0])))
    if "direct" in engines:
        ours["lazy"] = Ours("lazy", folder, comm, training, engine="direct", lazy=True)
        contenders.append(Contender("lazy mode", ours["lazy"].save))
    done = itertools.count()
    total = len(contenders) * (wanted.rounds + 1)
    rounds = run_rounds(
        contenders,
        wanted.rounds,
        comm,
        told=lambda number, name: told(round=number, name=name, done=next(done), total=total),
    )
    for one in ours.values():
        one.close()
    return _result(wanted, rounds, training, ours, plain, missing)


class Plain:
    """The limit: this rank's share of the bytes, in a file of its own; and what memory alone costs."""

    def __init__(self, folder: Path, comm: Comm, size: int) -> None:
        self.folder, self.comm = folder, comm
        self.share = raw.pages(-(-size // comm.size))
        self.ways = raw.ways(folder)
        self.cold = True

    def work(self, number: int) -> dict[str, float]:
        """One round of it. Collective. Its memory is given back, for the others."""
        data, copy = aligned(self.share), aligned(self.share)
        fill([torch.from_numpy(data.view(np.float32))], seed=self.comm.rank + self.comm.size * number)
        copy[:] = 1  # so that its pages are there
        path = self.folder / f"plain-{self.comm.rank}"
        found = {"memcpy": timed(lambda: np.copyto(copy, data), self.comm)}
        found["digest"] = timed(lambda: block_digests(data, BLOCK), self.comm)
        for way in self.ways:
            for threads in (1, 2) if way == "odirect" else (1,):
                path.unlink(missing_ok=True)
                write = lambda: raw.write(path, data, way, threads=threads)  # noqa: B023, E731
                found[f"raw write {way}{'' if threads == 1 else ' 2'}"] = timed(write, self.comm)
        for way in self.ways:
            self.comm.barrier()
            self.cold = raw.drop([path]) and self.cold
            found[f"raw read {way}"] = timed(lambda: raw.read(path, copy, way), self.comm)  # noqa: B023
        found["raw read warm"] = timed(lambda: self._read_all(copy), self.comm)
        self.comm.barrier()
        path.unlink()
        return found

    def _read_all(self, copy: raw.Bytes) -> None:
        """What all ranks have written: a restore needs all of it on each."""
        for rank in range(self.comm.size):
            raw.read(self.folder / f"plain-{rank}", copy, "buffered")


def _work(ours: Ours, *, restores: bool) -> Callable[[int], dict[str, float]]:
    """Save, and restore that, which takes the same time with every engine; direct: again without digests."""

    def plain(number: int) -> dict[str, float]:
        with without_digests():
            return ours.save(number, "without digests")

    def work(number: int) -> dict[str, float]:
        twice = ours.name == "direct"
        found = plain(number) if twice and number % 2 else {}
        found |= ours.save(number) | (ours.restore(number) if restores else {})
        return found | (plain(number) if twice and number % 2 == 0 else {})

    return work


def _check_memory(size: int, comm: Comm) -> None:
    """Each rank holds the state; besides, at most five shares of it are in memory. Raises Unavailable on all ranks."""
    needed = size + 5 * (size // comm.size) + (256 << 20)
    told: list[Any] = comm.all_gather([socket.gethostname(), available()])
    for host in dict.fromkeys(one[0] for one in told):
        here, left = sum(one[0] == host for one in told), min(one[1] for one in told if one[0] == host)
        if here * needed > left:
            fits = max(0, int((left / here - (256 << 20)) / (1 + 5 / comm.size)))
            raise Unavailable(
                f"{here} ranks on {host} need {show_size(here * needed)} of memory for a state of {show_size(size)},"
                f" which each of them holds; {show_size(left)} are free",
                hint=f"a --size up to {show_size(fits * 0.95)} fits there",
            )


def _result(
    wanted: Wanted,
    rounds: Rounds,
    training: Training,
    ours: Mapping[str, Ours],
    plain: Plain,
    missing: Mapping[str, str],
) -> dict[str, Any]:
    comm = plain.comm
    hosts = comm.all_gather(socket.gethostname())
    cold = comm.all_gather(plain.cold and all(one.cold for one in ours.values()))
    parameters = len(list(training.state.model.parameters()))
    return {
        "ranks": comm.size,
        "hosts": len(set(map(str, hosts))),
        "filesystem": filesystem(plain.folder),
        "bytes": training.nbytes,
        "tensors": len(training.tensors) + parameters,  # Adam counts the steps of each parameter
        "share": plain.share,
        "engines": {name: missing.get(name) for name in wanted.engines},
        "cold": all(cold),
        "read": next((asdict(one.read) for one in ours.values() if one.restored), None),
        "rounds": [dict(one) for one in rounds.table],
    }


def main(arguments: list[str]) -> int:
    """One rank; the exit code. A rank that fails ends all of them."""
    environment = identify()
    if environment.gloo:
        import horovod.torch as hvd

        hvd.init()
    elif environment.launcher != "none":
        from mpi4py import MPI  # noqa: F401  # MPI_Init
    else:
        import mpi4py

        mpi4py.rc.initialize = False  # h5py's parallel build would call it
    folder = Path(arguments[0])
    try:
        request = json.loads(arguments[1])
        comm = detect()

        def told(**facts: object) -> None:
            if comm.rank == 0:
                say(**facts)

        wanted = Wanted(request["size"], request["tensors"], request["rounds"], tuple(request["engines"]))
        result = measure(wanted, folder, comm, told)
        if comm.rank == 0:
            say(result=result)
        comm.barrier()
        return 0
    except HarnessError as error:
        code = int(error.code)
        say(error=error.message, hint=error.hint, code=code)
    except OSError as error:
        code = int(Exit.IO)
        where = error.filename if isinstance(error.filename, str) else folder
        say(error=str(StorageError(f"{where}: {error.strerror or error}")), hint=None, code=code)
    except Exception as error:
        code = int(Exit.CRASH)
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}", hint=None, code=code)
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    os._exit(code)  # other ranks may wait for this one


def say(**facts: object) -> None:
    """One line in one write, so that lines of several ranks do not mix."""
    os.write(1, f"{MARK}{json.dumps(facts)}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
