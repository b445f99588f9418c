"""The processes of one start on this machine: which they are, and ending all of them. Reads /proc; Linux only.

A start is known by its session (the launcher is a session leader, so a terminal's Ctrl-C does not reach it) and by
HARNESS_RUN_ID in the environment, which also finds processes that made a session of their own, as horovodrun's do.
Ranks on other hosts end with their launcher's daemon; no process is ended by its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence

from harness.errors import Exit

RUN_ID = "HARNESS_RUN_ID"
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def members(session: int, run_id: str) -> list[int]:
    """Process ids of a start that still run, this process left out. Zombies do not count."""
    mark = f"{RUN_ID}={run_id}".encode()
    found = []
    for pid in _all():
        ours = pid != os.getpid() and (_session(pid) == session or mark in _words(pid, "environ"))
        if ours and _words(pid, "cmdline"):
            found.append(pid)
    return found


def ranks(program: Sequence[str], run_id: str) -> set[int]:
    """Process ids of the start's ranks here: those that run the program and were not started by one that does."""
    wanted, mark = [word.encode() for word in program], f"{RUN_ID}={run_id}".encode()
    running = {
        pid for pid in _all() if _words(pid, "cmdline")[: len(wanted)] == wanted and mark in _words(pid, "environ")
    }
    # A rank starts others, which look like it until they run a program of their own: one may be gone already.
    return {pid for pid in running if _parent(pid) not in {None, *running}}


def runs(pid: int) -> bool:
    """Whether there is such a process on this machine; a zombie is none."""
    return bool(_words(pid, "cmdline"))


def stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped, by SIGSTOP or a debugger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            return handle.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def ends_with(parent: int) -> Callable[[], None]:
    """For a child: the system sends it TERM when the parent ends, however that does. The main thread must start it.

    mpirun then ends its ranks. Without it they would go on unwatched, and hold the checkpoints of the next start.
    """
    prctl = ctypes.CDLL(None).prctl

    def child() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it has ended already
            os._exit(int(Exit.CRASH))

    return child


def end(session: int, run_id: str, *, grace: float) -> list[int]:
    """Ask all processes of a start to end (TERM), kill what is left after `grace` seconds; returns what was killed."""
    for pid in members(session, run_id):
        _signal(pid, signal.SIGTERM)
    until = time.monotonic() + grace
    while members(session, run_id):
        if time.monotonic() > until:
            return kill(session, run_id)
        time.sleep(0.05)
    return []


def kill(session: int, run_id: str) -> list[int]:
    """Kill all processes of a start at once; returns which these were."""
    killed: set[int] = set()
    for _ in range(100):  # again, because a process may have started another in between
        left = members(session, run_id)
        if not left:
            break
        for pid in left:
            _signal(pid, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.05)
    return sorted(killed)


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _words(pid: int, file: str) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/{file}", "rb") as handle:
            return handle.read().rstrip(b"\0").split(b"\0") if file == "environ" else _arguments(handle.read())
    except OSError:
        return []


def _arguments(text: bytes) -> list[bytes]:
    return text[:-1].split(b"\0") if text else []


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            return int(handle.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None
