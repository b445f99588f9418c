"""Bring a state to what a checkpoint holds: find one that is good, check that it fits, read it. All ranks together.

What is wrong on one rank is told to all of them, and all raise the same. See `manager.Manager.restore`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.checkpoint import store
from harness.checkpoint.agree import describe
from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.delivery import Read, load
from harness.checkpoint.manifest import Manifest, NewerVersion, parse
from harness.checkpoint.partial import Partial
from harness.checkpoint.restoring import Report, Restore
from harness.checkpoint.select import select
from harness.checkpoint.state import State, complain, prepare
from harness.errors import DataError, HarnessError, InputMissing, StorageError, UsageError

Which = int | str


class Loader:
    """Restores from one directory. `good`: rank 0's checkpoints that were looked at, kept up to date."""

    def __init__(
        self, directory: Path, comm: Comm, good: dict[Path, Manifest], log: Callable[[str], None], read: Read
    ) -> None:
        self._directory, self._comm, self._good, self._log, self._read = directory, comm, good, log, read
        self.report = Report()
        """What the last restore kept, left out and converted."""

    def newest(self, state: State, partial: Partial | None) -> Manifest | None:
        """Restore the newest good checkpoint; None where there is none. Collective. Raises DataError."""
        rejected = 0
        candidates, unreadable = self._candidates()
        while True:
            found: Any = self._comm.broadcast(unreadable or self._next(candidates))
            if "error" in found:
                raise DataError(found["error"])
            rejected = max(rejected + found["rejected"], found.get("marked", 0))
            if found["name"] is None:
                if rejected:  # also those that an earlier start found: beginning anew is for the user to decide
                    raise DataError(
                        f"none of the {rejected} checkpoints in {self._directory} is good",
                        hint="`harness ckpt ls` says why; move the directory away to begin anew",
                    )
                return None
            path = self._directory / found["name"]
            try:
                return self._load(path, found["manifest"], state, partial)
            except store.Damaged as error:
                rejected += 1
                self._reject(path, error)

    def chosen(self, which: Which, state: State, partial: Partial | None) -> Manifest:
        """Restore the one that the user names. Collective. Raises InputMissing, DataError."""
        said: dict[str, Any] = {}
        if self._comm.rank == 0:
            try:
                path = select(self._directory, which)
                said = {"path": str(path), "manifest": store.read_text(path)}
            except (HarnessError, OSError) as error:
                said = _told(error)
        found: Any = self._comm.broadcast(said)
        if "kind" in found:
            raise _error(found)
        return self._load(Path(found["path"]), found["manifest"], state, partial)

    def _candidates(self) -> tuple[list[store.Stored], Json]:
        """Rank 0: what may be restored, oldest first, or what is raised when the directory cannot be read."""
        if self._comm.rank != 0:
            return [], None
        try:
            return store.listing(self._directory, broken=True), None
        except OSError as error:
            return [], {"error": f"{self._directory} cannot be read: {error.strerror}"}

    def _next(self, candidates: list[store.Stored]) -> Json:
        """Rank 0: the newest candidate with its manifest's text; it and those passed over are removed."""
        rejected = 0
        while candidates:
            path = candidates.pop().path
            try:
                return {"rejected": rejected, "name": path.name, "manifest": store.read_text(path)}
            except (HarnessError, OSError) as error:
                rejected += 1
                self._reject(path, error)
        return {"rejected": rejected, "marked": store.count_damaged(self._directory), "name": None}

    def _load(self, path: Path, text: str, state: State, partial: Partial | None) -> Manifest:
        """All ranks parse the manifest at the same time, of which many tensors make a long one; rank 0 checks more."""
        restore = Restore()
        problem: Json = None
        try:
            manifest = parse(text) if self._comm.rank else store.check(path, text)
            restore = prepare(state, manifest, partial=partial, rank=self._comm.rank, size=self._comm.size)
            problem = [*restore.problems]
        except (store.Damaged, NewerVersion) as error:
            problem = _told(error)
        except Exception as error:
            problem = describe(error)
        for found in self._comm.all_gather(problem):
            if isinstance(found, dict):
                if "kind" in found:
                    raise _error(found)
                raise DataError(f"{path} cannot be restored: {found['message']}", hint=found["hint"])
            if isinstance(found, list) and found:
                raise complain(found, path)
        if self._comm.rank == 0:
            self._good[path] = manifest
        load(path, manifest, restore.sinks, self._comm, read=self._read)
        problem = None
        try:
            restore.finish()
        except Exception as error:
            problem = describe(error)
        for rank, found in enumerate(self._comm.all_gather(problem)):
            if isinstance(found, dict):
                raise DataError(f"{path} could not be handed over on rank {rank}: {found['message']}")
        self.report = restore.report
        if not restore.report.complete:
            self._log(f"{path.name}: {restore.report}")
        return manifest

    def _reject(self, path: Path, error: HarnessError | OSError) -> None:
        if self._comm.rank != 0:
            return
        self._log(f"warning: the checkpoint {path.name} is passed over: {str(error).splitlines()[0]}")
        self._good.pop(path, None)
        if isinstance(error, store.Damaged) and error.proven:
            try:
                store.mark_damaged(path, error.message)
            except OSError as failure:
                self._log(f"{path} could not be marked as damaged: {failure}")


_KINDS: dict[str, type[HarnessError]] = {
    kind.__name__: kind for kind in (DataError, InputMissing, NewerVersion, StorageError, UsageError)
}


def _told(error: HarnessError | OSError) -> dict[str, Any]:
    """An error on rank 0 that all ranks are to raise; see `_error`."""
    told: Any = describe(error)
    return {**told, "kind": type(error).__name__, "proven": getattr(error, "proven", False)}


def _error(told: dict[str, Any]) -> HarnessError:
    if told["kind"] == store.Damaged.__name__:
        return store.Damaged(told["message"], hint=told["hint"], proven=told["proven"])
    return _KINDS.get(told["kind"], DataError)(told["message"], hint=told["hint"])
