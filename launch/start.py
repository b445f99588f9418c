"""Start a planned run in its directory: a new attempt, the record of its command, the ranks under supervision.

One start, one attempt. Starting again by itself (restart, requeue) would be a loop around this and is not here.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from harness.errors import StorageError, Unavailable
from harness.rundir import RunDir, storage_errors, write_json
from launch import processes
from launch.jobs import job_of
from launch.plan import Plan
from launch.report import Ending
from launch.supervise import supervise


def start(plan: Plan, run: RunDir) -> int:
    """Run to the end and say how it ended; returns the exit code. Raises HarnessError where it cannot start."""
    with _alone(run):
        return _start(plan, run)


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Two starts in one run directory would mix their checkpoints. The lock goes with the process, however it ends."""
    with storage_errors(run.root):
        file = open(run.root / "lock", "a")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"{run.root} is running already", hint="wait for it, or choose another run_dir") from None
        except OSError as error:  # a file system without locks
            print(f"note: {run.root} cannot be locked ({error.strerror}): start it once only", file=sys.stderr)
        yield


def _start(plan: Plan, run: RunDir) -> int:
    attempt = run.new_attempt()
    run_id = uuid.uuid4().hex
    env = {"HARNESS_ATTEMPT": str(attempt.number), processes.RUN_ID: run_id}
    if sys.stdout.isatty() and plan.job.launcher != "horovodrun":  # horovodrun hands on whole lines, with a tag each
        env["HARNESS_TTY"] = str(shutil.get_terminal_size().columns)
    plan = plan.with_env(env)
    with storage_errors(run.root):
        run.stop.unlink(missing_ok=True)  # asked of an earlier start
    write_json(
        attempt.command,
        {
            "argv": list(plan.command.argv),
            "env": plan.command.env,
            "shell": plan.command.shell(),
            "cwd": os.getcwd(),
            "host": socket.gethostname(),
            "time": time.time(),
            "run_id": run_id,
            "launcher": plan.job.launcher,
            "slurm": job_of(os.environ),
            "mpi": str(plan.mpi) if plan.mpi else None,
            "hosts": {host.name: host.slots for host in plan.job.hosts},
            "ranks": plan.job.ranks,
            "python": platform.python_version(),
        },
    )
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    ending = supervise(plan.command, plan.job.program, run, attempt, run_id=run_id)
    if ending.state == "failed":
        _record_failure(run, ending, attempt.number)
    if ending.text:
        print(ending.text, file=sys.stderr, flush=True)
    return int(ending.code)


def _record_failure(run: RunDir, ending: Ending, attempt: int) -> None:
    """Say in the status what rank 0 could not: it may have died, or another rank's failure has ended it."""
    status = run.read_status()
    first = next((line for line in ending.text.splitlines() if line.strip()), "")
    changes = {"state": "failed", "summary": first.removeprefix("error: "), "attempt": attempt, "time": time.time()}
    try:
        write_json(run.status, status | changes)
    except StorageError as error:  # the report matters more
        print(f"note: {error}", file=sys.stderr, flush=True)
