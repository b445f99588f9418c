"""The files of a lease: who holds it, since when, whether that process still runs. The rules are in `lease`.

A file is written as a whole, and its content is not trusted: whatever is not as it should be has a holder that cannot
be told. Everything here raises OSError.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = re.compile(r"([0-9]{8}|[1-9][0-9]{8,14})\.json")
LAST = 10**15 - 1
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """Who holds or held a lease. `place`: the machine since its last start, and the process's view of it."""

    uuid: str = ""
    host: str = ""
    pid: int = 0
    place: str = ""
    birth: str = ""  # of the process, so that another one with its number is not taken for it
    job: str = ""
    started: float = 0.0
    released: bool = False

    def __str__(self) -> str:
        if not self.uuid:
            return "a program that cannot be told"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {since}"


@dataclass(frozen=True)
class Seen:
    """A lease file as it was seen: number, content, time stamp in ns."""

    number: int
    holder: Holder
    touched: int


def path_of(place: Path, number: int) -> Path:
    """The file of a number."""
    return place / f"{number:08d}.json"


def write(place: Path, number: int, holder: Holder, *, over: bool = False) -> bool:
    """Write a lease file as a whole. False where it exists and is not to be written `over`."""
    target = path_of(place, number)
    temporary = place / f"{uuid.uuid4().hex}.tmp"
    data = (json.dumps(asdict(holder)) + "\n").encode()
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if over:
            os.rename(temporary, target)
            return True
        try:
            os.link(temporary, target)
        except FileExistsError:
            seen = look(place, number)  # NFS may answer so to a repeated request that had succeeded
            return seen is not None and seen.holder.uuid == holder.uuid
        except FileNotFoundError:  # the winner has removed what it took for a leftover
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            return _write_exclusively(target, data)
        return True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _write_exclusively(target: Path, data: bytes) -> bool:
    """For file systems without hard links: for a moment the file is empty, and its holder cannot be told."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return True


def numbers(place: Path) -> list[int]:
    """The numbers of the lease files there are, in no order."""
    try:
        return [int(match[1]) for name in os.listdir(place) if (match := NAME.fullmatch(name))]
    except FileNotFoundError:
        return []


def newest(place: Path) -> Seen | None:
    """The lease that counts: the one with the highest number."""
    for _ in range(100):
        found = numbers(place)
        if not found:
            return None
        if seen := look(place, max(found)):
            return seen
        time.sleep(0.02)  # somebody removed it just now, or an old list of the directory is seen
    raise OSError(errno.ESTALE, "the directory is listed otherwise than it is", str(place))


def look(place: Path, number: int) -> Seen | None:
    """One lease file; whatever is not as it should be has a holder that cannot be told. None: it is not there."""
    path = path_of(place, number)
    try:
        # Opening, unlike stat, asks NFS for the time stamp as it is now.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        try:
            return Seen(number, Holder(), os.lstat(path).st_mtime_ns)
        except FileNotFoundError:
            return None
    try:
        status = os.fstat(descriptor)
        data = os.read(descriptor, _MAX_BYTES) if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        data = b""
    finally:
        os.close(descriptor)
    return Seen(number, parse(data), status.st_mtime_ns)


def parse(data: bytes) -> Holder:
    """The holder behind a file's content, `Holder()` for anything that is not as it should be."""
    try:
        value = json.loads(data)
        holder = Holder(**value)
    except (ValueError, TypeError, RecursionError):
        return Holder()
    texts = (holder.uuid, holder.host, holder.place, holder.birth, holder.job)
    if not all(isinstance(text, str) and text.isprintable() and len(text) <= 300 for text in texts):
        return Holder()
    if type(holder.pid) is not int or not 0 < holder.pid < 1 << 31 or not isinstance(holder.released, bool):
        return Holder()
    if type(holder.started) not in (int, float) or not 0 <= holder.started < 1 << 35:
        return Holder()
    return holder


def age(place: Path, seen: Seen) -> float:
    """Seconds since the last heartbeat, both times by the file system."""
    probe = place / f"{uuid.uuid4().hex}.tmp"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.utime(descriptor)
        return (os.fstat(descriptor).st_mtime_ns - seen.touched) / 1e9
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(probe)


def process() -> tuple[str, str]:
    """(place, birth) of this process; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        view = os.readlink("/proc/self/ns/pid")  # containers of one machine number their processes each for itself
        return f"{boot} {view}", Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "", ""


def life(holder: Holder) -> bool | None:
    """Whether the holder's process runs; None where that cannot be told: on another machine, or hidden."""
    if not holder.place or holder.place != process()[0]:
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    try:
        fields = Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in ("Z", "X"):  # its first thread has ended; another one may be in the middle of a write
            return len(os.listdir(f"/proc/{holder.pid}/task")) > 1
        return fields[19] == holder.birth
    except (OSError, IndexError):
        return None
