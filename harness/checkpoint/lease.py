"""One job per checkpoints directory: a lease that survives crashes, is given back at the end, and expires.

    lease = Lease.acquire(directory)        # raises InUse: who holds it, since when, what to do
    ...
    if not lease.still_mine(): ...          # before anything is committed
    lease.release()

`lease/<n>.json` says who holds it; the highest n counts. It is taken over by creating n + 1, which of several programs
exactly one can do; the files before it are then removed. The holder touches its file every BEAT seconds. It counts as
gone when it has given it back, when its process is gone (told on its own machine only), or when the file has not been
touched for EXPIRY seconds, by the file system's clock. Where that clock may be the nodes' own (Lustre), they differ by
less than SKEW, beyond which nothing on a cluster works; within it, whoever wants the lease also watches for a while.

Within one process the lease is shared. No MPI, no HDF5; one daemon thread. Not a lock for many writers of small things.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from harness.checkpoint import leasefile
from harness.checkpoint.commit import make_directories
from harness.checkpoint.leasefile import Holder, Seen
from harness.checkpoint.space import explain
from harness.errors import StorageError, Unavailable

BEAT = 10.0
EXPIRY = 60.0
SKEW = 300.0
GRACE = 5.0
"""Seconds that a process of this machine gets to end: it may be about to, or be a command that holds it briefly."""
LEASE = "lease"


class InUse(Unavailable):
    """Another job, which lives, saves into this directory."""


class Lease:
    """The right to save into one directory; see `acquire`. It is given back when it is forgotten, too."""

    def __init__(self, held: _Held) -> None:
        self._held = held
        self._give_back = weakref.finalize(self, _let_go, held, os.getpid())

    @classmethod
    def acquire(
        cls,
        directory: str | os.PathLike[str],
        *,
        wait: float | None = None,
        log: Callable[[str], None] | None = None,
        beat: float = BEAT,
        expiry: float = EXPIRY,
    ) -> Lease:
        """Take the lease of a checkpoints directory, which is made where it is not there. One process of a job does so.

        `wait`: seconds to wait for a holder that may have crashed on another machine, which then costs one line for
        `log`; None: as long as that takes to find out (at most expiry + beat). One on this machine is waited for no
        longer than GRACE. Raises InUse, StorageError.
        """
        place = Path(os.path.realpath(directory)) / LEASE
        with _registry:
            held = _held_here.get(str(place))
            if held is not None and held.pid == os.getpid():
                held.users += 1  # first, so that a lease forgotten meanwhile does not end it
                if held.check():
                    return cls(held)
                held.users -= 1
        tell = logging.getLogger("harness.checkpoint").warning if log is None else log
        with _told(place):
            held = _take(place, expiry + beat if wait is None else wait, tell, beat, expiry)
        with _registry:
            _held_here[str(place)] = held
        held.start(beat)
        return cls(held)

    @property
    def holder(self) -> Holder:
        return self._held.holder

    def still_mine(self) -> bool:
        """Whether nobody took it over, as happens to a program that was stopped for longer than EXPIRY."""
        return self._give_back.alive and self._held.check()

    def release(self) -> None:
        """Give it back; again is fine. A file system that fails now is not told of: the lease then expires."""
        self._give_back()


def wait_until_free(directory: str | os.PathLike[str], *, log: Callable[[str], None]) -> None:
    """Return once nobody saves into a directory: `Lease.acquire`, without taking it. Raises InUse, StorageError."""
    if (Path(directory) / LEASE).is_dir():
        Lease.acquire(directory, log=log).release()


def live_holder(directory: str | os.PathLike[str], *, expiry: float = EXPIRY) -> Holder | None:
    """Who saves into a directory now, as far as one look can tell; None where nobody does. Raises StorageError."""
    place = Path(directory) / LEASE
    with _told(place):
        seen = leasefile.newest(place)
        if seen is None or seen.holder.released:
            return None
        alive = leasefile.life(seen.holder)
        try:
            gone = alive is None and leasefile.age(place, seen) > expiry
        except OSError:  # only somebody who may write here has a file system's clock
            gone = alive is None and time.time() - seen.touched / 1e9 > expiry + SKEW
        return None if gone or alive is False else seen.holder


class _Held:
    """A lease of this process: its file, how many share it, its heartbeat."""

    def __init__(self, place: Path, number: int, holder: Holder) -> None:
        self.place, self.number, self.holder, self.pid = place, number, holder, os.getpid()
        self.users = 1
        self._end = threading.Event()

    @property
    def file(self) -> Path:
        return leasefile.path_of(self.place, self.number)

    def start(self, beat: float) -> None:
        threading.Thread(target=self._run, args=(beat,), name="checkpoint lease", daemon=True).start()

    def _run(self, beat: float) -> None:
        while not self._end.wait(beat):
            # A file system that is away for a while is no reason to give up: others see the age, and still_mine asks.
            with contextlib.suppress(OSError):
                os.utime(self.file, follow_symlinks=False)

    def check(self) -> bool:
        try:
            seen, newest = leasefile.look(self.place, self.number), max(leasefile.numbers(self.place))
            return seen is not None and seen.holder.uuid == self.holder.uuid and newest == self.number
        except (OSError, ValueError):
            return False

    def stop(self) -> None:
        self._end.set()
        if self.check():
            with contextlib.suppress(OSError):
                leasefile.write(self.place, self.number, replace(self.holder, released=True), over=True)


_registry = threading.RLock()  # a lease may be forgotten by the garbage collection while this thread holds it
_held_here: dict[str, _Held] = {}


def _let_go(held: _Held, pid: int) -> None:
    if os.getpid() != pid:  # a forked child forgets what is its parent's
        return
    with _registry:
        held.users -= 1
        if held.users:
            return
        if _held_here.get(str(held.place)) is held:
            del _held_here[str(held.place)]
    held.stop()


def _take(place: Path, wait: float, log: Callable[[str], None], beat: float, expiry: float) -> _Held:
    if place.is_symlink():
        raise StorageError(f"{place} is a link, which a lease never is", hint="remove it")
    make_directories(place)
    began = time.monotonic()
    watched: Seen | None = None
    since = began
    while True:
        seen = leasefile.newest(place)
        alive = None if seen is None else leasefile.life(seen.holder)
        if seen is None or seen.holder.released or alive is False:
            if held := _create(place, 0 if seen is None else seen.number):
                return held
            watched = None
            continue
        now = time.monotonic()
        if alive:
            if now - began >= min(wait, GRACE):
                raise _in_use(place, seen)
            time.sleep(min(0.1, wait))
            continue
        if watched is None or (watched.number, watched.holder) != (seen.number, seen.holder):
            watched, since = seen, now
        elif watched.touched != seen.touched:  # a heartbeat
            raise _in_use(place, seen)
        age, unchanged = leasefile.age(place, seen), now - since
        if age > expiry + SKEW or unchanged > expiry or (age > expiry and unchanged > 1.5 * beat):
            log(f"took over the checkpoints of {seen.holder}, which gave no sign for {max(age, unchanged):.0f} s")
            if held := _create(place, seen.number):
                return held
            watched = None
            continue
        if now - began >= wait:
            raise _in_use(place, seen)
        if unchanged == 0:
            log(f"waiting up to {wait:.0f} s: {place.parent} is held by {seen.holder}, which may have ended")
        time.sleep(min(1.0, beat / 10, max(0.01, began + wait - now)))


def _create(place: Path, after: int) -> _Held | None:
    """Take number after + 1, if that is still free and then the newest. Exactly one of several programs can."""
    if after >= leasefile.LAST:
        raise StorageError(f"{place} holds numbers that no lease has", hint=f"remove {place}")
    holder = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), *leasefile.process(), _job(), time.time())
    number = after + 1
    if not leasefile.write(place, number, holder):
        return None
    held = _Held(place, number, holder)
    if not held.check():  # this program saw an old list of the directory
        held.file.unlink(missing_ok=True)
        return None
    for name in os.listdir(place):
        match = leasefile.NAME.fullmatch(name)
        if int(match[1]) < number if match else name.endswith(".tmp"):  # also what programs that were killed have left
            with contextlib.suppress(OSError):
                os.unlink(place / name)
    return held


def _in_use(place: Path, seen: Seen) -> InUse:
    local = leasefile.life(seen.holder)
    return InUse(
        f"{place.parent} is in use by {seen.holder}",
        hint="end that job first, or choose another directory"
        + ("" if local else f"; if it is certainly gone, remove {place}"),
    )


def _job() -> str:
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "COBALT_JOBID")
    found = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return found if found.isprintable() and len(found) <= 100 else ""


@contextlib.contextmanager
def _told(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _, hint = explain(error) or (None, f"{place.parent} must be a directory that this user can write")
        raise StorageError(
            f"the lease {place} cannot be taken or read: {error.strerror or error}", hint=hint
        ) from error
