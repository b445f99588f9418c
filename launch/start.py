"""Start a planned run in its directory, and again where it fails and may be restarted, until it has ended for good.

One start is one attempt: its directory, the record of its command, the ranks under supervision. Whether there is
another is decided in `restart.py`; requeueing a job is not done here.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import socket
import sys
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.errors import Exit, StorageError
from harness.rundir import ROLL_BACK, Attempt, RunDir, storage_errors, write_atomic, write_json
from launch import processes
from launch.jobs import job_of
from launch.plan import Plan
from launch.report import Ending
from launch.restart import Tried, next_start, sentence, table, without
from launch.saved import checkpoints, step_of
from launch.supervise import Requests, handling, say, supervise

if TYPE_CHECKING:
    from harness.config import Config


def start(plan: Plan, run: RunDir, config: Config) -> int:
    """Run to the end and say how it ended; returns the exit code. Raises HarnessError where it cannot start.

    Call it on the main thread, inside `lock.alone`.
    """
    with handling() as requests:
        with storage_errors(run.root):
            run.stop.unlink(missing_ok=True)  # asked of an earlier start
        if plan.hosts is not None:
            write_atomic(run.hosts, plan.hosts)
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
        tried = _until_it_ends(plan, run, config, requests)
    last = tried[-1]
    lines = [last.ending.text] if last.ending.text else []
    if last.ending.state == "failed" and last.ending.kind != "interrupted":
        lines.append(f"logs: {_logs(run.attempt(last.number), last.ending)}")
    if len(tried) > 1:
        lines.append(table(tried))
    # the same config again, or the same model with these checkpoints, would fail again
    if last.ending.state != "finished" and last.ending.code not in (Exit.CONFIG, Exit.DATA):
        lines.append(next_step(run))
    if lines:
        print("\n".join(lines), file=sys.stderr, flush=True)
    return int(last.ending.code)


def next_step(run: RunDir) -> str:
    """The command with which a run that is not finished goes on, for a person."""
    saved = checkpoints(run.checkpoints)  # rank 0 may have ended before it could tell of the last one
    state = f"the state of step {step_of(saved[-1])} is saved; go on" if saved else "start again"
    return f"{state} with: harness run {shlex.quote(str(run.root))}"


def _until_it_ends(plan: Plan, run: RunDir, config: Config, requests: Requests) -> list[Tried]:
    """All attempts, the oldest first."""
    tried: list[Tried] = []
    back_to = None
    while True:
        began, names = time.monotonic(), checkpoints(run.checkpoints)
        attempt, ending = _once(plan, run, config, requests, back_to)
        newest = back_to or (names[-1] if names else None)
        names = checkpoints(run.checkpoints)
        saved = names[-1] if names else None
        tried.append(
            Tried(
                attempt.number, ending, time.monotonic() - began, newest, saved, _furthest(run, attempt), plan.job.ranks
            )
        )
        wanted = requests.asked or run.stop.exists()
        following = None if wanted else next_start(tried, config.restart, names)
        _record(run, tried[-1], again=following is not None)
        if following is None:
            return tried
        if ending.host is not None and (fewer := without(plan, ending.host, config)) is not None:
            plan = fewer
        back_to = following.back_to
        print(f"{ending.text}\nlogs: {_logs(attempt, ending)}", file=sys.stderr, flush=True)
        origin = back_to or saved
        say(sentence(following, config.restart.most, plan.job.ranks, origin))
        if (ended := _wait(following.wait, run, requests)) is not None:
            tried[-1] = _replaced(tried[-1], ended)
            return tried


def _once(plan: Plan, run: RunDir, config: Config, requests: Requests, back_to: str | None) -> tuple[Attempt, Ending]:
    attempt = run.new_attempt()
    run_id = uuid.uuid4().hex
    env = {"HARNESS_ATTEMPT": str(attempt.number), processes.RUN_ID: run_id}
    if back_to is not None:
        env[ROLL_BACK] = back_to
    if sys.stdout.isatty() and plan.job.launcher != "horovodrun":  # horovodrun hands on whole lines, with a tag each
        env["HARNESS_TTY"] = str(shutil.get_terminal_size().columns)
    plan = plan.with_env(env)
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
    ending = supervise(
        plan.command,
        plan.job.program,
        run,
        attempt,
        run_id=run_id,
        requests=requests,
        settings=config.watchdog,
        least=plan.job.elastic.least if plan.job.elastic is not None else None,
    )
    return attempt, ending


def _wait(seconds: float, run: RunDir, requests: Requests) -> Ending | None:
    """Let the back-off pass; how the run ends instead, where somebody asks for that. Nothing runs meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if requests.interrupts:
            return Ending(Exit.INTERRUPTED, "failed", "ended while it waited for a restart", kind="interrupted")
        if requests.stops or os.path.exists(run.stop):
            return Ending(Exit.STOPPED, "stopped", "stopped while it waited for a restart", kind="stopped")
        time.sleep(min(0.1, seconds))
    return None


def _replaced(last: Tried, ending: Ending) -> Tried:
    """The attempt failed before somebody ended the wait: both are told."""
    return replace(last, ending=replace(ending, text=f"{last.ending.text}\n{ending.text}", rank=last.ending.rank))


def _furthest(run: RunDir, attempt: Attempt) -> int:
    """Steps that were done, as far as status, heartbeats and errors of an attempt tell."""
    status = run.read_status()
    steps = [status.get("step") if status.get("attempt") == attempt.number else None]
    steps += [one.step for one in attempt.heartbeats().values()]
    steps += [error.get("step") for error in attempt.errors()]
    return max((step for step in steps if isinstance(step, int)), default=0)


def _logs(attempt: Attempt, ending: Ending) -> str:
    log = attempt.log(ending.rank if ending.rank is not None else 0)
    return str(log if log.exists() else attempt.root)


def _record(run: RunDir, tried: Tried, *, again: bool) -> None:
    """Say in the status what rank 0 could not: it may have died, or another rank's failure has ended it."""
    ending = tried.ending
    told = {
        "state": ending.state,
        "kind": ending.kind,
        "code": int(ending.code),
        "summary": ending.cause,
        "rank": ending.rank,
        "host": ending.host,
        "step": tried.step,
        "began": tried.began,
        "saved": tried.saved,
        "seconds": round(tried.seconds, 3),
        "restart": again,
        "time": time.time(),
    }
    try:
        write_json(run.attempt(tried.number).ending, told)
        if ending.state == "failed" or ending.state != run.read_status().get("state"):
            changes = {"state": ending.state, "summary": ending.cause, "attempt": tried.number, "time": time.time()}
            write_json(run.status, run.read_status() | changes)
    except StorageError as error:  # the report matters more
        print(f"note: {error}", file=sys.stderr, flush=True)
