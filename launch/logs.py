"""What `harness logs` prints: what one rank has printed, and with --follow what it prints from now on.

show_logs(find_run("runs/charlm"), rank=0, attempt=None, follow=True)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from harness.errors import InputMissing
from harness.rundir import Attempt, RunDir, storage_errors
from launch.runs import look

_PIECE = 2**20
_LOOK = 2.0
"""Seconds between two looks at whether a run still runs."""


def show_logs(run: RunDir, *, rank: int | None = None, attempt: int | None = None, follow: bool = False) -> None:
    """Copy a log to stdout as it is. Without `rank`: rank 0's, or the launcher's where no rank has begun.

    `follow` goes on until the run has ended, and over to the next attempt. Raises InputMissing.
    """
    now = _attempt(run, attempt)
    path, offset, looked = _log(now, rank), 0, 0.0
    while True:
        offset = _copy(path, offset)
        if not follow:
            return
        newest = run.attempts()[-1]
        if attempt is None and newest.number != now.number:
            now, offset = newest, 0
            path = _log(now, rank, wait=True)
        if rank is None and path.name == "launcher.log" and now.log(0).exists():
            path, offset = now.log(0), 0
        if time.monotonic() - looked >= _LOOK:
            looked = time.monotonic()
            if newest.number != now.number or not look(run).alive:
                _copy(path, offset)  # what came before it ended
                return
        time.sleep(0.2)


def _attempt(run: RunDir, number: int | None) -> Attempt:
    attempts = run.attempts()
    if not attempts:
        raise InputMissing(f"{run.root} has not been started yet", hint="`harness status` tells what it waits for")
    if number is None:
        return attempts[-1]
    for attempt in attempts:
        if attempt.number == number:
            return attempt
    raise InputMissing(f"{run.root} has no attempt {number}", hint=f"it has attempts 1 to {attempts[-1].number}")


def _log(attempt: Attempt, rank: int | None, *, wait: bool = False) -> Path:
    path, launcher = attempt.log(rank or 0), attempt.root / "launcher.log"
    if path.exists() or (wait and rank is not None):
        return path
    if rank is None:
        if launcher.exists() or wait:
            return launcher
        raise InputMissing(f"attempt {attempt.number} has no logs", hint=f"look into {attempt.root}")
    known = sorted(int(file.stem[5:]) for file in path.parent.glob("rank-*.log") if file.stem[5:].isdecimal())
    ranks = f"ranks {known[0]} to {known[-1]}" if len(known) > 1 else f"rank {known[0]}" if known else "no rank"
    raise InputMissing(f"attempt {attempt.number} has no log of rank {rank}", hint=f"it has logs of {ranks}")


def _copy(path: Path, offset: int) -> int:
    """Write what a file holds from `offset` on to stdout; returns where it ends."""
    if not path.exists():
        return offset
    with storage_errors(path), open(path, "rb") as file:
        file.seek(offset)
        while data := file.read(_PIECE):
            sys.stdout.buffer.write(data)
            offset += len(data)
    sys.stdout.flush()
    return offset
