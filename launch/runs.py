"""Finding runs, and what is known about one without asking its ranks. Reads files and locks; starts and writes nothing.

run = find_run("runs/charlm")
life = look(run)
print(life.state, life.step)
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import InputMissing
from harness.rundir import CONSEQUENCES, Attempt, RunDir, read_object
from launch import jobs
from launch.saved import checkpoints, step_of

STALE = 600.0
"""Seconds after which a run on another host that cannot be asked is taken for dead."""
DEPTH = 6


@dataclass(frozen=True)
class Life:
    """What is known about a run. Times are unix seconds."""

    directory: str
    state: str
    """new, queued, starting, running, stopping, restarting (it waits for that), finished, stopped, failed, or lost: it
    ended without a word"""
    step: int | None = None
    steps: int | None = None
    rate: float | None = None
    """Steps per second."""
    eta_s: float | None = None
    loss: float | None = None
    last_checkpoint: int | None = None
    attempts: int = 0
    ranks: int | None = None
    host: str | None = None
    job: str | None = None
    job_state: str | None = None
    restarts: int = 0
    """How often Slurm has started the job again."""
    ended: str | None = None
    """Why the last attempt ended."""
    updated: float | None = None

    @property
    def alive(self) -> bool:
        return self.state in ("starting", "running", "stopping", "restarting")


def is_run(path: Path) -> bool:
    """Whether a directory is a run's: it holds a frozen config and traces of a start or of a submission."""
    if not (path / "config.yaml").is_file():
        return False
    return any((path / name).exists() for name in ("attempts", "lock", "status.json", "submitted.json"))


def find_run(name: str | Path) -> RunDir:
    """The run of a directory, or of a name below `runs`. Raises InputMissing."""
    path = Path(name)
    if not path.exists() and len(path.parts) == 1 and (Path("runs") / path).is_dir():
        path = Path("runs") / path
    if not path.exists():
        raise InputMissing(f"there is no run {name}", hint="`harness status` lists the runs below runs/")
    if not path.is_dir() or not is_run(path):
        hint = "`harness status` lists the runs below it" if path.is_dir() else "a run is a directory"
        raise InputMissing(f"{path} is not a run directory", hint=hint)
    return RunDir(path)


def find_runs(folder: Path) -> list[RunDir]:
    """All runs in and below a directory, at most DEPTH levels down, by path. Raises InputMissing where it is none."""
    if not folder.is_dir():
        raise InputMissing(
            f"there is no directory {folder}", hint="`harness run CONFIG` starts a run; or give a directory with runs"
        )
    found: list[RunDir] = []
    for root, folders, _ in os.walk(folder):
        path = Path(root)
        if is_run(path):
            found.append(RunDir(path))
            folders.clear()
        elif len(path.relative_to(folder).parts) >= DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def look(run: RunDir) -> Life:
    """What is known about one run."""
    return look_at_all([run])[0]


def look_at_all(runs: Sequence[RunDir]) -> list[Life]:
    """The same for many, with one question to Slurm."""
    last = [_last(run) for run in runs]
    told = jobs.states(job for entry in last for job in entry.jobs)
    return [_life(run, entry, told) for run, entry in zip(runs, last, strict=True)]


def is_locked(run: RunDir, host: str | None) -> bool:
    """Whether a `harness run` holds the run directory's lock.

    On this host the kernel's table is read first, so that a run that starts at this moment does not meet our lock.
    """
    try:
        if host in (None, socket.gethostname()) and not _in_table(os.stat(run.root / "lock").st_ino):
            return False
        with open(run.root / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True)
class _Last:
    attempt: Attempt | None
    count: int
    command: Mapping[str, Any]
    job: str | None
    jobs: tuple[str, ...]


def _last(run: RunDir) -> _Last:
    attempts = run.attempts()
    attempt = attempts[-1] if attempts else None
    command = read_object(attempt.command) if attempt is not None else {}
    slurm = command.get("slurm")
    job = str(slurm["id"]) if isinstance(slurm, dict) and "id" in slurm else None
    submitted = read_object(run.root / "submitted.json").get("jobs")
    waiting = [str(job) for job in submitted][:1000] if isinstance(submitted, list) else []
    return _Last(attempt, len(attempts), command, job, tuple(dict.fromkeys([*([job] if job else []), *waiting])))


def _life(run: RunDir, last: _Last, told: Mapping[str, str]) -> Life:
    status = run.read_status()
    current = last.attempt is None or status.get("attempt") == last.attempt.number
    host = _text(last.command.get("host"))
    updated = _number(status.get("time"))
    alive = _alive(run, last, status, told) if last.attempt is not None else False
    queued = next((job for job in last.jobs if jobs.is_queued(told.get(job))), None)
    state = str(status.get("state", "starting")) if current and status else ("starting" if last.attempt else "new")
    if alive:
        state = "stopping" if run.stop.exists() and state == "running" else state
        if last.attempt is not None and read_object(last.attempt.ending).get("restart") is True:
            state = "restarting"
        elif state not in ("starting", "running", "stopping"):
            state = "running"  # the ranks have said how it ended, and are about to
    elif state in ("starting", "running"):
        state = "lost"
    if not alive and queued is not None and state != "finished":
        state = "queued"
    job = last.job if alive or queued is None else queued
    slurm = last.command.get("slurm")
    return Life(
        directory=str(run.root),
        state=state,
        step=_whole(status.get("step")),
        steps=_whole(status.get("steps")),
        rate=_number(status.get("rate")) if alive else None,
        eta_s=_number(status.get("eta_s")) if alive else None,
        loss=_number(status.get("loss")),
        last_checkpoint=step_of(saved[-1]) if (saved := checkpoints(run.checkpoints)) else None,
        attempts=last.count,
        ranks=_whole(last.command.get("ranks")),
        host=host,
        job=job,
        job_state=told.get(job) if job else None,
        restarts=_whole(slurm.get("restarts")) or 0 if isinstance(slurm, dict) else 0,
        ended=None
        if last.attempt is None or (alive and state != "restarting")
        else _why(run, last, status if current else {}, told),
        updated=updated,
    )


def _alive(run: RunDir, last: _Last, status: Mapping[str, Any], told: Mapping[str, str]) -> bool:
    host = _text(last.command.get("host"))
    if is_locked(run, host):
        return True
    if last.job is not None and last.job in told:
        return jobs.is_alive(told[last.job]) and status.get("state") in ("starting", "running", None)
    if host is not None and host == socket.gethostname():
        return False
    # on another host, with a file system whose locks may not reach here, or ranks that no `harness run` has started
    updated = _number(status.get("time")) or 0.0
    fresh = time.time() - updated < STALE
    return fresh and status.get("state") in ("starting", "running")


def _why(run: RunDir, last: _Last, status: Mapping[str, Any], told: Mapping[str, str]) -> str:
    assert last.attempt is not None
    state, summary = status.get("state"), _text(status.get("summary"))
    if state in ("finished", "stopped"):
        return summary or str(state)
    errors, ending = last.attempt.errors(), read_object(last.attempt.ending)
    judged = _text(ending.get("summary"))
    if judged and not (errors and errors[0].get("type") not in CONSEQUENCES):  # `harness run` saw what no rank could
        kind = _text(ending.get("kind"))
        return f"{kind}: {judged}" if kind and kind not in ("crash", "interrupted") else judged
    if errors:
        cause = errors[0]
        where = f"rank {cause.get('rank')} on {cause.get('host')}"
        step = f" at step {cause['step']}" if cause.get("step") is not None else ""
        message = str(cause.get("message") or "").strip().splitlines() or [""]
        return f"{where}{step}: {cause.get('type')}: {message[0]}"
    if state == "failed" and summary:
        return summary
    slurm = told.get(last.job) if last.job is not None else None
    return "it ended without a word" + (f"; Slurm says {slurm}" if slurm else "")


def _in_table(inode: int) -> bool:
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return True  # not told: the lock itself must be asked
    return any("FLOCK" in line and f":{inode} " in line for line in lines)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
