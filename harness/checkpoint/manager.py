"""The object a training script holds: save the state, restore the newest one that is good.

    manager = Manager("runs/exp7/checkpoints", keep=keep_last(3))
    state = State(model=model, optimizer=optimizer, extra={"epoch": 0})
    start = manager.restore(state) or 0
    for step in range(start + 1, steps + 1):
        ...
        if step % 500 == 0:
            manager.save(step, state, metrics={"val/loss": loss})
    manager.close()

All methods but the constructor are collective: all ranks call them in the same order. What fails on one rank is told
to all of them, and all raise. A save that fails leaves the earlier checkpoints as they were.

One job saves into a directory at a time: what another one left unfinished there is removed by the first save.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from harness.checkpoint import commit, store
from harness.checkpoint.agree import SaveFailed, describe, together, wait_for
from harness.checkpoint.comm import Comm, Json, detect
from harness.checkpoint.digest import root
from harness.checkpoint.engines import EngineName, choose
from harness.checkpoint.file import fit_head
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.manifest import Manifest, NewerVersion, parse, render
from harness.checkpoint.plan import make_plan
from harness.checkpoint.policy import Keep, keep_last
from harness.checkpoint.reader import load
from harness.checkpoint.replicas import compare
from harness.checkpoint.restoring import Restore
from harness.checkpoint.schema import schema_hash, schema_lines
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.staging import Image, Staging
from harness.checkpoint.state import State, complain, prepare, take
from harness.checkpoint.tree import encode
from harness.errors import DataError, HarnessError

_SPARE = 16 << 20


class Manager:
    """Checkpoints in one directory. `comm`: None finds out (`comm.detect`). `log` gets a line on rank 0 only.

    `check_replicas`: at the first save and every n-th after it, compare the replicas of all ranks; 0 never does.
    Raises Unavailable where the engine cannot work here.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        comm: Comm | None = None,
        *,
        keep: Keep | None = None,
        engine: EngineName = "auto",
        log: Callable[[str], None] | None = None,
        check_replicas: int = 10,
    ) -> None:
        self.directory = Path(directory)
        self.comm: Comm = detect() if comm is None else comm
        self._keep = keep_last(3) if keep is None else keep
        self._tell = logging.getLogger("harness.checkpoint").warning if log is None else log
        self._engine = choose(engine, self.comm, self._log)
        self._check_replicas = check_replicas
        self._staging = Staging()
        self._saves = 0
        self._from_rank0: tuple[int, ...] = ()
        self._form: _Form | None = None
        self._good: dict[Path, Manifest] = {}  # rank 0: checkpoints that were looked at

    def save(self, step: int, state: State, metrics: Mapping[str, float] | None = None) -> Path:
        """Write a checkpoint and return its path once it is durable. Collective, synchronous.

        Raises SaveFailed, on all ranks alike.
        """
        taken, _ = together(self.comm, step, "while it collected the state", lambda: _collect(step, state, metrics))
        self._require_same(taken)

        identity = uuid.uuid4().hex
        begun, opening = together(self.comm, step, "before anything was written", lambda: self._begin(taken, identity))
        temporary = self.directory / opening[0]["name"]
        try:
            if begun is None:  # not rank 0, which has laid out the file and knows how much room its metadata takes
                begun = self._form
                if begun is None or begun.schema != taken.schema:
                    begun = _Form(taken.schema, lay_out(taken.snapshot.leaves, head=opening[0]["head"]), b"")
            if self._form is None or self._form.schema != begun.schema:
                self._from_rank0 = ()
            self._form = begun
            return self._write(taken, begun, temporary, identity)
        except BaseException:
            if self.comm.rank == 0:
                commit.abandon(temporary)
            raise

    def restore(self, state: State, *, partial: bool = False) -> int | None:
        """Bring the state to that of the newest good checkpoint; returns its step, None where there is no checkpoint.

        One that is damaged is passed over for the one before it, and a line says so. `partial`: what the checkpoint
        holds beyond the state's entries is left out. Collective. Raises DataError, on all ranks alike, where the
        checkpoint does not fit the state (which is then unchanged) or where none of several is good.
        """
        rejected = 0
        candidates, unreadable = self._candidates()
        while True:
            found: Any = self.comm.broadcast(unreadable or self._next(candidates))
            if found["error"] is not None:
                raise (NewerVersion if found["newer"] else DataError)(found["error"])
            rejected = max(rejected + found["rejected"], found.get("marked", 0))
            if found["name"] is None:
                if rejected:  # also those that an earlier start found: beginning anew is for the user to decide
                    raise DataError(
                        f"none of the {rejected} checkpoints in {self.directory} is good",
                        hint="move the directory away to begin anew",
                    )
                return None
            path = self.directory / found["name"]
            manifest = parse(found["manifest"])
            try:
                self._restore_from(path, manifest, state, partial)
            except store.Damaged as error:
                rejected += 1
                self._reject(path, error)
                continue
            return manifest.step

    def close(self) -> None:
        """Wait for all ranks; nothing is pending, every save has returned complete."""
        self.comm.barrier()

    # Saving

    def _begin(self, taken: _Taken, identity: str) -> tuple[_Form | None, Json]:
        """Rank 0: the temporary directory with the data file in it."""
        if self.comm.rank != 0:
            return None, None
        commit.make_directories(self.directory)
        if self._saves == 0:
            for left in store.clean(self.directory):
                self._log(f"removed {left.name}, which an earlier program left unfinished")
        name = store.new_name(self.directory, taken.step)
        temporary = self.directory / f"{name}{commit.TEMPORARY}{identity}"
        temporary.mkdir()
        try:
            form = self._form
            if form is None or form.schema != taken.schema:
                layout = lay_out(taken.snapshot.leaves)
                self._room_for(layout)
                form = _Form(taken.schema, *fit_head(layout, taken.snapshot.aliases, temporary / "scratch.h5"))
            else:
                self._room_for(form.layout)
            commit.begin(temporary, form.layout, form.head, superblock=self._engine.superblock_first)
        except BaseException:
            commit.abandon(temporary)
            raise
        return form, {"name": temporary.name, "head": form.layout.head}

    def _write(self, taken: _Taken, form: _Form, temporary: Path, identity: str) -> Path:
        step, layout, data = taken.step, form.layout, temporary / commit.DATA
        buffers = [taken.snapshot.buffers[leaf.name] for leaf in layout.leaves]
        together(self.comm, step, "when it opened the new file", lambda: wait_for(data, layout.data_end))
        if self._check_replicas and self._saves % self._check_replicas == 0:
            self._compare(layout, buffers)

        def stage() -> tuple[list[Image], Json]:
            plan = make_plan(layout, rank=self.comm.rank, size=self.comm.size, from_rank0=self._from_rank0)
            images = self._staging.prepare(layout, plan)
            self._staging.fill(buffers)
            return images, None

        # Before any rank opens the file: with mpio that is collective, and a rank that is not there keeps the others.
        images, _ = together(self.comm, step, "while it copied its part", stage)

        def write() -> tuple[None, Json]:
            digests = self._engine.write(data, layout, images, self.comm)
            return None, [[block, f"{value:x}"] for block, value in digests.items()]

        _, digests = together(self.comm, step, "while it wrote its part", write)
        final = temporary.with_name(temporary.name.partition(commit.TEMPORARY)[0])

        def finish() -> tuple[None, Json]:
            if self.comm.rank == 0:
                self._commit(taken, form, digests, temporary, final, identity)
            return None, None

        together(self.comm, step, "while it committed it", finish)
        self._saves += 1
        if self.comm.rank == 0:
            self._prune()
        return final

    def _commit(
        self, taken: _Taken, form: _Form, digests: list[Any], temporary: Path, final: Path, identity: str
    ) -> None:
        table = np.zeros(form.layout.blocks, np.uint64)
        for block, value in (pair for part in digests for pair in part):
            table[block] = int(value, 16)
        manifest = Manifest(
            uuid=identity,
            step=taken.step,
            created=time.time(),
            world=self.comm.size,
            layout=form.layout,
            table=root(table),
            head=xxhash.xxh3_128_hexdigest(form.head),
            aliases=taken.snapshot.aliases,
            state=taken.snapshot.record,
            metrics=taken.metrics,
            info={"engine": self._engine.name},
        )
        text = render(manifest)
        commit.seal(temporary, form.layout, form.head, table, identity, taken.step)
        commit.publish(temporary, final, text)
        self._good[final] = manifest

    def _room_for(self, layout: Layout) -> None:
        needed = layout.data_end + _SPARE
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free", str(self.directory))

    def _compare(self, layout: Layout, buffers: list[Any]) -> None:
        unequal = compare(layout, buffers, self.comm)
        self._from_rank0 = unequal.leaves
        if unequal.leaves:
            names = ", ".join(layout.leaves[index].name for index in unequal.leaves[:10])
            more = f" and {len(unequal.leaves) - 10} more" if len(unequal.leaves) > 10 else ""
            ranks = ", ".join(map(str, unequal.ranks[:10])) + (", ..." if len(unequal.ranks) > 10 else "")
            self._log(
                f"warning: ranks that should be equal are not: rank {ranks} differs from rank 0 in {names}{more};"
                " rank 0's copy is saved"
            )

    def _prune(self) -> None:
        try:
            store.prune(self.directory, self._keep, self._good, self._log)
        except OSError as error:
            self._log(f"old checkpoints could not be removed: {error}")

    # Restoring

    def _candidates(self) -> tuple[list[store.Stored], Json]:
        """Rank 0: what may be restored, oldest first, or what `restore` raises when the directory cannot be read."""
        if self.comm.rank != 0:
            return [], None
        try:
            return store.listing(self.directory), None
        except OSError as error:
            return [], {"error": f"{self.directory} cannot be read: {error.strerror}", "newer": False}

    def _next(self, candidates: list[store.Stored]) -> Json:
        """Rank 0: the newest candidate that looks good, with its manifest; it and those passed over are removed."""
        rejected = 0
        while candidates:
            stored = candidates.pop()
            try:
                manifest, text = store.check(stored.path)
            except NewerVersion as error:
                return {"error": str(error), "newer": True}
            except (HarnessError, OSError) as error:
                rejected += 1
                self._reject(stored.path, error)
                continue
            self._good[stored.path] = manifest
            return {"error": None, "rejected": rejected, "name": stored.path.name, "manifest": text}
        return {"error": None, "rejected": rejected, "marked": store.count_damaged(self.directory), "name": None}

    def _restore_from(self, path: Path, manifest: Manifest, state: State, partial: bool) -> None:
        restore = Restore()
        problem: Json = None
        try:
            restore = prepare(state, manifest, partial=partial)
            problem = [*restore.problems]
        except Exception as error:
            problem = describe(error)
        for found in self.comm.all_gather(problem):
            if isinstance(found, dict):
                raise DataError(f"{path} cannot be restored: {found['message']}", hint=found["hint"])
            if isinstance(found, list) and found:
                raise complain(found, path)
        load(path, manifest, restore.sinks, self.comm)
        problem = None
        try:
            restore.finish()
        except Exception as error:
            problem = describe(error)
        for rank, found in enumerate(self.comm.all_gather(problem)):
            if isinstance(found, dict):
                raise DataError(f"{path} could not be handed over on rank {rank}: {found['message']}")

    def _reject(self, path: Path, error: HarnessError | OSError) -> None:
        if self.comm.rank != 0:
            return
        self._log(f"warning: the checkpoint {path.name} is passed over: {str(error).splitlines()[0]}")
        self._good.pop(path, None)
        if isinstance(error, store.Damaged) and error.proven:
            try:
                store.mark_damaged(path, error.message)
            except OSError as failure:
                self._log(f"{path} could not be marked as damaged: {failure}")

    def _require_same(self, taken: _Taken) -> None:
        """All ranks save the same step and the same tensors, else SaveFailed says where they differ."""
        votes: list[Any] = self.comm.all_gather([taken.step, taken.schema])
        different = [rank for rank, (step, _) in enumerate(votes) if step != votes[0][0]]
        if different:
            raise SaveFailed(
                f"the checkpoint was not saved: rank 0 saves step {votes[0][0]},"
                f" rank {different[0]} saves step {votes[different[0]][0]}"
            )
        if len({schema for _, schema in votes}) == 1:
            return
        mine = schema_lines(taken.snapshot.leaves, taken.snapshot.aliases)
        first: Any = self.comm.broadcast(mine)
        found: list[Any] = self.comm.all_gather(sorted(set(mine) ^ set(first))[:3])
        rank, lines = next((rank, lines) for rank, lines in enumerate(found) if lines)
        raise SaveFailed(
            f"the checkpoint of step {taken.step} was not saved: rank {rank} and rank 0 hold different tensors,"
            f" for example {'; '.join(lines)}"
        )

    def _log(self, line: str) -> None:
        if self.comm.rank == 0:
            self._tell(line)


@dataclass(frozen=True, eq=False)
class _Taken:
    """What one rank wants to save."""

    step: int
    snapshot: Snapshot
    schema: str
    metrics: dict[str, Json]


@dataclass(frozen=True, eq=False)
class _Form:
    """The shape of the file for one schema; `head`, the HDF5 metadata, on rank 0 only."""

    schema: str
    layout: Layout
    head: bytes


def _collect(step: int, state: State, metrics: Mapping[str, float] | None) -> tuple[_Taken, Json]:
    if step < 0:
        raise DataError(f"the step is {step}; steps count from 0")
    encoded: Any = encode(dict(metrics or {}), "metrics", {})
    snapshot = take(state)
    return _Taken(step, snapshot, schema_hash(snapshot.leaves, snapshot.aliases), encoded), None
