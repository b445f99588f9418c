"""One `harness run` per run directory, and what is done about one that was killed.

    with alone(run): ...        # raises Unavailable: who runs it, where, since when

The lock goes with the process, however that ends. Its file says who holds it. Not the lease of the checkpoints, which
also keeps out what was not started by `harness run`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from harness.errors import Unavailable
from harness.rundir import RunDir, read_object, storage_errors
from launch import processes
from launch.ckpt_lease import nobody_saves
from launch.jobs import job_of
from launch.supervise import GRACE, say


@contextlib.contextmanager
def alone(run: RunDir) -> Iterator[None]:
    """Hold the run directory; two starts in one would mix their checkpoints. Ends what a killed start has left here.

    Raises Unavailable where it runs already, also where its ranks were started by hand.
    """
    with storage_errors(run.root):
        file = open(run.root / "lock", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                f"{run.root} is running already{_holder(file)}",
                hint=f"`harness stop {shlex.quote(str(run.root))}` stops it; or choose another run_dir",
            ) from None
        except OSError as error:  # a file system without locks
            print(f"note: {run.root} cannot be locked ({error.strerror}): start it once only", file=sys.stderr)
        else:
            _sign(file)
            _end_leftovers(run)
        nobody_saves(run)
        yield


def _sign(file: TextIO) -> None:
    job = job_of(os.environ)
    told = f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job['id']}" if job else "")
    with contextlib.suppress(OSError):  # a full disk; the lock itself counts
        file.truncate(0)
        # not through the file's buffer, which would be tried again when it is closed
        os.write(file.fileno(), f"{told}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())


def _holder(file: TextIO) -> str:
    """': process 77 on node07, job 5, since ...'; "" where the lock does not say it."""
    with contextlib.suppress(OSError):
        file.seek(0)
        if (text := file.read(300).strip()) and text.isprintable():
            return f": {text}"
    return ""


def _end_leftovers(run: RunDir) -> None:
    """End what the last start has left on this host where its `harness run` was killed: nobody watches it any more."""
    last = run.attempts()[-1:]
    if not last or last[0].ending.exists():
        return
    told = read_object(last[0].command)
    run_id = told.get("run_id")
    if told.get("host") != socket.gethostname() or not isinstance(run_id, str) or len(run_id) != 32:
        return
    if processes.members(-1, run_id):
        say(f"note: the `harness run` of attempt {last[0].number} was killed; what it has left is ended first")
        processes.end(-1, run_id, grace=GRACE)
