"""A vote with a deadline: every rank says something to rank 0, rank 0 decides and answers all of them.

    verdict = ballot.hold(step, {"ready": True}, decide, timeout=600)

Unlike a collective, it ends when a rank does not come: rank 0 learns which ranks are missing and decides without them,
and a rank that rank 0 does not answer raises `NoAnswer` after its own deadline. A rank that comes late finds the
verdict waiting. One ballot may be used by another thread than the main one, by one thread at a time.

Numbers order the votes: a message for an earlier vote than the one that is being held is dropped.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from harness.checkpoint.agree import VISIBLE
from harness.checkpoint.comm import MAX_MESSAGE, Comm, Json
from harness.errors import InternalError, StorageError, Unavailable

Decide: TypeAlias = Callable[[Mapping[int, Json], "list[int]"], Json]
"""(messages by rank, missing ranks) -> verdict. Called on rank 0 only; must not raise."""

_FOLDER = ".votes-"
_PATIENCE = 2.0
"""The others wait this many times the deadline: rank 0 may need all of it, and then decides."""


class NoAnswer(StorageError):
    """Rank 0 did not answer within the deadline."""


class Ballot(Protocol):
    """See the module's docstring."""

    def hold(self, number: int, message: Json, decide: Decide, timeout: float) -> Json:
        """Rank 0's verdict on all ranks. `timeout`: seconds that rank 0 waits for the others. Raises NoAnswer."""
        ...

    def tell(self, number: int, verdict: Json) -> None:
        """Rank 0: a verdict without a vote."""
        ...

    def hear(self, number: int, timeout: float) -> Json:
        """The other ranks: the verdict of this number. Raises NoAnswer."""
        ...

    def close(self) -> None:
        """Give back what is held. Local."""
        ...


def clean(directory: Path, ballots: list[Ballot]) -> None:
    """Remove what the votes of programs that ended have left. Only where no other program saves here."""
    own = {ballot.directory.parent for ballot in ballots if isinstance(ballot, _ByFiles)}
    for left in directory.glob(f"{_FOLDER}*"):
        if left not in own and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def make_ballots(count: int, directory: Path, comm: Comm) -> list[Ballot]:
    """That many independent ballots between the ranks: by MPI where any thread may use it, else by files. Collective.

    Raises Unavailable where the ranks do not see the same directory and have nothing else to vote by.
    """
    if comm.size == 1:
        return [_Alone() for _ in range(count)]
    if comm.mpi is not None and _any_thread(comm):
        mpi = comm.mpi.Dup()
        return [_ByMpi(mpi, 2 * index) for index in range(count)]
    return _by_files(count, directory, comm)


class _Alone:
    def hold(self, number: int, message: Json, decide: Decide, timeout: float) -> Json:
        return decide({0: message}, [])

    def tell(self, number: int, verdict: Json) -> None:
        pass

    def hear(self, number: int, timeout: float) -> Json:
        raise InternalError("rank 0 has nobody to listen to")

    def close(self) -> None:
        pass


class _Between:
    """What the two ways share: the order of things. They differ in how a message travels."""

    rank: int
    size: int

    def hold(self, number: int, message: Json, decide: Decide, timeout: float) -> Json:
        if self.rank != 0:
            self._send(number, message)
            return self.hear(number, _PATIENCE * timeout)
        messages: dict[int, Json] = {0: message}
        last = number  # a rank that is ahead of this vote waits for a verdict of its own number
        deadline, wait = time.monotonic() + timeout, _Pause()
        while len(messages) < self.size and time.monotonic() < deadline:
            came = self._receive(number)
            if came is None:
                wait()
            else:
                rank, vote, messages[rank] = came
                last = max(last, vote)
        verdict = decide(messages, [rank for rank in range(self.size) if rank not in messages])
        self.tell(last, verdict)
        return verdict

    def hear(self, number: int, timeout: float) -> Json:
        deadline, wait = time.monotonic() + timeout, _Pause()
        while time.monotonic() < deadline:
            found = self._answer(number)
            if found is not None:
                return found[0]
            wait()
        raise NoAnswer(f"rank 0 did not answer within {timeout:g} s")

    def tell(self, number: int, verdict: Json) -> None:
        raise NotImplementedError

    def _send(self, number: int, message: Json) -> None:
        raise NotImplementedError

    def _receive(self, number: int) -> tuple[int, int, Json] | None:
        """Rank 0: (rank, vote, message) of a message for this vote or a later one, if one has come."""
        raise NotImplementedError

    def _answer(self, number: int) -> tuple[Json] | None:
        """The verdict of this vote or a later one, if it has come."""
        raise NotImplementedError


class _ByMpi(_Between):
    """Point-to-point messages. Nothing here blocks: sends are small, and receives look first whether there is one."""

    def __init__(self, mpi: Any, tag: int) -> None:
        self._mpi, self._up, self._down = mpi, tag, tag + 1
        self.rank, self.size = mpi.Get_rank(), mpi.Get_size()
        self._sent: list[tuple[Any, Any]] = []

    def tell(self, number: int, verdict: Json) -> None:
        data = _pack(number, verdict)
        for rank in range(1, self.size):
            self._start(data, rank, self._down)

    def close(self) -> None:
        self._sent = [(request, data) for request, data in self._sent if not request.Test()]

    def _send(self, number: int, message: Json) -> None:
        self._start(_pack(number, message), 0, self._up)

    def _start(self, data: Any, rank: int, tag: int) -> None:
        self.close()
        self._sent.append((self._mpi.Isend(data, dest=rank, tag=tag), data))

    def _receive(self, number: int) -> tuple[int, int, Json] | None:
        from mpi4py import MPI

        return self._next(number, MPI.ANY_SOURCE, self._up)

    def _answer(self, number: int) -> tuple[Json] | None:
        found = self._next(number, 0, self._down)
        return None if found is None else (found[2],)

    def _next(self, number: int, source: int, tag: int) -> tuple[int, int, Json] | None:
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self._mpi.Improbe(source, tag, status)) is not None:
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            message.Recv(data)
            found = json.loads(data.tobytes())
            if found[0] >= number:
                return status.Get_source(), found[0], found[1]
        return None


class _ByFiles(_Between):
    """A small file per message, for ranks between which there is no MPI, or none that every thread may use.

    `<number>-<rank>.json` is a message, `<number>.json` a verdict; both appear by rename. A verdict tells whose
    messages it has seen (`nonce`), so that one of an earlier vote of the same number is not taken for it.
    """

    def __init__(self, directory: Path, rank: int, size: int) -> None:
        self.directory, self.rank, self.size = directory, rank, size
        self._nonce = ""
        self._seen: dict[int, str] = {0: ""}
        self._read: set[str] = set()

    def tell(self, number: int, verdict: Json) -> None:
        for path in self.directory.glob("*.json"):  # earlier votes; nobody has sent anything for the next one yet
            vote, _, rank = path.name.removesuffix(".json").partition("-")
            if vote.isdigit() and int(vote) < number + bool(rank):
                path.unlink(missing_ok=True)
        seen = {str(rank): nonce for rank, nonce in self._seen.items()}
        self._write(f"{number}.json", [seen, verdict])
        self._seen, self._read = {0: ""}, set()

    def close(self) -> None:
        if self.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            with suppress(OSError):  # the last one of several takes their common directory with it
                self.directory.parent.rmdir()

    def _send(self, number: int, message: Json) -> None:
        self._nonce = os.urandom(8).hex()
        self._write(f"{number}-{self.rank}.json", [self._nonce, message])

    def _receive(self, number: int) -> tuple[int, int, Json] | None:
        for path in self.directory.glob("*-*.json"):
            vote, _, rank = path.name.removesuffix(".json").partition("-")
            if path.name not in self._read and vote.isdigit() and int(vote) >= number and rank.isdigit():
                self._read.add(path.name)
                nonce, message = json.loads(path.read_bytes())
                self._seen[int(rank)] = nonce
                return int(rank), int(vote), message
        return None

    def _answer(self, number: int) -> tuple[Json] | None:
        for path in self.directory.glob("*.json"):
            if path.stem.isdigit() and int(path.stem) >= number:
                seen, verdict = json.loads(path.read_bytes())
                mine = seen.get(str(self.rank), "missing" if int(path.stem) == number else None)
                if mine in (self._nonce, "missing") or not self._nonce:
                    return (verdict,)
        return None

    def _write(self, name: str, content: Json) -> None:
        temporary = self.directory / f".{name}-{self.rank}.tmp"
        temporary.write_text(json.dumps(content))
        os.rename(temporary, self.directory / name)


class _Pause:
    """Waiting for somebody: at first without losing time, then without costing any."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> None:
        waited = time.monotonic() - self._began
        time.sleep(0 if waited < 0.001 else min(0.005, waited / 20))


def _pack(number: int, content: Json) -> Any:
    data = json.dumps([number, content], separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise InternalError(f"a vote has {len(data)} bytes, more than {MAX_MESSAGE}")
    return np.frombuffer(data, np.uint8).copy()


def _any_thread(comm: Comm) -> bool:
    from mpi4py import MPI

    return all(comm.all_gather(MPI.Query_thread() >= MPI.THREAD_MULTIPLE))


def _by_files(count: int, directory: Path, comm: Comm) -> list[Ballot]:
    """Rank 0 makes a directory for each ballot; all must see it."""
    name: Any = comm.broadcast(f"{_FOLDER}{base64.b32encode(os.urandom(10)).decode().lower()}")
    problem: Json = None
    if comm.rank == 0:
        try:
            for index in range(count):
                (directory / name / str(index)).mkdir(parents=True)
        except OSError as error:
            problem = f"{directory} cannot be written: {error.strerror}"
    problem = comm.broadcast(problem)
    deadline = time.monotonic() + VISIBLE
    while problem is None and not (directory / name / str(count - 1)).is_dir():
        if time.monotonic() > deadline:
            problem = f"rank {comm.rank} does not see {directory / name}, which rank 0 has made"
        time.sleep(0.02)
    for found in comm.all_gather(problem):
        if isinstance(found, str):
            raise Unavailable(found, hint="all ranks must see the same directory: is it on a shared file system?")
    return [_ByFiles(directory / name / str(index), comm.rank, comm.size) for index in range(count)]
