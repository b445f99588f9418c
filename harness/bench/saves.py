"""Our checkpoints as something to measure: saves and restores of one `Manager`, until they are durable.

    ours = Ours("direct", folder, comm, training, engine="direct")
    ours.save(number)       # {"save direct": seconds until durable, "held up direct": for which training stood still}
    ours.restore(number)    # {"restore cold": ..., "restore warm": ...}, checked for equality
    ours.close()

Every save is of other numbers; what is older is removed outside the time that is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.bench import raw
from harness.bench.contents import change, digest, wipe
from harness.bench.rounds import timed, together
from harness.bench.state import Training
from harness.checkpoint import Comm, Manager, keep_all
from harness.checkpoint.commit import DATA, sync_directory
from harness.checkpoint.engines import EngineName, direct
from harness.checkpoint.store import listing, remove
from harness.errors import InternalError


@dataclass(frozen=True)
class Traffic:
    """Bytes that all ranks together have read: by system calls, and from the device as far as the kernel knows."""

    called: int
    device: int


class Ours:
    """One engine and mode. The constructor and all methods are collective; each raises what `Manager` raises."""

    def __init__(
        self, name: str, folder: Path, comm: Comm, training: Training, *, engine: EngineName, lazy: bool = False
    ) -> None:
        self.lazy = lazy
        self.name, self.folder, self.comm, self.training = name, folder / name.replace(" ", "-"), comm, training
        self.cold = True
        """Whether the page cache could be dropped before each cold restore."""
        self.read = Traffic(0, 0)
        """By the last cold restore."""
        self.restored = False
        """Whether there was one."""
        self._step = 0
        self._digest = ""
        self._manager = Manager(self.folder, comm, keep=keep_all(), engine=engine, lazy=lazy, log=lambda line: None)

    def save(self, number: int, name: str | None = None) -> dict[str, float]:
        """`name` replaces that of the object in what it returns."""
        name = self.name if name is None else name
        self._remove()
        change(self.training.tensors)
        self._step += 1
        together(self.comm)
        began = time.perf_counter()
        self._manager.save(self._step, self.training.state)
        held = time.perf_counter() - began
        self._manager.fence()
        copied = time.perf_counter() - began
        self._manager.wait()
        durable = time.perf_counter() - began
        self._digest = digest(self.training.tensors)
        found = {f"save {name}": durable, f"held up {name}": held}
        return found | ({f"copied {name}": copied} if self.lazy else {})

    def restore(self, number: int) -> dict[str, float]:
        """What was saved last, from the disk and again from the page cache."""
        path = max(listing(self.folder)).path / DATA
        self.comm.barrier()
        self.cold = raw.drop([path]) and self.cold
        found = {}
        for kind in ("cold", "warm"):
            if kind == "warm":
                raw.warm(path)  # a cold restore may have gone around the cache
                self.comm.barrier()
            wipe(self.training.tensors)
            reader = Manager(self.folder, self.comm, log=lambda line: None)
            before = traffic()
            found[f"restore {kind}"] = timed(lambda: reader.restore(self.training.state), self.comm)  # noqa: B023
            after = traffic()
            if kind == "cold":
                self.read, self.restored = total(before, after, self.comm), True
            reader.close()
            if digest(self.training.tensors) != self._digest:
                raise InternalError(f"{path} was restored to other bytes than were saved")
        return found

    def close(self) -> None:
        self._manager.close()
        self._remove()

    def _remove(self) -> None:
        """What was saved before."""
        self.comm.barrier()
        if self.comm.rank == 0 and self.folder.is_dir():
            for stored in listing(self.folder):
                remove(stored.path)
            sync_directory(self.folder)
        self.comm.barrier()


@contextmanager
def without_digests() -> Iterator[None]:
    """Saves of the direct engine compute no digests meanwhile, to see what they cost. Nobody can read those saves."""
    engine: Any = direct
    real = engine.block_digests
    engine.block_digests = lambda data, block: [0] * -(-len(data) // block)
    try:
        yield
    finally:
        engine.block_digests = real


def traffic() -> Traffic:
    """Of this process until now; zeros where the kernel does not tell."""
    try:
        words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return Traffic(int(words["rchar"]), int(words["read_bytes"]))
    except (OSError, KeyError, ValueError):
        return Traffic(0, 0)


def total(before: Traffic, after: Traffic, comm: Comm) -> Traffic:
    """The sum over all ranks. Collective."""
    told: list[Any] = comm.all_gather([after.called - before.called, after.device - before.device])
    return Traffic(sum(one[0] for one in told), sum(one[1] for one in told))
