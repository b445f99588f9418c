"""What `harness stop` does: ask a run to save its state and stop, and on request wait until it has.

stop(find_run("runs/charlm"), wait=True, timeout=None)
"""

from __future__ import annotations

import getpass
import socket
import time

from harness.errors import Exit, Unavailable
from harness.rundir import RunDir, write_atomic
from launch import jobs
from launch.runs import Life, look

BY_USER = "asked by"
"""How a stop file begins that `harness stop` has made."""
BY_SIGNAL = "signal"
"""How one begins that `harness run` has made because a signal came; what a person makes says something else."""


def stop(run: RunDir, *, wait: bool = False, timeout: float | None = None) -> int:
    """Make the stop file and say what will happen; returns the exit code.

    0: asked, or nothing runs, or with `wait` it has stopped or finished; 1: it failed meanwhile. Raises Unavailable
    where it still runs after `timeout` seconds.
    """
    life = look(run)
    if not life.alive:
        if jobs.is_queued(life.job_state):
            if life.attempts:
                _ask(run)  # a follow-up or requeued job that finds it ends at once
            print(f"{life.directory} is not running; its job {life.job} waits in the queue: scancel {life.job}")
            return 0
        print(f"{life.directory} is not running: {_last(life)}")
        return 0
    _ask(run)
    step = f" at step {life.step}" if life.step is not None else ""
    print(
        f"{life.directory} is running{step}; it saves its state and stops, in about 10 s or after this step", flush=True
    )
    return _wait(run, timeout) if wait else 0


def stopped_by_user(run: RunDir) -> str | None:
    """Who asked with `harness stop` or a stop file of his own, None where nobody did."""
    try:
        text = run.stop.read_text(encoding="utf-8", errors="replace")[:200].strip()
    except OSError:
        return None
    return None if text.split(" ")[0] == BY_SIGNAL else text or "a stop file"


def _ask(run: RunDir) -> None:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        user = "somebody"
    write_atomic(run.stop, f"{BY_USER} {user} on {socket.gethostname()} with `harness stop`\n")


def _wait(run: RunDir, timeout: float | None) -> int:
    until = None if timeout is None else time.monotonic() + timeout
    while (life := look(run)).alive:
        if until is not None and time.monotonic() > until:
            raise Unavailable(f"{life.directory} is still running after {timeout:g} s", hint="`harness logs` tells why")
        time.sleep(0.5)
    print(f"{life.directory}: {_last(life)}")
    # not the state as it is told: a follow-up job may wait in the queue already
    return 0 if run.read_status().get("state") in ("stopped", "finished") else int(Exit.CRASH)


def _last(life: Life) -> str:
    saved = f"; the state of step {life.last_checkpoint} is saved" if life.last_checkpoint is not None else ""
    if life.ended is not None and life.ended.startswith(life.state):  # "stopped at step 250 of 600 (...), state saved"
        return life.ended
    if life.state in ("new", "finished", "stopped"):
        text = {"new": "it has never been started"}.get(life.state, life.ended or life.state)
        return f"{life.state}, {text}{saved}" if text != life.state else f"{text}{saved}"
    return f"{life.state}, {life.ended}{saved}" if life.ended else f"{life.state}{saved}"
