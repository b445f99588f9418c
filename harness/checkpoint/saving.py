"""One save after another, each behind training: agree, copy this rank's slice, write and commit in another thread.

main thread    collect the state -> vote ("request") -> copy this rank's slice of the file into reused memory
saver thread   rank 0 makes the file -> all write their slices -> vote ("done") -> rank 0 commits, prunes

Both votes have a deadline and name the ranks that did not come (`ballot`). Between them no rank waits for another one
where all is replicated. Whatever fails on one rank ends the save on all of them; the earlier checkpoints stay.

An engine that needs the main thread (mpio) does the second line there, and the save has ended when it returns.
"""

from __future__ import annotations

import base64
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from harness.checkpoint import commit, space, store
from harness.checkpoint.agree import SaveFailed, describe, together, wait_for
from harness.checkpoint.ballot import Ballot, NoAnswer, make_ballots
from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.digest import root
from harness.checkpoint.engines import Engine
from harness.checkpoint.file import fit_head
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.lease import Lease
from harness.checkpoint.manifest import Manifest, render
from harness.checkpoint.plan import make_plan
from harness.checkpoint.policy import Keep
from harness.checkpoint.replicas import compare, warning
from harness.checkpoint.schema import schema_hash, schema_lines
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.staging import Image, Staging
from harness.checkpoint.state import State, take
from harness.checkpoint.tree import encode
from harness.errors import DataError

FILES = 4
"""Files and directories that a save makes."""


@dataclass(frozen=True)
class Settings:
    """What a Saver does; see `manager.Manager`."""

    keep: Keep
    timeout: float
    check_replicas: int
    lazy: bool
    info: Mapping[str, Json]


@dataclass(frozen=True)
class Outcome:
    """How a save ended. `failed`: why not, None for a checkpoint that is durable at `path`. Times in seconds."""

    step: int
    path: Path
    failed: str | None
    hint: str | None
    waited: float
    """For how long training stood still on this rank."""
    seconds: float
    """From the request until it was durable."""


@dataclass(frozen=True, eq=False)
class _Taken:
    """What one rank wants to save."""

    snapshot: Snapshot
    schema: str
    metrics: dict[str, Json]


@dataclass(frozen=True, eq=False)
class _Form:
    """The shape of the file for one schema; `head`, the HDF5 metadata, on rank 0 only."""

    schema: str
    layout: Layout
    head: bytes


@dataclass(frozen=True, eq=False)
class _Order:
    """What rank 0 has decided about a save that goes ahead."""

    step: int
    number: int
    identity: str
    temporary: Path
    form: _Form
    taken: _Taken
    began: float

    @property
    def final(self) -> Path:
        return self.temporary.with_name(self.temporary.name.partition(commit.TEMPORARY)[0])


class Saver:
    """The saves of one directory, one at a time. The constructor is local; see `Manager` for the arguments."""

    def __init__(
        self, directory: Path, comm: Comm, engine: Engine, settings: Settings, log: Callable[[str], None]
    ) -> None:
        self._directory, self._comm, self._engine, self._settings, self._log = directory, comm, engine, settings, log
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="harness-checkpoint")
        self._running: Future[Outcome] | None = None
        self._copied: Future[None] | None = None
        self._form: _Form | None = None
        self._from_rank0: tuple[int, ...] = ()
        self._ballots: list[Ballot] = []
        self._hosts: list[Any] = []
        self._lease: Lease | None = None
        # rank 0 only
        self._numbers = 0
        self._saved = 0
        self.good: dict[Path, Manifest] = {}
        """Checkpoints that were looked at."""

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a save is still under way."""
        return self._running is not None and not self._running.done()

    def start(self, step: int, state: State, metrics: Mapping[str, float] | None) -> Path | None:
        """Begin a save; `outcome` tells how it ended. None where an earlier one is under way on some rank.

        Collective. Raises SaveFailed, on all ranks alike, where it cannot begin.
        """
        began = time.perf_counter()
        if not self._ballots:
            self._ballots = make_ballots(3, self._directory, self._comm)
            self._hosts = self._comm.all_gather(socket.gethostname())
        taken, error = _attempt(lambda: _collect(step, state, metrics))
        message = {
            "step": step,
            "busy": self.busy,
            "schema": None if taken is None else taken.schema,
            "error": describe(error),
        }
        try:
            verdict: Any = self._ballots[0].hold(
                step,
                message,
                lambda messages, missing: self._decide(step, taken, messages, missing),
                self._settings.timeout,
            )
        except NoAnswer as silence:
            raise SaveFailed(f"the checkpoint of step {step} was not saved: {silence.message}") from None
        if verdict["step"] != step:
            raise SaveFailed(f"the checkpoint was not saved: rank 0 saves step {verdict['step']}, this rank {step}")
        if verdict["failed"] is not None:
            raise SaveFailed(
                f"the checkpoint of step {step} was not saved: {verdict['failed']}", hint=verdict["hint"]
            ) from error
        if verdict["busy"]:
            return None
        assert taken is not None
        if verdict["differ"]:
            self._tell_difference(step, taken)
        self._prepare(step, taken, verdict, began)
        return self._directory / verdict["name"].partition(commit.TEMPORARY)[0]

    def outcome(self, *, wait: bool) -> Outcome | None:
        """How the running save ended, once; None where none is running, or it has not ended and `wait` is False."""
        if self._running is None or not (wait or self._running.done()):
            return None
        ended, self._running, self._copied = self._running.result(), None, None
        return ended

    def fence(self) -> None:
        """Return once the running save has its own copy of the state. Local."""
        if self._copied is not None:
            self._copied.exception()

    def claim(self) -> None:
        """Rank 0: take the directory's lease. Raises StorageError."""
        if self._lease is None:
            commit.make_directories(self._directory)
            self._lease = Lease.acquire(self._directory, log=self._log)

    def close(self) -> None:
        """Give everything back; a save that is under way ends before. Local."""
        self._thread.shutdown()
        for ballot in self._ballots:
            ballot.close()
        if self._lease is not None:
            self._lease.release()
        self._staging.close()

    # Agreeing

    def _decide(self, step: int, taken: _Taken | None, messages: Mapping[int, Any], missing: list[int]) -> Json:
        """Rank 0: whether and how the save goes ahead."""
        verdict: dict[str, Any] = {"step": step, "failed": None, "hint": None, "busy": False, "differ": False}
        verdict |= self._refusal(missing, messages, "while it collected the state", "did not ask for a save")
        others = [(rank, message["step"]) for rank, message in messages.items() if message["step"] != step]
        if verdict["failed"] is None and others:
            verdict["failed"] = f"rank 0 saves step {step}, rank {others[0][0]} saves step {others[0][1]}"
        verdict["busy"] = any(message["busy"] for message in messages.values())
        verdict["differ"] = len({message["schema"] for message in messages.values()}) > 1
        if verdict["failed"] is None and not verdict["busy"] and not verdict["differ"]:
            assert taken is not None
            plan, error = _attempt(lambda: self._make_order(step, taken))
            verdict |= plan or self._refusal([], {0: {"error": describe(error)}}, "before anything was written", "")
        return verdict

    def _make_order(self, step: int, taken: _Taken) -> dict[str, Json]:
        self.claim()
        if self._saved == 0:
            for left in store.clean(self._directory):
                self._log(f"removed {left.name}, which an earlier program left unfinished")
        form = self._form
        if form is None or form.schema != taken.schema:
            layout = lay_out(taken.snapshot.leaves)
            space.preflight(self._directory, layout.data_end, FILES)
            scratch = self._directory / f"step-scratch{commit.TEMPORARY}{uuid.uuid4().hex}"
            form = self._form = _Form(taken.schema, *fit_head(layout, taken.snapshot.aliases, scratch))
            self._from_rank0 = ()
        else:
            space.preflight(self._directory, form.layout.data_end, FILES)
        self._numbers += 1
        identity = uuid.uuid4().hex
        every = self._settings.check_replicas
        return {
            "number": self._numbers,
            "uuid": identity,
            "name": f"{store.new_name(self._directory, step)}{commit.TEMPORARY}{identity}",
            "head": form.layout.head,
            "compare": self._comm.size > 1 and every > 0 and self._saved % every == 0,
        }

    def _refusal(self, missing: list[int], messages: Mapping[int, Any], when: str, absent: str) -> dict[str, Json]:
        """Why a save cannot go on, in a sentence that names the ranks; nothing where it can."""
        if missing:
            named = ", ".join(f"{rank} ({self._hosts[rank]})" for rank in missing[:8])
            named += f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            plural = "s" if len(missing) > 1 else ""
            return {
                "failed": f"rank{plural} {named} {absent} within {self._settings.timeout:g} s",
                "hint": "saving is for all ranks: each must come here at the same step",
            }
        errors = [(rank, message["error"]) for rank, message in sorted(messages.items()) if message["error"]]
        if not errors:
            return {}
        rank, told = errors[0]
        others = f" (and {len(errors) - 1} other ranks)" if len(errors) > 1 else ""
        place = f"rank {rank} on {told['host']}{others}" if self._comm.size > 1 else "it"
        return {"failed": f"{place} failed {told.get('when') or when}: {told['message']}", "hint": told["hint"]}

    def _tell_difference(self, step: int, taken: _Taken) -> None:
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

    def _prepare(self, step: int, taken: _Taken, verdict: dict[str, Any], began: float) -> None:
        """Copy this rank's slice, and hand it to the thread that writes it. Collective where ranks exchange bytes."""
        order: _Order | None = None

        def lay_out_here() -> tuple[_Order, Json]:
            form = self._form
            if form is None or form.schema != taken.schema:
                form = self._form = _Form(taken.schema, lay_out(taken.snapshot.leaves, head=verdict["head"]), b"")
                self._from_rank0 = ()
            temporary = self._directory / verdict["name"]
            return _Order(step, verdict["number"], verdict["uuid"], temporary, form, taken, began), None

        if verdict["compare"]:
            order, _ = together(self._comm, step, "when it laid out the file", lay_out_here)
            buffers = [taken.snapshot.buffers[leaf.name] for leaf in order.form.layout.leaves]
            unequal = compare(order.form.layout, buffers, self._comm)
            self._from_rank0 = unequal.leaves
            if unequal.leaves:
                self._log(warning(order.form.layout, unequal))
        else:
            order, _ = lay_out_here()

        layout = order.form.layout
        buffers = [taken.snapshot.buffers[leaf.name] for leaf in layout.leaves]
        late = taken.snapshot.late if self._settings.lazy and self._engine.background else set()
        now = [index for index, leaf in enumerate(layout.leaves) if leaf.name not in late]

        def copy() -> list[Image]:
            plan = make_plan(layout, rank=self._comm.rank, size=self._comm.size, from_rank0=self._from_rank0)
            images = self._staging.prepare(layout, plan)
            self._staging.fill(buffers, now if late else None)
            return images

        images, error = _attempt(copy)

        def copy_rest() -> None:
            if images is not None and late:
                self._staging.fill(buffers, [i for i, leaf in enumerate(layout.leaves) if leaf.name in late])

        waited = time.perf_counter() - began
        if self._engine.background:
            self._copied = self._thread.submit(copy_rest)
            self._running = self._thread.submit(self._run, order, images, error, self._copied, waited)
            return
        together(self._comm, step, "while it copied its part", lambda: _raise(error))
        ended: Future[Outcome] = Future()
        ended.set_result(self._run(order, images, None, None, 0.0))
        self._running = ended

    # Writing

    def _run(
        self,
        order: _Order,
        images: list[Image] | None,
        error: Exception | None,
        copied: Future[None] | None,
        waited: float,
    ) -> Outcome:
        """Write, vote, commit. Ends on all ranks alike, whatever fails; raises nothing."""
        when, digests = "while it copied its part", None
        try:
            self._begin(order)
            if copied is not None and error is None:
                late = copied.exception()
                error = late if isinstance(late, Exception) else None
            if error is None and images is not None:
                when = "when it opened the new file"
                data = order.temporary / commit.DATA
                wait_for(data, order.form.layout.data_end)
                when = "while it wrote its part"
                digests = self._engine.write(data, order.form.layout, images, self._comm)
        except Exception as problem:
            error = problem
        told: Any = describe(error)
        if told is not None:
            told["when"] = when
        message = {"error": told, "digests": _pack(digests or {})}
        try:
            verdict: Any = self._ballots[2].hold(
                order.number,
                message,
                lambda messages, missing: self._commit(order, messages, missing),
                self._settings.timeout,
            )
        except Exception as problem:
            told = describe(problem)
            verdict = {"failed": told["message"], "hint": told["hint"]}
        seconds = time.perf_counter() - order.began
        if self._comm.rank == 0 and verdict["failed"] is None:
            self._prune()
        return Outcome(
            order.step, order.final, verdict["failed"], verdict["hint"], waited or seconds, seconds
        )

    def _begin(self, order: _Order) -> None:
        """Rank 0 makes the file, the others wait until it has. Raises what rank 0 met, on rank 0; NoAnswer."""
        if self._comm.rank != 0:
            if self._ballots[1].hear(order.number, 2 * self._settings.timeout) is not True:
                raise _Elsewhere
            return
        made = False
        try:
            order.temporary.mkdir()
            commit.begin(order.temporary, order.form.layout, order.form.head, superblock=self._engine.superblock_first)
            made = True
        finally:
            self._ballots[1].tell(order.number, made)

    def _commit(self, order: _Order, messages: Mapping[int, Any], missing: list[int]) -> Json:
        """Rank 0: make it a checkpoint, or remove what was begun."""
        refusal = self._refusal(missing, messages, "while it wrote its part", "did not finish writing")
        if not refusal:
            _, error = _attempt(lambda: self._publish(order, messages))
            if error is not None:
                refusal = self._refusal([], {0: {"error": describe(error)}}, "while it committed it", "")
        if refusal:
            commit.abandon(order.temporary)
        else:
            self._saved += 1
        return {"failed": None, "hint": None} | refusal

    def _publish(self, order: _Order, messages: Mapping[int, Any]) -> None:
        form, taken = order.form, order.taken
        table = np.zeros(form.layout.blocks, np.uint64)
        for message in messages.values():
            blocks, digests = _unpack(message["digests"])
            table[blocks] = digests
        manifest = Manifest(
            uuid=order.identity,
            step=order.step,
            created=time.time(),
            world=self._comm.size,
            layout=form.layout,
            table=root(table),
            head=xxhash.xxh3_128_hexdigest(form.head),
            aliases=taken.snapshot.aliases,
            state=taken.snapshot.record,
            metrics=taken.metrics,
            info={"engine": self._engine.name, **self._settings.info},
        )
        text = render(manifest)
        commit.seal(order.temporary, form.layout, form.head, table, order.identity, order.step)
        if self._lease is not None:
            self._lease.require()
        commit.publish(order.temporary, order.final, text)
        self.good[order.final] = manifest

    def _prune(self) -> None:
        try:
            store.prune(self._directory, self._settings.keep, self.good, self._log)
        except OSError as error:
            self._log(f"old checkpoints could not be removed: {error}")


class _Elsewhere(Exception):
    """Another rank has failed, and says so itself."""


def _collect(step: int, state: State, metrics: Mapping[str, float] | None) -> _Taken:
    if step < 0:
        raise DataError(f"the step is {step}; steps count from 0")
    encoded: Any = encode(dict(metrics or {}), "metrics", {})
    snapshot = take(state)
    return _Taken(snapshot, schema_hash(snapshot.leaves, snapshot.aliases), encoded)
