"""What the scripts that stand for ranks share: who am I, and the files a rank leaves. No MPI by itself."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from harness.env import identify
from harness.rundir import RunDir, write_json

me = identify()
run = RunDir(Path(sys.argv[1]))
attempt = run.attempt(int(os.environ["HARNESS_ATTEMPT"]))
(attempt.root / f"pid-{me.rank}").write_text(str(os.getpid()))


def say(text: str) -> None:
    """One line in one write, so that lines of several ranks do not mix."""
    os.write(1, f"{text}\n".encode())


def status(state: str, **more: object) -> None:
    write_json(run.status, {"state": state, "step": 7, "attempt": attempt.number, "world": me.size, **more})


def fail(
    kind: str, message: str, *, code: int = 1, sentence: bool = False, hint: str | None = None, late: float = 0.0
) -> None:
    """Leave an error file as a rank does."""
    entry = {
        "rank": me.rank, "size": me.size, "host": "node", "pid": os.getpid(), "time": time.time() + late, "step": 120,
        "section": "data", "type": kind, "message": message, "hint": hint, "sentence": sentence, "code": code,
        "traceback": f"Traceback (most recent call last):\n  File \"x.py\", line 3, in f\n{kind}: {message}\n",
    }  # fmt: skip
    write_json(attempt.error(me.rank), entry)


def everybody_is_here(seconds: float = 30.0) -> None:
    """Wait until all ranks have started."""
    until = time.monotonic() + seconds
    while len(list(attempt.root.glob("pid-*"))) < me.size and time.monotonic() < until:
        time.sleep(0.02)


def sleep_stubbornly(seconds: float = 120.0) -> None:
    """A rank that hangs in a collective: it does not answer to TERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.2)


__all__ = ["attempt", "everybody_is_here", "fail", "json", "me", "run", "say", "sleep_stubbornly", "status", "time"]
