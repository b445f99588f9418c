"""A vote with a deadline: every rank says something to rank 0, rank 0 decides and answers all of them.

    verdict = ballot.hold(step, {"ready": True}, decide, timeout=600)

Unlike a collective, it ends when a rank does not come: rank 0 learns which ranks are missing and decides without them,
and a rank that rank 0 does not answer raises `NoAnswer` after its own deadline. A rank that comes late finds the
verdict waiting, and learns that it was decided without it. One ballot may be used by another thread than the main one,
by one thread at a time.

Numbers order the votes: what a rank says to an earlier vote than the one that is being held is not heard.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import xxhash

from harness.checkpoint.agree import LEFT_OUT, VISIBLE
from harness.checkpoint.comm import MAX_MESSAGE, Comm, Json
from harness.checkpoint.commit import make_directories
from harness.checkpoint.file import write_all
from harness.errors import InternalError, StorageError, Unavailable

Decide: TypeAlias = Callable[[Mapping[int, Json], "list[int]"], Json]
"""(messages by rank, missing ranks) -> verdict. Called on rank 0 only; must not raise."""

_FOLDER = ".votes-"
_ROOM = 16 << 10
"""Bytes of a file for one rank's messages, at least."""
PATIENCE = 2.0
"""The others wait this many times the deadline: rank 0 may need all of it, and then decides."""


class NoAnswer(StorageError):
    """Rank 0 did not answer within the deadline."""

    def __init__(self, timeout: float) -> None:
        super().__init__(f"rank 0 did not answer within {timeout:g} s", hint=LEFT_OUT)


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

    def give_up(self) -> None:
        """Nobody will come any more: whoever waits here now or later does as if the deadline had passed. Local."""
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

    Where the ranks do not see the same directory and have nothing else to vote by, votes raise Unavailable.
    """
    if comm.size == 1:
        return [_Alone() for _ in range(count)]
    if comm.mpi is not None and _any_thread(comm):
        mpi = comm.mpi.Dup()
        return [_ByMpi(mpi, 2 * index) for index in range(count)]
    try:
        return _by_files(count, directory, comm)
    except Unavailable as error:
        return [_Nowhere(error)] * count


class _Alone:
    def hold(self, number: int, message: Json, decide: Decide, timeout: float) -> Json:
        return decide({0: message}, [])

    def tell(self, number: int, verdict: Json) -> None:
        pass

    def hear(self, number: int, timeout: float) -> Json:
        raise InternalError("rank 0 has nobody to listen to")

    def give_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Nowhere:
    """Ranks that cannot vote. They can restore."""

    def __init__(self, why: Unavailable) -> None:
        self._why = why

    def hold(self, number: int, message: Json, decide: Decide, timeout: float) -> Json:
        raise self._why

    def tell(self, number: int, verdict: Json) -> None:
        raise self._why

    def hear(self, number: int, timeout: float) -> Json:
        raise self._why

    def give_up(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Between:
    """What the two ways share: the order of things. They differ in how a message travels.

    A rank has one message at most that awaits a verdict; it withdraws it when it gives up waiting. A verdict says which
    message of a rank it answers (`nonce`, which counts them), or that there was none.
    """

    rank: int
    size: int
    _nonce = 0
    _given_up = False

    def give_up(self) -> None:
        self._given_up = True

    def hold(self, number: int, message: Json, decide: Decide, timeout: float) -> Json:
        if self.rank != 0:
            return self._ask(number, message, PATIENCE * timeout)
        deadline, wait = time.monotonic() + timeout, _Pause()
        while len(open_ := self._open(number)) < self.size - 1 and self._may_wait(deadline):
            wait()
        said = {0: message, **{rank: content for rank, (_, content) in open_.items()}}
        verdict = decide(said, [rank for rank in range(self.size) if rank not in said])
        self._tell(number, {rank: nonce for rank, (nonce, _) in open_.items()}, verdict)
        return verdict

    def hear(self, number: int, timeout: float) -> Json:
        return self._wait(number, None, timeout)[1]

    def tell(self, number: int, verdict: Json) -> None:
        self._tell(number, {}, verdict)

    def _ask(self, number: int, message: Json, timeout: float) -> Json:
        self._nonce += 1
        answered = False
        try:
            self._send(number, self._nonce, [message])
            answered, verdict = self._wait(number, self._nonce, timeout)
            return verdict
        finally:
            if not answered:
                self._send(number, self._nonce, [])

    def _wait(self, number: int, nonce: int | None, timeout: float) -> tuple[bool, Json]:
        """(whether it answers this rank's message, verdict)."""
        deadline, wait = time.monotonic() + timeout, _Pause()
        while self._may_wait(deadline):
            for vote, answered, verdict in self._verdicts():
                if (answered == nonce and nonce is not None) or (answered is None and vote >= number):
                    return answered is not None, verdict
            wait()
        raise NoAnswer(timeout)

    def _may_wait(self, deadline: float) -> bool:
        return not self._given_up and time.monotonic() < deadline

    def _send(self, number: int, nonce: int, content: list[Json]) -> None:
        """To rank 0: [message], or [] to withdraw it."""
        raise NotImplementedError

    def _open(self, number: int) -> dict[int, tuple[int, Json]]:
        """Rank 0: by rank, (nonce, message) for this vote or a later one that were neither answered nor withdrawn."""
        raise NotImplementedError

    def _tell(self, number: int, answered: Mapping[int, int], verdict: Json) -> None:
        """Rank 0: to all ranks, with the nonces of the messages it answers."""
        raise NotImplementedError

    def _verdicts(self) -> Iterator[tuple[int, int | None, Json]]:
        """(vote, nonce of this rank's message that it answers, verdict) of verdicts that have come, oldest first."""
        raise NotImplementedError


class _ByMpi(_Between):
    """Point-to-point messages. Nothing here blocks: sends are small, and receives look first whether there is one."""

    def __init__(self, mpi: Any, tag: int) -> None:
        self._mpi, self._up, self._down = mpi, tag, tag + 1
        self.rank, self.size = mpi.Get_rank(), mpi.Get_size()
        self._sent: list[tuple[Any, Any]] = []
        self._messages: dict[int, tuple[int, int, Json]] = {}

    def close(self) -> None:
        self._sent = [(request, data) for request, data in self._sent if not request.Test()]

    def _send(self, number: int, nonce: int, content: list[Json]) -> None:
        self._start(_pack([number, nonce, content]), 0, self._up)

    def _open(self, number: int) -> dict[int, tuple[int, Json]]:
        for rank, (vote, nonce, content) in self._come(None, self._up):
            if content:
                self._messages[rank] = vote, nonce, content[0]
            else:
                self._messages.pop(rank, None)
        return {rank: (nonce, content) for rank, (vote, nonce, content) in self._messages.items() if vote >= number}

    def _tell(self, number: int, answered: Mapping[int, int], verdict: Json) -> None:
        for rank in answered:
            del self._messages[rank]
        text = _pack(verdict).tobytes()
        for rank in range(1, self.size):
            nonce = answered.get(rank)
            data = b"[%d,%s,%s]" % (number, b"null" if nonce is None else b"%d" % nonce, text)
            self._start(np.frombuffer(data, np.uint8).copy(), rank, self._down)

    def _verdicts(self) -> Iterator[tuple[int, int | None, Json]]:
        for _, verdict in self._come(0, self._down):
            yield verdict

    def _start(self, data: Any, rank: int, tag: int) -> None:
        self.close()
        self._sent.append((self._mpi.Isend(data, dest=rank, tag=tag), data))

    def _come(self, source: int | None, tag: int) -> Iterator[tuple[int, Any]]:
        """(rank, content) of what has come."""
        from mpi4py import MPI

        status = MPI.Status()
        while (found := self._mpi.Improbe(MPI.ANY_SOURCE if source is None else source, tag, status)) is not None:
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            rank = status.Get_source()
            found.Recv(data)
            yield rank, json.loads(data.tobytes())


class _ByFiles(_Between):
    """A small file per rank, for ranks between which there is no MPI, or none that every thread may use.

    `<rank>` is that rank's message, `0` the verdict. They are written in place, with a checksum that tells a reader
    whether it has seen all of it: so the vote that a disk is full needs no room on it. NFS looks at a file anew when it
    is opened; for one that was not there a moment ago, or was renamed, that may take a while.
    """

    def __init__(self, directory: Path, rank: int, size: int) -> None:
        self.directory, self.rank, self.size = directory, rank, size
        self._answered: dict[int, int] = {}
        with suppress(OSError):  # room for later
            self._write([-1, 0, []] if rank else [-1, {}, None])

    def close(self) -> None:
        if self.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            with suppress(OSError):  # the last one of several takes their common directory with it
                self.directory.parent.rmdir()

    def _send(self, number: int, nonce: int, content: list[Json]) -> None:
        self._write([number, nonce, content])

    def _open(self, number: int) -> dict[int, tuple[int, Json]]:
        found = {}
        for rank in range(1, self.size):
            vote, nonce, content = self._read(rank) or (-1, 0, [])
            if content and vote >= number and nonce != self._answered.get(rank):
                found[rank] = nonce, content[0]
        return found

    def _tell(self, number: int, answered: Mapping[int, int], verdict: Json) -> None:
        self._answered.update(answered)
        self._write([number, {str(rank): nonce for rank, nonce in answered.items()}, verdict])

    def _verdicts(self) -> Iterator[tuple[int, int | None, Json]]:
        found = self._read(0)
        if found is not None:
            yield found[0], found[1].get(str(self.rank)), found[2]

    def _read(self, rank: int) -> Any:
        """None where there is nothing yet, or only a part of it."""
        try:
            data = (self.directory / str(rank)).read_bytes()
            checksum, length, text = data[:16], int(data[16:32]), data[32:]
            good = checksum == xxhash.xxh3_64_hexdigest(text[:length]).encode() and len(text) >= length
            return json.loads(text[:length]) if good else None
        except (OSError, ValueError):
            return None

    def _write(self, content: Json) -> None:
        text = _pack(content).tobytes()
        data = xxhash.xxh3_64_hexdigest(text).encode() + b"%016d" % len(text) + text
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.directory / str(self.rank), flags, 0o644)
        except FileNotFoundError:  # another job tidied up meanwhile
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory / str(self.rank), flags, 0o644)
        try:
            write_all(descriptor, data.ljust(_ROOM), 0)
        finally:
            os.close(descriptor)


class _Pause:
    """Waiting for somebody: at first without losing time, then without costing any."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> None:
        waited = time.monotonic() - self._began
        time.sleep(0 if waited < 0.001 else min(0.005, waited / 20))


def _pack(content: Json) -> Any:
    data = json.dumps(content, separators=(",", ":")).encode()
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
            make_directories(directory)
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
