"""Who am I, by the environment alone: rank, size, local rank, node, launcher, job, attempt. Pure; imports no MPI.

The tables are those of the launchers' own documentation. MPI's names come before Slurm's: a `mpirun` inside a Slurm
job inherits SLURM_PROCID=0 for every rank.

>>> identify({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}).rank
1
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from harness.errors import Unavailable


@dataclass(frozen=True)
class Source:
    """Names of the variables of one launcher; the first name that is set counts."""

    launcher: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()


SOURCES = (
    Source("horovodrun-gloo", ("HOROVOD_RANK",), ("HOROVOD_SIZE",), ("HOROVOD_LOCAL_RANK",), ("HOROVOD_LOCAL_SIZE",)),
    Source(
        "openmpi",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Source(
        "mvapich",
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Source("jsrun", ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_LOCAL_RANK",)),
    Source("flux", ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    Source(
        "hydra",
        ("PMI_RANK", "PALS_RANKID"),
        ("PMI_SIZE", "PALS_SIZE"),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
    Source(
        "slurm",
        ("PMIX_RANK", "SLURM_PROCID"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
    ),
)


@dataclass(frozen=True)
class Environment:
    """One process among others, as its launcher describes it. Local numbers are None where the launcher is silent."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    host: str
    job: str | None
    attempt: int | None
    elastic: bool = False
    """Started by `horovodrun` in its elastic mode: ranks may come and go."""

    @property
    def gloo(self) -> bool:
        """Started by `horovodrun --gloo`: there is no MPI to join."""
        return self.launcher == "horovodrun-gloo"


def identify(environ: Mapping[str, str] = os.environ) -> Environment:
    """The process's place in its job; rank 0 of 1 where no launcher says otherwise.

    Raises Unavailable when a variable that must be a number is not.
    """
    for source in SOURCES:
        rank, size = _number(environ, source.rank), _number(environ, source.size)
        if rank is None or size is None:
            continue
        if source.launcher == "slurm" and "SLURM_STEP_ID" not in environ:
            continue  # the batch shell itself, not a task that srun started
        if source.launcher == "slurm" and size == 1 and not environ.get("PMIX_RANK"):
            continue  # the shell of `srun --pty bash`: Open MPI ends a process that it takes for a rank without PMIx
        local_rank, local_size = _number(environ, source.local_rank), _number(environ, source.local_size)
        if source.launcher == "slurm":
            local_size = _slurm_tasks_here(environ)
        return _environment(environ, source.launcher, rank, size, local_rank, local_size)
    return _environment(environ, "none", 0, 1, 0, 1)


def _environment(
    environ: Mapping[str, str], launcher: str, rank: int, size: int, local_rank: int | None, local_size: int | None
) -> Environment:
    if not 0 <= rank < size:
        raise Unavailable(
            f"the launcher ({launcher}) calls this process rank {rank} of {size}, which cannot be",
            hint="unset leftovers of another launcher in the environment, or start with `harness run`",
        )
    return Environment(
        launcher=launcher,
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        host=environ.get("HOROVOD_HOSTNAME") or socket.gethostname(),
        job=environ.get("SLURM_JOB_ID") or environ.get("PBS_JOBID") or environ.get("LSB_JOBID"),
        attempt=_number(environ, ("HARNESS_ATTEMPT",)),
        elastic=launcher == "horovodrun-gloo" and environ.get("HOROVOD_ELASTIC") == "1",
    )


def _slurm_tasks_here(environ: Mapping[str, str]) -> int | None:
    """From lists like "4(x2),3": 4 tasks on each of two nodes, 3 on the next. None where it tells nothing."""
    text, node = environ.get("SLURM_STEP_TASKS_PER_NODE", ""), _number(environ, ("SLURM_NODEID",))
    if node is None:
        return None
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if match is None:
            return None
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    return None


def _number(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        text = environ.get(name)
        if text is None or text == "":
            continue
        if not text.isdecimal() or len(text) > 9:
            raise Unavailable(f"the environment variable {name} is {text[:40]!r}, not a number")
        return int(text)
    return None
