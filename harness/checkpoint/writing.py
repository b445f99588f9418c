"""The part of a save that runs behind training: make the file, write this rank's slice, vote, commit, prune.

    rank 0 makes the file -> all write their slices, rank 0 also HDF5's metadata -> vote with a deadline
    -> rank 0 commits -> all learn of it

Runs in a thread of its own on every rank, beside the copying of the slice, or on the main thread with an engine that
needs it (mpio). It raises nothing: how it ended is an `Outcome`, the same on all ranks.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from harness.checkpoint import commit, store
from harness.checkpoint.agree import attempt, describe, refusal, wait_for
from harness.checkpoint.ballot import PATIENCE, Ballot
from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.copying import Copying
from harness.checkpoint.digest import root
from harness.checkpoint.engines import Engine
from harness.checkpoint.file import build_head
from harness.checkpoint.layout import Layout
from harness.checkpoint.lease import Lease
from harness.checkpoint.manifest import Manifest, prepare, render
from harness.checkpoint.policy import Keep
from harness.checkpoint.snapshot import Snapshot
from harness.errors import StorageError


@dataclass(frozen=True, eq=False)
class Taken:
    """What one rank wants to save."""

    snapshot: Snapshot
    record: Callable[[], dict[str, Json]]
    """JSON per entry of the state."""
    schema: str
    metrics: dict[str, Json]


@dataclass(eq=False)
class Form:
    """The shape of the file for one schema."""

    schema: str
    layout: Layout
    head: Future[bytes] = field(default_factory=Future)
    """Rank 0: the HDF5 metadata, which a thread makes while the first save of this form is written."""

    @property
    def failed(self) -> bool:
        """Whether there cannot be a `head`."""
        return self.head.done() and self.head.exception() is not None

    def make_head(self, aliases: dict[str, str], copying: Copying) -> bytes:
        """`head`, begun when the thread that trains goes on: Python is faster at one after the other than at both."""
        copying.wait()
        prepare(self.layout, aliases)
        return build_head(self.layout, aliases)


@dataclass(frozen=True, eq=False)
class Order:
    """A save that all ranks have agreed on. `number` counts them; `began` is this rank's `perf_counter`."""

    step: int
    number: int
    identity: str
    temporary: Path
    form: Form
    taken: Taken
    began: float

    @property
    def final(self) -> Path:
        return self.temporary.with_name(self.temporary.name.partition(commit.TEMPORARY)[0])


@dataclass(frozen=True)
class Outcome:
    """How a save ended. `failed`: why not; None for a checkpoint that is durable at `path`."""

    step: int
    path: Path
    failed: str | None
    hint: str | None
    waited: float
    """Seconds for which training stood still on this rank."""
    seconds: float
    """From the request until it was durable."""


@dataclass
class Writer:
    """What the saves of one directory share. `opening` and `closing` are the two votes of this thread."""

    directory: Path
    comm: Comm
    engine: Engine
    keep: Keep
    timeout: float
    info: Mapping[str, Json]
    log: Callable[[str], None]
    opening: Ballot
    closing: Ballot
    hosts: list[str]
    good: dict[Path, Manifest]
    """Rank 0: checkpoints that were looked at."""
    lease: Lease | None = None
    saved: int = 0
    """Rank 0: how many checkpoints came of it."""

    def run(self, order: Order, copying: Copying) -> Outcome:
        """Collective, in the sense that every rank does it. It ends after the copy has ended."""
        when = "when it made the new file"
        error: BaseException | None = None
        digests: dict[int, int] = {}
        try:
            if self._begin(order):
                data, head = order.temporary / commit.DATA, order.form.head
                # While the first bytes are copied, the disk has nothing else to do. A collective engine needs rank 0.
                early = self.comm.rank == 0 and self.engine.background and head.done()
                if early:
                    when = "when it made HDF5's metadata"
                    commit.put_head(order.temporary, order.form.layout, head.result())
                when = "when it opened the new file"
                if self._open(data, order.form.layout.data_end):
                    when = "while it wrote its part"
                    digests = self.engine.write(data, order.form.layout, copying, self.comm)
                if self.comm.rank == 0 and not early:
                    when = "when it made HDF5's metadata"
                    if not wait([head], self.timeout).done:
                        raise StorageError(f"they were not there after {self.timeout:g} s")
                    commit.put_head(order.temporary, order.form.layout, head.result())
        except Exception as problem:
            error = problem
        copying.wait()
        if copying.failure is not None:
            when, error = "while it copied its part", copying.failure
        told: Any = describe(error)
        if told is not None:
            told["when"] = when
        message: Json = {"error": told, "digests": _pack(digests)}
        try:
            verdict: Any = self.closing.hold(
                order.number, message, lambda said, missing: self._commit(order, said, missing), self.timeout
            )
        except Exception as problem:
            told = describe(problem)
            verdict = {"failed": told["message"], "hint": told["hint"]}
        seconds = time.perf_counter() - order.began
        if self.comm.rank == 0 and verdict["failed"] is None:
            self._tidy_up(order)
        waited = copying.waited if self.engine.background else seconds
        return Outcome(order.step, order.final, verdict["failed"], verdict["hint"], waited, seconds)

    def _begin(self, order: Order) -> bool:
        """Rank 0 makes the file; the others wait until it has: False where it could not. Raises on rank 0; NoAnswer."""
        if self.comm.rank != 0:
            return self.opening.hear(order.number, PATIENCE * self.timeout) is True
        made = False
        try:
            order.temporary.mkdir()
            commit.begin(order.temporary, order.form.layout)
            made = True
        finally:
            self.opening.tell(order.number, made)
        return made

    def _open(self, data: Path, size: int) -> bool:
        """Until this rank sees the file. A collective engine begins only where all do: False where another does not."""
        _, error = attempt(lambda: wait_for(data, size))
        others = not self.engine.background and any(self.comm.all_gather(error is not None))
        if error is not None:
            raise error
        return not others

    def _commit(self, order: Order, said: Mapping[int, Any], missing: list[int]) -> Json:
        """Rank 0: make it a checkpoint, or remove what was begun."""
        refused = refusal(said, missing, self.hosts, "while it wrote its part", "did not finish writing", self.timeout)
        if refused is None:
            _, error = attempt(lambda: self._publish(order, said))
            refused = refusal({0: {"error": describe(error)}}, [], self.hosts, "while it committed it", "", 0.0)
        if refused is not None:
            commit.abandon(order.temporary)
            return refused
        self.saved += 1
        return {"failed": None, "hint": None}

    def _publish(self, order: Order, said: Mapping[int, Any]) -> None:
        form, taken, head = order.form, order.taken, order.form.head.result()
        table = np.zeros(form.layout.blocks, np.uint64)
        for message in said.values():
            blocks, digests = _unpack(message["digests"])
            table[blocks] = digests
        manifest = Manifest(
            uuid=order.identity,
            step=order.step,
            created=time.time(),
            world=self.comm.size,
            layout=form.layout,
            table=root(table),
            head=xxhash.xxh3_128_hexdigest(head),
            aliases=taken.snapshot.aliases,
            state=taken.record(),
            metrics=taken.metrics,
            info={"engine": self.engine.name, "tensors": len(form.layout.leaves), **self.info},
        )
        text = render(manifest)
        commit.seal(order.temporary, form.layout, head, table, order.identity, order.step)
        if self.lease is not None and not self.lease.still_mine():
            raise StorageError(
                f"it cannot be read who may save into {self.directory}, or another job has taken that over",
                hint="only one job at a time saves into a directory",
            )
        commit.publish(order.temporary, order.final, text)
        self.good[order.final] = manifest

    def _tidy_up(self, order: Order) -> None:
        """Rank 0: what was saved now is what a restart goes on from, whatever had been saved there before."""
        try:
            newer = store.set_aside(self.directory, order.final)
            if newer:
                names = ", ".join(path.name for path in newer)
                self.log(
                    f"set aside {names}: newer than step {order.step}, from which this job goes on"
                    " (`harness ckpt rollback` takes one back)"
                )
            store.prune(self.directory, self.keep, self.good, self.log)
        except Exception as error:  # also of a rule that the program brought along: the checkpoint is there
            told: Any = describe(error)
            self.log(f"old checkpoints could not be removed: {told['message']}")


def _pack(digests: Mapping[int, int]) -> str:
    """Digests by block as text: two arrays of little-endian 8-byte integers."""
    both = np.array([list(digests.keys()), list(digests.values())], "<u8")
    return base64.b64encode(both.tobytes()).decode()


def _unpack(text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    both = np.frombuffer(base64.b64decode(text), "<u8").reshape(2, -1)
    return both[0].astype(np.int64), both[1]
