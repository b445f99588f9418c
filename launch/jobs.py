"""What Slurm knows about jobs, asked with its own commands by argv; all of it is silent where there is no Slurm.

Not here: writing batch scripts (`slurm.py`), submitting them (`submit.py`).

    states(["17", "18_1"])     # {"17": "RUNNING", "18_1": "PENDING (Priority)"}
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

PATIENCE = 20.0
"""Seconds a question to Slurm's controller may take."""
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "SPECIAL_EXIT")
ALIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING")
_SHOWN = re.compile(r"\b(JobState|Reason|Requeue|StartTime|EndTime|PreemptTime)=(\S+)")
_JOB = re.compile(r"[0-9]{1,18}(?:_[0-9]{1,9})?")
_LIMIT = 1_000_000


def job_of(environ: Mapping[str, str]) -> dict[str, object] | None:
    """The Slurm job this process is in: `id` as Slurm's commands take it, `restarts`, `partition`. None outside."""
    job, array, task = (environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID"))
    name = f"{array}_{task}" if array and task else job
    if not _JOB.fullmatch(name):
        return None
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    count = int(restarts) if restarts.isdecimal() and len(restarts) < 9 else 0
    return {"id": name, "restarts": count, "partition": environ.get("SLURM_JOB_PARTITION")}


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Each job's state as Slurm calls it, with the reason where it waits; jobs it has forgotten are left out."""
    wanted = sorted({job for job in jobs if _JOB.fullmatch(job)})
    if not wanted:
        return {}
    found: dict[str, str] = {}
    for line in ask(["squeue", "--noheader", "--array", "--format=%A|%i|%T|%r"]).splitlines():
        parts = line.strip().split("|", 3)
        if len(parts) == 4:
            text = f"{parts[2]} ({parts[3]})" if parts[2] == "PENDING" and parts[3] != "None" else parts[2]
            found |= {parts[0]: text, parts[1]: text}
    missing = [job for job in wanted if job not in found]
    if missing:
        words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", "--jobs"]
        for line in ask([*words, ",".join(missing)]).splitlines():
            job, _, state = line.strip().partition("|")
            found.setdefault(job, state)
    for job in [job for job in missing if job not in found][:20]:  # no accounting: the controller remembers a while
        if (told := shown(job).get("JobState")) is not None:
            found[job] = told
    return {job: found[job] for job in wanted if job in found}


def shown(job: str) -> dict[str, str]:
    """What the controller knows of a job: JobState, Reason, Requeue, StartTime, EndTime, PreemptTime.

    {} where it knows none or does not answer.
    """
    return dict(reversed(_SHOWN.findall(ask(["scontrol", "--oneliner", "show", "job", job]))))


def is_preempted(known: Mapping[str, str]) -> bool:
    """Whether a running job, as `shown` tells of it, is within its grace time, after which Slurm would put it back."""
    when, start = known.get("PreemptTime", ""), known.get("StartTime", "")
    return known.get("Requeue") == "1" and when[:1].isdecimal() and start[:1].isdecimal() and when >= start


def is_queued(state: str | None) -> bool:
    """Whether a state as `states` gives it means that the job will start later."""
    return state is not None and state.split(" ")[0] in QUEUED


def is_alive(state: str | None) -> bool:
    """Whether it means that the job holds nodes now."""
    return state is not None and state.split(" ")[0] in ALIVE


def end_time(environ: Mapping[str, str]) -> float | None:
    """When the allocation this process is in ends, in unix seconds; None outside one, or without a limit.

    The controller is asked first, because a limit can be changed while the job runs; SLURM_JOB_END_TIME is what it was
    at the start, and older versions do not set it.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not _JOB.fullmatch(job):
        return None
    with suppress(ValueError):  # there is none, or it is Unknown
        return time.mktime(time.strptime(shown(job).get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    given = environ.get("SLURM_JOB_END_TIME", "")
    return float(given) if given.isdecimal() and 0 < len(given) < 12 else None


def ask(argv: Sequence[str]) -> str:
    """What one of Slurm's commands prints; "" where it is not there, fails or does not answer in time."""
    done = call(argv, env=os.environ | {"SLURM_TIME_FORMAT": "standard"})
    return done.stdout[:_LIMIT] if done.returncode == 0 else ""


def call(
    argv: Sequence[str], *, patience: float | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. One that cannot be started or gives no answer has code 127, and says so on stderr.

    patience: seconds, PATIENCE when not given. env: the whole environment, ours when not given.
    """
    seconds = PATIENCE if patience is None else patience
    if shutil.which(argv[0]) is None:
        return subprocess.CompletedProcess(argv, 127, "", f"there is no {argv[0]} here")
    try:
        return subprocess.run(
            list(argv),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env=dict(os.environ if env is None else env),
        )
    except subprocess.TimeoutExpired:
        why = f"{os.path.basename(argv[0])} gave no answer within {seconds:g} s"
    except OSError as error:
        why = f"{argv[0]} cannot be started: {error.strerror}"
    return subprocess.CompletedProcess(argv, 127, "", why)
