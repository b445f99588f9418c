"""How a rank fails: an error file that names the cause, then the whole job ends at once.

A rank that just returns or raises leaves the others waiting in a collective for ever; only MPI_Abort, or under Gloo
the launcher that sees an exit code, ends them. So nothing here waits for anyone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from typing import NoReturn

from harness.clock import Clock
from harness.env import Environment
from harness.errors import Exit, HarnessError
from harness.rundir import Attempt, write_json


def code_of(error: BaseException) -> int:
    """The exit code for an exception."""
    if isinstance(error, HarnessError):
        return int(error.code)
    if isinstance(error, KeyboardInterrupt):
        return int(Exit.INTERRUPTED)
    return int(Exit.CRASH)


def record(error: BaseException, environment: Environment, clock: Clock, attempt: Attempt | None) -> None:
    """Tell the error on stderr, as a sentence or with its traceback, and write this rank's error file."""
    told = isinstance(error, HarnessError)
    trace = "".join(traceback.format_exception(error))
    # `harness run` reports from the error files, so rank 0 need not tell it on the console as well
    stream = getattr(sys.stderr, "file", sys.stderr) if "HARNESS_RUN_ID" in os.environ else sys.stderr
    with contextlib.suppress(OSError, ValueError):  # a full disk or a reader that is gone must not keep this rank here
        print(f"error: {error}" if told else trace, file=stream, flush=True)
    if attempt is None:
        return
    entry = {
        "rank": environment.rank,
        "size": environment.size,
        "host": environment.host,
        "pid": os.getpid(),
        "time": time.time(),
        "step": clock.step,
        "section": clock.section,
        "type": type(error).__name__,
        "message": error.message if isinstance(error, HarnessError) else str(error),
        "hint": error.hint if isinstance(error, HarnessError) else None,
        "sentence": told,
        "code": code_of(error),
        "traceback": trace,
    }
    try:
        write_json(attempt.error(environment.rank), entry)
    except HarnessError as failed:  # a full disk must not hide the first error
        with contextlib.suppress(OSError, ValueError):
            print(f"error: the error file could not be written: {failed}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this rank, and with it the job, without waiting for the others and without any atexit hook."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1:
            MPI.COMM_WORLD.Abort(code)
    os._exit(code)
