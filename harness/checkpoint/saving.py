"""One save after another: agree on it, copy this rank's slice, and leave the rest to a thread (`writing`).

main thread    collect the state -> vote -> copy this rank's slice of the file into reused memory
saver thread                                write what is copied -> vote -> commit

At the first save of a schema another thread of rank 0 makes HDF5's metadata: only the commit waits for it.
Both votes have a deadline and name the ranks that did not come (`ballot`). Otherwise no rank waits for another one,
but where the ranks must exchange something (replicas to compare, shards, mpio): then a third vote finds out before that
all of them are there.
Whatever fails on one rank ends the save on all of them; the earlier checkpoints stay as they were.
"""

from __future__ import annotations

import queue
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.checkpoint import ballot, commit, space, store
from harness.checkpoint.agree import SaveFailed, attempt, describe, refusal, together
from harness.checkpoint.ballot import Ballot, Decide, NoAnswer
from harness.checkpoint.collecting import Collector
from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.copies import compare_copies
from harness.checkpoint.copying import Copying
from harness.checkpoint.engines import Engine
from harness.checkpoint.exchange import exchange
from harness.checkpoint.holders import Holders, gather_holders, signature
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.lease import InUse, Lease
from harness.checkpoint.manifest import Manifest, render
from harness.checkpoint.plan import Plan, make_plan
from harness.checkpoint.policy import Keep
from harness.checkpoint.replicas import Unequal, compare, found
from harness.checkpoint.schema import schema_lines
from harness.checkpoint.snapshot import Snapshot, no_collection
from harness.checkpoint.staging import Staging
from harness.checkpoint.state import State
from harness.checkpoint.tensors import Buffer, Part
from harness.checkpoint.tree import encode
from harness.checkpoint.writing import Form, Order, Outcome, Taken, Writer
from harness.errors import DataError, InputMissing, StorageError

_FILES = 4
"""Files and directories that a save makes."""


class Saver:
    """The saves of one directory, one at a time. The constructor is collective. Arguments: see `manager.Manager`."""

    def __init__(
        self,
        directory: Path,
        comm: Comm,
        engine: Engine,
        *,
        keep: Keep,
        timeout: float,
        check_replicas: int,
        strict: bool,
        lazy: bool,
        info: Mapping[str, Json],
    ) -> None:
        self._directory, self._comm, self._engine = directory, comm, engine
        self._keep, self._timeout, self._check_replicas, self._info = keep, timeout, check_replicas, info
        self._strict = strict
        self._lazy = lazy and engine.background
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        """What there is to tell, from both threads."""
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(3, thread_name_prefix="harness-checkpoint")
        self._running: Future[Outcome] | None = None
        self._copied: Future[None] | None = None
        self._collector = Collector(comm)
        self._ordered: tuple[object, object, list[Buffer]] = (None, None, [])
        self._form: Form | None = None
        self._from_rank0: tuple[int, ...] = ()
        self._held: Holders | None = None
        self._holders: Holders | None = None  # the same, but unequal copies have one holder
        self._parts: list[str] = []  # rank 0: the signatures of the parts that `_holders` knows
        self._asked: list[str] = []
        self._lease: Lease | None = None
        self._era = self._numbers = 0
        self.good: dict[Path, Manifest] = {}
        """Rank 0: checkpoints that were looked at."""
        # Now, because at the first save a rank may be missing already, and this has no deadline.
        self._hosts = [str(host) for host in comm.all_gather(socket.gethostname())]
        self._ballots = ballot.make_ballots(4, directory, comm)
        self._asking, self._settling, opening, closing = self._ballots
        self._writer = Writer(
            directory, comm, engine, keep, timeout, info, self.lines.put, opening, closing, self._hosts, self.good
        )

    @no_collection()
    def start(self, step: int, state: State, metrics: Mapping[str, float] | None) -> Path | None:
        """Begin a save and return its path to be; `outcome` tells how it ended. None where one is under way already.

        Collective. Raises, on all ranks alike, SaveFailed where it cannot begin, InUse where another job saves here.
        """
        began = time.perf_counter()
        busy = self._running is not None and not self._running.done()
        taken, error = attempt(lambda: self._collector.collect(step, state, metrics))
        # Already here, where no rank waits for another. What fails is tried again, and told, where they do.
        form = None if taken is None or busy else attempt(lambda: self._lay_out(taken))[0]
        message: Json = {
            "step": step,
            "busy": busy,
            "schema": None if taken is None else taken.schema,
            "laid out": form is not None,
            "parts": "" if taken is None else signature(taken.snapshot.parts),
            "error": describe(error),
        }
        number = (self._era << 40) + step  # a step may come again after a restore
        verdict = self._vote(
            self._asking, number, step, message, lambda said, missing: self._decide(step, taken, said, missing)
        )
        if verdict["failed"] is not None:
            told = f"the checkpoint of step {verdict['step']} was not saved: {verdict['failed']}"
            raise (InUse if verdict["in use"] else SaveFailed)(told, hint=verdict["hint"]) from error
        if verdict["step"] != step:
            raise SaveFailed(f"the checkpoint was not saved: rank 0 saves step {verdict['step']}, this rank {step}")
        if verdict["busy"]:
            return None
        assert taken is not None
        if verdict["settle"]:
            self._settle(step, taken, verdict)
        if verdict["differ"]:
            self._tell_difference(step, taken)
        order = self._make_order(step, taken, verdict, began)
        self._copy(order, state)
        return order.final

    def outcome(self, *, wait: bool) -> Outcome | None:
        """How the running save ended, once; None where none is running, or it has not ended and `wait` is False."""
        if self._running is None or not (wait or self._running.done()):
            return None
        ended, self._running, self._copied = self._running, None, None
        return ended.result()

    def restored(self) -> None:
        """The state is another one now, perhaps of an earlier step. All ranks say so after the same saves. Local."""
        self._era += 1
        self._collector.forget()

    def fence(self) -> None:
        """Return once the running save has its own copy of the state. Local."""
        if self._copied is not None:
            self._copied.exception()

    def claim(self) -> None:
        """Take the directory's lease now. Collective. Raises InUse, StorageError, on all ranks alike."""
        error = attempt(self._claim)[1] if self._comm.rank == 0 else None
        told: Any = self._comm.broadcast([describe(error), isinstance(error, InUse)])
        if told[0] is not None:
            raise (InUse if told[1] else StorageError)(told[0]["message"], hint=told[0]["hint"]) from error

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0: add to the metrics of the newest checkpoint, which is of this step. Raises HarnessError, OSError."""
        newest = max(store.listing(self._directory), default=None)
        if newest is None or newest.step != step:
            raise InputMissing(f"the newest checkpoint in {self._directory} is not of step {step}")
        encoded: Any = encode(metrics, "metrics", {})
        manifest = store.read_manifest(newest.path)
        manifest = replace(manifest, metrics=manifest.metrics | encoded)
        commit.put_manifest(newest.path, render(manifest))
        self.good[newest.path] = manifest

    def give_up(self) -> None:
        """No other rank will come any more: a save that is under way ends without them. Local."""
        for held in self._ballots:
            held.give_up()

    def close(self) -> None:
        """Give everything back; a save that is under way ends before. Local."""
        self._thread.shutdown()
        for held in self._ballots:
            held.close()
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        self._staging.close()
        self._collector.forget()
        self._ordered = (None, None, [])

    # Agreeing

    def _claim(self) -> None:
        """Rank 0: take the lease, and remove what earlier programs left. Raises HarnessError, OSError."""
        if self._lease is None:
            commit.make_directories(self._directory)
            self._lease = Lease.acquire(self._directory, log=self.lines.put)
            ballot.clean(self._directory, self._ballots)
            for left in store.clean(self._directory):
                self.lines.put(f"removed {left.name}, which an earlier program left unfinished")

    def _vote(self, on: Ballot, number: int, step: int, message: Json, decide: Decide) -> Any:
        """Rank 0's verdict. Raises SaveFailed where there is none."""
        try:
            return on.hold(number, message, decide, self._timeout)
        except Exception as problem:
            told: Any = describe(problem)
            where = f" (it is on {self._hosts[0]})" if isinstance(problem, NoAnswer) else ""
            raise SaveFailed(
                f"the checkpoint of step {step} was not saved: {told['message']}{where}", hint=told["hint"]
            ) from problem

    def _decide(self, step: int, taken: Taken | None, said: Mapping[int, Any], missing: list[int]) -> Json:
        """Rank 0: whether and how the save goes ahead."""
        hosts = self._hosts
        answer: dict[str, Any] = dict.fromkeys(("busy", "differ", "in use"), False)
        answer |= {"step": step, "failed": None, "hint": None}
        absent = "did not ask for a save"
        if refused := refusal(said, missing, hosts, "while it collected the state", absent, self._timeout):
            return answer | refused
        if others := [(rank, message["step"]) for rank, message in said.items() if message["step"] != step]:
            return answer | {"failed": f"rank 0 saves step {step}, rank {others[0][0]} saves step {others[0][1]}"}
        if len({message["schema"] for message in said.values()}) > 1:
            self._numbers += 1
            return answer | {"differ": True, "settle": True, "number": self._numbers}
        if any(message["busy"] for message in said.values()):
            return answer | {"busy": True}
        assert taken is not None
        parts = [said[rank]["parts"] for rank in sorted(said)]
        plan, error = attempt(lambda: self._open(step, taken, parts))
        refused = refusal({0: {"error": describe(error)}}, [], hosts, "before anything was written", "", 0.0)
        if refused or plan is None:
            return answer | (refused or {}) | {"in use": isinstance(error, InUse)}
        exchanges = plan["compare"] or plan["gather"] or taken.snapshot.parts or not self._engine.background
        ready = all(message["laid out"] for message in said.values())
        return answer | plan | {"settle": bool(exchanges or not ready)}

    def _open(self, step: int, taken: Taken, parts: list[str]) -> dict[str, Json]:
        """Rank 0: make sure that it can be written, and say where. Raises HarnessError, OSError.

        `parts`: the `signature` of each rank's parts, which ask for `gather_holders` where they are new.
        """
        self._claim()
        self._writer.lease = self._lease
        space.preflight(self._directory, self._lay_out(taken).layout.data_end, _FILES)
        self._asked = parts
        self._numbers += 1
        identity, saved = uuid.uuid4().hex, self._writer.saved
        return {
            "number": self._numbers,
            "uuid": identity,
            "name": f"{store.new_name(self._directory, step)}{commit.TEMPORARY}{identity}",
            "gather": bool(taken.snapshot.parts) and parts != self._parts,
            "compare": self._comm.size > 1 and self._check_replicas > 0 and saved % self._check_replicas == 0,
        }

    def _settle(self, step: int, taken: Taken, verdict: dict[str, Any]) -> None:
        """Make sure that all ranks go on, and have laid out the file. Raises SaveFailed, on all ranks alike."""
        _, error = attempt(lambda: None if verdict["differ"] else self._lay_out(taken))

        def decide(said: Mapping[int, Json], missing: list[int]) -> Json:
            absent = "asked for a save and then did not begin it"
            refused = refusal(said, missing, self._hosts, "when it laid out the file", absent, self._timeout)
            return refused or {"failed": None}

        settled = self._vote(self._settling, verdict["number"], step, {"error": describe(error)}, decide)
        if settled["failed"] is not None:
            told = f"the checkpoint of step {step} was not saved: {settled['failed']}"
            raise SaveFailed(told, hint=settled["hint"]) from error

    def _lay_out(self, taken: Taken) -> Form:
        """The form of this state: the same on all ranks."""
        form, found = self._form, taken.snapshot
        if form is None or form.failed or form.schema != taken.schema:
            self._form = form = Form(taken.schema, lay_out(found.leaves, links=found.aliases))
            self._from_rank0, self._parts = (), []
        return form

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
        """Where rank 0 asks for it, compare the replicas. Collective then."""
        form = self._lay_out(taken)
        if verdict["compare"]:
            attempt(lambda: self._staging.prepare(form.layout, self._plan(form.layout)))  # the memory comes meanwhile
            buffers = self._in_order(form.layout, taken.snapshot)
            unequal = compare(form.layout, buffers, self._comm, step)
            self._from_rank0 = unequal.leaves
            self._tell_unequal(step, form.layout, unequal, "rank 0")
        if verdict["gather"]:
            self._gather(step, form.layout, taken)
        if form.layout.parted and (verdict["compare"] or verdict["gather"]):
            self._compare_copies(step, form.layout, taken)
        return Order(step, verdict["number"], verdict["uuid"], self._directory / verdict["name"], form, taken, began)

    def _gather(self, step: int, layout: Layout, taken: Taken) -> None:
        """Learn which rank holds which part. Collective. Raises SaveFailed where they do not fit together."""
        self._held, self._holders, self._parts = None, None, []
        try:
            self._held = self._holders = gather_holders(layout, _parts(layout, taken.snapshot), self._comm)
        except DataError as error:  # the same on all ranks
            told = f"the checkpoint of step {step} was not saved: {error.message}"
            raise SaveFailed(told, hint=error.hint) from error
        self._parts = self._asked

    def _compare_copies(self, step: int, layout: Layout, taken: Taken) -> None:
        """Of parts that several ranks hold. Collective. Raises SaveFailed."""
        if self._held is not None and self._check_replicas and self._comm.size > 1:
            parts = _parts(layout, taken.snapshot)
            self._holders, unequal = compare_copies(self._held, parts, self._comm, step)
            self._tell_unequal(step, layout, unequal, "the first rank with the same part")

    def _tell_unequal(self, step: int, layout: Layout, unequal: Unequal, first: str) -> None:
        """A warning, or SaveFailed where that is asked for: the same on all ranks."""
        if not unequal.leaves:
            return
        told = found(layout, unequal, first)
        if self._strict:
            raise SaveFailed(f"the checkpoint of step {step} was not saved: {told}")
        self.lines.put(f"warning: {told}; the copy of {first} is saved")

    def _plan(self, layout: Layout) -> Plan:
        """The blocks that this rank writes."""
        holders = self._holders if layout.parted else None
        return make_plan(
            layout, rank=self._comm.rank, size=self._comm.size, from_rank0=self._from_rank0, holders=holders
        )

    def _in_order(self, layout: Layout, snapshot: Snapshot) -> list[Buffer]:
        """The buffers in the order of the layout; the same list for the same ones, so that `Staging` knows them."""
        known, of, found = self._ordered
        if known is not snapshot.buffers or of is not layout:
            found = [snapshot.buffers[leaf.name] for leaf in layout.leaves]
            self._ordered = snapshot.buffers, layout, found
        return found

    def _copy(self, order: Order, state: State) -> None:
        """Copy this rank's slice (in lazy mode: what may change before the fence); meanwhile the writing begins."""
        layout, snapshot = order.form.layout, order.taken.snapshot
        buffers = self._in_order(layout, snapshot)
        late = [i for i, leaf in enumerate(layout.leaves) if leaf.name in snapshot.late] if self._lazy else []
        holders, plan = self._holders if layout.parted else None, self._plan(layout)
        images, error = attempt(lambda: self._staging.prepare(layout, plan))
        copying = Copying(images or [], error)
        now = sorted(set(range(len(buffers))) - set(late) - layout.parted) if late else None

        def copy(leaves: list[int] | None, reached: Callable[[int], None] | None) -> None:
            with copying.failing():
                copying.check()
                self._staging.fill(buffers, leaves, reached)

        def copy_late() -> None:
            copy(late, copying.reach)
            copying.end()

        with copying.ending():
            if self._comm.rank == 0 and not order.form.head.done():
                order.form.head = self._thread.submit(order.form.make_head, snapshot.aliases, copying)
            if self._engine.background:
                self._running = self._thread.submit(self._writer.run, order, copying)
            copy(now, None if late or holders else copying.reach)
            with copying.failing():
                if holders is not None:  # also where this rank could not copy: the others wait for its parts
                    exchange(layout, plan, holders, _parts(layout, snapshot), self._comm, self._staging.view)
            # While the rest is written, and before the thread that makes HDF5's metadata wants Python for itself.
            attempt(lambda: self._collector.remember(state, order.taken))  # else the next save looks at everything anew
            copying.waited = time.perf_counter() - order.began
            if late:
                self._copied = self._thread.submit(copy_late)
            else:
                copying.end()
        if not self._engine.background:
            together(self._comm, order.step, "while it copied its part", copying.outcome)
            self._running = Future()
            self._running.set_result(self._writer.run(order, copying))


def _parts(layout: Layout, snapshot: Snapshot) -> dict[int, Part]:
    """This rank's parts by leaf index."""
    return {index: snapshot.parts[layout.leaves[index].name] for index in layout.parted}
