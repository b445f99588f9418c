"""One save after another: agree on it, copy this rank's slice, and leave the rest to a thread (`writing`).

main thread    collect the state -> vote -> copy this rank's slice of the file into reused memory
saver thread   write it -> vote -> commit

Both votes have a deadline and name the ranks that did not come (`ballot`). Otherwise no rank waits for another one.
Whatever fails on one rank ends the save on all of them; the earlier checkpoints stay as they were.
"""

from __future__ import annotations

import queue
import socket
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.checkpoint import ballot, commit, space, store
from harness.checkpoint.agree import SaveFailed, attempt, describe, refusal, together
from harness.checkpoint.ballot import Ballot, NoAnswer
from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.engines import Engine
from harness.checkpoint.exchange import exchange
from harness.checkpoint.file import fit_head
from harness.checkpoint.holders import Holders, gather_holders, signature
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.lease import Lease
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.plan import make_plan
from harness.checkpoint.policy import Keep
from harness.checkpoint.replicas import compare, warning
from harness.checkpoint.schema import schema_lines
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.staging import Image, Staging
from harness.checkpoint.state import State, take
from harness.checkpoint.tensors import Part
from harness.checkpoint.tree import encode
from harness.checkpoint.writing import Form, Order, Outcome, Taken, Writer
from harness.errors import DataError, StorageError

_FILES = 4
"""Files and directories that a save makes."""


class Saver:
    """The saves of one directory, one at a time. The constructor is local. Arguments: see `manager.Manager`."""

    def __init__(
        self,
        directory: Path,
        comm: Comm,
        engine: Engine,
        *,
        keep: Keep,
        timeout: float,
        check_replicas: int,
        lazy: bool,
        info: Mapping[str, Json],
    ) -> None:
        self._directory, self._comm, self._engine = directory, comm, engine
        self._keep, self._timeout, self._check_replicas, self._info = keep, timeout, check_replicas, info
        self._lazy = lazy and engine.background
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        """What there is to tell, from both threads."""
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="harness-checkpoint")
        self._running: Future[Outcome] | None = None
        self._copied: Future[None] | None = None
        self._writer: Writer | None = None
        self._ballots: list[Ballot] = []
        self._form: Form | None = None
        self._from_rank0: tuple[int, ...] = ()
        self._holders: Holders | None = None
        self._parts: list[str] = []  # rank 0: the signatures of the parts that `_holders` knows
        self._asked: list[str] = []
        self._lease: Lease | None = None
        self._numbers = 0
        self.good: dict[Path, Manifest] = {}
        """Rank 0: checkpoints that were looked at."""

    def start(self, step: int, state: State, metrics: Mapping[str, float] | None) -> Path | None:
        """Begin a save and return its path to be; `outcome` tells how it ended. None where one is under way already.

        Collective. Raises SaveFailed, on all ranks alike, where it cannot begin.
        """
        began = time.perf_counter()
        writer = self._writer or self._meet()
        taken, error = attempt(lambda: _collect(step, state, metrics, self._comm))
        message: Json = {
            "step": step,
            "busy": self._running is not None and not self._running.done(),
            "schema": None if taken is None else taken.schema,
            "parts": "" if taken is None else signature(taken.snapshot.parts),
            "error": describe(error),
        }
        try:
            verdict: Any = self._ballots[0].hold(
                step, message, lambda said, missing: self._decide(step, taken, said, missing), self._timeout
            )
        except NoAnswer as silence:
            raise SaveFailed(f"the checkpoint of step {step} was not saved: {silence.message}") from None
        if verdict["failed"] is not None:
            told = f"the checkpoint of step {verdict['step']} was not saved: {verdict['failed']}"
            raise SaveFailed(told, hint=verdict["hint"]) from error
        if verdict["step"] != step:
            raise SaveFailed(f"the checkpoint was not saved: rank 0 saves step {verdict['step']}, this rank {step}")
        assert taken is not None
        if verdict["differ"]:
            self._tell_difference(step, taken)
        if verdict["busy"]:
            return None
        order = self._make_order(step, taken, verdict, began)
        self._copy(writer, order)
        return order.final

    def outcome(self, *, wait: bool) -> Outcome | None:
        """How the running save ended, once; None where none is running, or it has not ended and `wait` is False."""
        if self._running is None or not (wait or self._running.done()):
            return None
        ended, self._running, self._copied = self._running, None, None
        return ended.result()

    def fence(self) -> None:
        """Return once the running save has its own copy of the state. Local."""
        if self._copied is not None:
            self._copied.exception()

    def claim(self) -> None:
        """Take the directory's lease now. Collective. Raises StorageError, on all ranks alike, where another has it."""
        told: Any = None
        if self._comm.rank == 0:
            told = describe(attempt(self._claim)[1])
        told = self._comm.broadcast(told)
        if told is not None:
            raise StorageError(told["message"], hint=told["hint"])

    def close(self) -> None:
        """Give everything back; a save that is under way ends before. Local."""
        self._thread.shutdown()
        for held in self._ballots:
            held.close()
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        self._staging.close()

    # Agreeing

    def _claim(self) -> None:
        """Rank 0: take the lease, and remove what earlier programs left. Raises HarnessError, OSError."""
        if self._lease is None:
            commit.make_directories(self._directory)
            self._lease = Lease.acquire(self._directory, log=self.lines.put)
            ballot.clean(self._directory, self._ballots)
            for left in store.clean(self._directory):
                self.lines.put(f"removed {left.name}, which an earlier program left unfinished")

    def _meet(self) -> Writer:
        """The first time: ways to vote, and each other's names. Collective."""
        self._ballots = ballot.make_ballots(3, self._directory, self._comm)
        _, opening, closing = self._ballots
        hosts = [str(host) for host in self._comm.all_gather(socket.gethostname())]
        self._writer = Writer(
            self._directory,
            self._comm,
            self._engine,
            self._keep,
            self._timeout,
            self._info,
            self.lines.put,
            opening,
            closing,
            hosts,
            self.good,
        )
        return self._writer

    def _decide(self, step: int, taken: Taken | None, said: Mapping[int, Any], missing: list[int]) -> Json:
        """Rank 0: whether and how the save goes ahead."""
        assert self._writer is not None
        hosts = self._writer.hosts
        answer: dict[str, Any] = {"step": step, "failed": None, "hint": None, "busy": False, "differ": False}
        absent = "did not ask for a save"
        if refused := refusal(said, missing, hosts, "while it collected the state", absent, self._timeout):
            return answer | refused
        if others := [(rank, message["step"]) for rank, message in said.items() if message["step"] != step]:
            return answer | {"failed": f"rank 0 saves step {step}, rank {others[0][0]} saves step {others[0][1]}"}
        if len({message["schema"] for message in said.values()}) > 1:
            return answer | {"differ": True}
        if any(message["busy"] for message in said.values()):
            return answer | {"busy": True}
        assert taken is not None
        parts = [said[rank]["parts"] for rank in sorted(said)]
        plan, error = attempt(lambda: self._open(step, taken, parts))
        refused = refusal({0: {"error": describe(error)}}, [], hosts, "before anything was written", "", 0.0)
        return answer | (refused or plan or {})

    def _open(self, step: int, taken: Taken, parts: list[str]) -> dict[str, Json]:
        """Rank 0: make sure that it can be written, and say where. Raises HarnessError, OSError.

        `parts`: the `signature` of each rank's parts, which ask for `gather_holders` where they are new.
        """
        assert self._writer is not None
        self._claim()
        self._writer.lease = self._lease
        form = self._form
        if form is None or form.schema != taken.schema:
            layout = lay_out(taken.snapshot.leaves)
            space.preflight(self._directory, layout.data_end, _FILES)
            scratch = self._directory / f"step-{step:08d}{commit.TEMPORARY}{uuid.uuid4().hex}"
            scratch.mkdir()
            try:
                self._form = form = Form(taken.schema, *fit_head(layout, taken.snapshot.aliases, scratch / "head.h5"))
            finally:
                commit.abandon(scratch)
            self._from_rank0, self._parts = (), []
        else:
            space.preflight(self._directory, form.layout.data_end, _FILES)
        self._asked = parts
        self._numbers += 1
        identity, saved = uuid.uuid4().hex, self._writer.saved
        return {
            "number": self._numbers,
            "uuid": identity,
            "name": f"{store.new_name(self._directory, step)}{commit.TEMPORARY}{identity}",
            "head": form.layout.head,
            "gather": bool(taken.snapshot.parts) and parts != self._parts,
            "compare": self._comm.size > 1 and self._check_replicas > 0 and saved % self._check_replicas == 0,
        }

    def _tell_difference(self, step: int, taken: Taken) -> None:
        """Raise SaveFailed with the first tensors in which ranks differ. Collective."""
        mine = schema_lines(taken.snapshot.leaves, taken.snapshot.aliases)
        first: Any = self._comm.broadcast(mine)
        found: list[Any] = self._comm.all_gather(sorted(set(mine) ^ set(first))[:3])
        rank, lines = next((rank, lines) for rank, lines in enumerate(found) if lines)
        raise SaveFailed(
            f"the checkpoint of step {step} was not saved: rank {rank} and rank 0 hold different tensors,"
            f" for example {'; '.join(lines)}"
        )

    # Copying

    def _make_order(self, step: int, taken: Taken, verdict: dict[str, Any], began: float) -> Order:
        """Lay the file out here too; where rank 0 asks for it, compare the replicas. Collective then."""

        def lay_out_here() -> tuple[Form, Json]:
            if self._form is None or self._form.schema != taken.schema:
                self._from_rank0 = ()
                self._form = Form(taken.schema, lay_out(taken.snapshot.leaves, head=verdict["head"]), b"")
            return self._form, None

        if not verdict["compare"]:
            form, _ = lay_out_here()
        else:
            form, _ = together(self._comm, step, "when it laid out the file", lay_out_here)
            buffers = [taken.snapshot.buffers[leaf.name] for leaf in form.layout.leaves]
            unequal = compare(form.layout, buffers, self._comm, step)
            self._from_rank0 = unequal.leaves
            if unequal.leaves:
                self.lines.put(warning(form.layout, unequal))
        if verdict["gather"]:
            self._gather(step, form.layout, taken)
        return Order(step, verdict["number"], verdict["uuid"], self._directory / verdict["name"], form, taken, began)

    def _gather(self, step: int, layout: Layout, taken: Taken) -> None:
        """Learn which rank holds which part. Collective. Raises SaveFailed where they do not fit together."""
        self._holders, self._parts = None, []
        try:
            self._holders = gather_holders(layout, _parts(layout, taken.snapshot), self._comm)
        except DataError as error:  # the same on all ranks
            told = f"the checkpoint of step {step} was not saved: {error.message}"
            raise SaveFailed(told, hint=error.hint) from error
        self._parts = self._asked

    def _copy(self, writer: Writer, order: Order) -> None:
        """Copy this rank's slice (in lazy mode: what may change before the fence), and start the writing."""
        layout, snapshot = order.form.layout, order.taken.snapshot
        buffers = [snapshot.buffers[leaf.name] for leaf in layout.leaves]
        late = [i for i, leaf in enumerate(layout.leaves) if leaf.name in snapshot.late] if self._lazy else []
        holders = self._holders if layout.parted else None
        plan = make_plan(
            layout, rank=self._comm.rank, size=self._comm.size, from_rank0=self._from_rank0, holders=holders
        )

        def copy() -> list[Image]:
            images = self._staging.prepare(layout, plan)
            now = set(range(len(buffers))) - set(late) - layout.parted
            self._staging.fill(buffers, sorted(now) if late else None)
            return images

        def copy_late() -> None:
            if late and images is not None:
                self._staging.fill(buffers, late)

        images, error = attempt(copy)
        if holders is not None:
            # Also where this rank could not copy: the others wait for its parts.
            parts, view = _parts(layout, snapshot), self._staging.view
            _, failed = attempt(lambda: exchange(layout, plan, holders, parts, self._comm, view))
            error = error or failed
        if self._engine.background:
            waited = time.perf_counter() - order.began
            self._copied = self._thread.submit(copy_late)
            self._running = self._thread.submit(writer.run, order, images, error, self._copied, waited)
            return
        together(self._comm, order.step, "while it copied its part", lambda: _result(error))
        self._running = Future()
        self._running.set_result(writer.run(order, images, None, None, 0.0))


def _parts(layout: Layout, snapshot: Snapshot) -> dict[int, Part]:
    """This rank's parts by leaf index."""
    return {index: snapshot.parts[layout.leaves[index].name] for index in layout.parted}


def _collect(step: int, state: State, metrics: Mapping[str, float] | None, comm: Comm) -> Taken:
    if step < 0:
        raise DataError(f"the step is {step}; steps count from 0")
    encoded: Any = encode(dict(metrics or {}), "metrics", {})
    snapshot = take(state, comm.rank, comm.size)
    return Taken(snapshot, snapshot.schema().hash, encoded)


def _result(error: Exception | None) -> tuple[None, Json]:
    if error is not None:
        raise error
    return None, None
