"""A config and the machine at hand -> a `Plan`: how many ranks, where, by which launcher, with what command line.

The only place that looks at the machine for a start; it starts no ranks and writes nothing.

    plan = make_plan(config, ["runs/a"])
    print(plan.command.shell())
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import ConfigError, Unavailable, UsageError
from harness.rundir import RunDir
from launch import hosts as hosts_module
from launch import mpi as mpi_module
from launch.command import Command, Elastic, Job, Launcher, build
from launch.discovery import try_discovery
from launch.hosts import Allocation, Placement, is_local
from launch.mpi import Mpi
from launch.nodelist import Host

if TYPE_CHECKING:
    from harness.config import Config

UNKNOWN = "discovered"
"""Stands for the hosts of an elastic run that only its discovery command knows."""
COOLDOWN = 10
"""Seconds that a host stays out at least. horovodrun waits for its discovery command, which may take seconds, before
it gives out ranks anew: a host that is back by then gets a rank, but no process, and the others wait for it in vain."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Plan:
    """A start that could be made now. `notes` are lines a user should see first."""

    job: Job
    mpi: Mpi | None
    command: Command
    allocation: Allocation
    notes: tuple[str, ...] = ()
    hosts: str | None = None
    """What the run directory's file `hosts` says when an elastic run starts; None where nobody asks it."""

    def with_env(self, env: Mapping[str, str]) -> Plan:
        """The same start with more variables for the ranks."""
        job = replace(self.job, env=self.job.env | dict(env))
        return replace(self, job=job, command=build(job, self.mpi))


def _grace(config: Config) -> dict[str, str]:
    """Where a worker dies, mpirun gives the others one second; parameter servers save their state first."""
    if config.parallel.strategy != "parameter_server":
        return {}
    return {"OMPI_MCA_odls_base_sigkill_timeout": "20"}


def make_plan(
    config: Config, arguments: Sequence[str], environ: Mapping[str, str] = os.environ, *, probe: bool = True
) -> Plan:
    """Decide everything about a start of `python -m harness *arguments`.

    `probe=False` tries nothing out: neither srun, by a job step, nor the command that tells an elastic run its hosts.
    Raises ConfigError, InputMissing, UsageError or Unavailable: more ranks than slots, no MPI, a bad list of hosts.
    """
    launch = config.launch
    for name in launch.env:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"launch.env: {name!r} is no name of an environment variable")
    allocation = hosts_module.find(launch.hosts, launch.hostfile, environ)
    ranks = launch.ranks or default_ranks(allocation)
    if not launch.elastic and launch.ranks and (config.restart.min_ranks or 1) > ranks:
        raise UsageError(
            f"restart.min_ranks (--min-ranks) is {config.restart.min_ranks}, more than the {ranks} ranks of the start",
            hint="it is how few may go on where a host is gone",
        )
    elastic = _elastic(config, ranks) if launch.elastic else None
    if elastic is None and (launch.max_ranks, launch.discover) != (None, None):
        raise ConfigError("launch.max_ranks and launch.discover go with launch.elastic=true only")
    if launch.discover is not None:  # which hosts there are is told later
        allocation = Allocation("given", launch.discover, (Host(UNKNOWN, ranks),), cores=allocation.cores)
    placement = hosts_module.place(allocation, ranks)
    if elastic is not None and launch.interfaces is None and launch.discover is None:
        _check_interfaces(allocation)
    wanted = launch.launcher if elastic is None else "horovodrun"
    launcher, mpi = choose(wanted, config.slurm.mpi, allocation, environ, probe)
    gloo = launcher == "horovodrun" and (mpi is None or elastic is not None or _wants_gloo({**environ, **launch.env}))
    cores = config.slurm.cpus_per_rank or cores_per_rank(allocation, placement, environ)
    given = environ.get("OMP_NUM_THREADS", "")
    job = Job(
        program=(sys.executable, "-m", "harness", *arguments),
        launcher=launcher,
        hosts=_named(placement.hosts, launcher),
        oversubscribed=placement.oversubscribed,
        gpus=allocation.gpus > 0,
        root=os.geteuid() == 0,
        threads=launch.threads or (int(given) if given.isdecimal() and len(given) < 6 else 0) or cores,
        cores=cores,
        bind=launch.bind,
        interfaces=launch.interfaces,
        mpi_io=launch.mpi_io,
        slurm_mpi=config.slurm.mpi,
        gloo=gloo,
        elastic=elastic,
        horovodrun=_horovodrun(environ) if launcher == "horovodrun" else "horovodrun",
        flags=tuple(launch.mpi_flags),
        env={**_grace(config), **launch.env},
        export=tuple(launch.export),
        inherited=tuple(sorted(environ)),
    )
    notes = [placement.note] if placement.note else []
    if probe and launch.discover is not None and (note := try_discovery(launch.discover, ranks, environ)) is not None:
        notes.append(note)
    if gloo and launch.mpi_flags:
        notes.append("launch.mpi_flags are not used: horovodrun starts the ranks without MPI")
    hosts = None
    if elastic is not None and launch.discover is None:
        room = hosts_module.place(allocation, max(ranks, min(elastic.most, allocation.slots)))
        hosts = "".join(f"{host}\n" for host in room.hosts)
    return Plan(job, mpi, build(job, mpi), allocation, tuple(notes), hosts)


def _elastic(config: Config, ranks: int) -> Elastic:
    if config.launch.launcher not in ("auto", "horovodrun"):
        raise ConfigError(f"launch.elastic goes with the launcher horovodrun, not with {config.launch.launcher}")
    if config.horovod.cycle_time is not None:
        raise ConfigError(
            "launch.elastic does not go with horovod.cycle_time: Horovod 0.28 crashes when it is started again with it"
        )
    least, most = config.restart.min_ranks or 1, config.launch.max_ranks or ranks
    if not least <= ranks <= most:
        raise UsageError(
            f"an elastic run starts with {ranks} ranks (-n), "
            + (f"fewer than its --min-ranks {least}" if ranks < least else f"more than its --max-ranks {most}"),
            hint="-n is between --min-ranks and --max-ranks",
        )
    file = RunDir(Path(os.path.abspath(config.directory))).hosts
    discover = config.launch.discover or shlex.join(["cat", str(file)])
    low = min(max(COOLDOWN, round(config.restart.backoff)), 3600)
    return Elastic(least, most, discover, (low, min(max(low, round(config.restart.longest)), 3600)))


def _check_interfaces(allocation: Allocation) -> None:
    """Raises UsageError where horovodrun would wait for a second host, to find out which interfaces both have."""
    if len(allocation.hosts) == 1 and not is_local(name := allocation.hosts[0].name):
        raise UsageError(
            f"an elastic run on {name} alone needs the name of its network interface: horovodrun finds that out with"
            " two hosts only",
            hint="launch.interfaces=eth0, say; or another host",
        )


def default_ranks(allocation: Allocation) -> int:
    """All slots of hosts that were given or allocated; on this machine one per GPU, else one."""
    return allocation.slots if allocation.kind != "local" else max(1, allocation.gpus)


def choose(
    wanted: str, slurm_mpi: str, allocation: Allocation, environ: Mapping[str, str], probe: bool
) -> tuple[Launcher, Mpi | None]:
    """The launcher and the MPI on PATH. Raises Unavailable when what it needs is not there."""
    if wanted == "local":
        return "local", None
    if wanted == "srun":
        if shutil.which("srun", path=environ.get("PATH")) is None:
            raise Unavailable("there is no srun on PATH", hint="load Slurm's module, or use --launcher mpirun")
        if probe and allocation.kind != "slurm":
            _ask_slurm(environ)
        return "srun", _maybe_mpi(environ)
    if wanted == "horovodrun":
        return "horovodrun", _maybe_mpi(environ)
    mpi = _maybe_mpi(environ)
    # Open MPI and srun understand each other through PMIx; other MPIs bring a mpirun that knows Slurm by itself
    fits = wanted == "auto" and allocation.kind == "slurm" and (mpi is None or mpi.family == "openmpi")
    if mpi is not None and _in_step(environ):
        fits = False
    if fits and _srun_starts(slurm_mpi, environ, probe):
        return "srun", mpi
    return "mpirun", mpi if mpi is not None else mpi_module.find(environ)


def cores_per_rank(allocation: Allocation, placement: Placement, environ: Mapping[str, str]) -> int:
    """A node's cores divided by its ranks, at least 1. Other hosts are taken to be like this one."""
    per_task, on_node = environ.get("SLURM_CPUS_PER_TASK", ""), environ.get("SLURM_CPUS_ON_NODE", "")
    if allocation.kind == "slurm" and per_task.isdecimal() and int(per_task) > 0:
        return int(per_task)
    cores = int(on_node) if allocation.kind == "slurm" and on_node.isdecimal() else allocation.cores
    return max(1, cores // max(host.slots for host in placement.hosts))


def _named(hosts: tuple[Host, ...], launcher: Launcher) -> tuple[Host, ...]:
    return hosts if launcher != "local" else (Host(hosts_module.LOCAL, sum(host.slots for host in hosts)),)


def _maybe_mpi(environ: Mapping[str, str]) -> Mpi | None:
    search = environ.get("PATH")
    if shutil.which("mpirun", path=search) is None and shutil.which("mpiexec", path=search) is None:
        return None
    return mpi_module.find(environ)


def _wants_gloo(environ: Mapping[str, str]) -> bool:
    return environ.get("HOROVOD_CONTROLLER", "").lower() == "gloo"


def _horovodrun(environ: Mapping[str, str]) -> str:
    beside = Path(sys.executable).with_name("horovodrun")
    found = str(beside) if beside.exists() else shutil.which("horovodrun", path=environ.get("PATH"))
    if found is None:
        raise Unavailable("there is no horovodrun: Horovod is not installed here", hint="bash launch/setup.sh")
    return found


def _in_step(environ: Mapping[str, str]) -> bool:
    """In the shell of `srun --pty bash`, whose step holds the job's cores: another srun would wait for them for ever.

    The shell that salloc starts by itself is a step too, with a number near 2**32, and holds nothing.
    """
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and len(step) < 10


def _ask_slurm(environ: Mapping[str, str]) -> None:
    """Raises Unavailable where no controller answers: srun would fail, or ask again for minutes."""
    tool = shutil.which("sinfo", path=environ.get("PATH"))
    if tool is None:
        return
    try:
        done = subprocess.run(
            [tool, "--noheader"], capture_output=True, text=True, timeout=30, env=dict(environ), check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        why = "sinfo gave no answer within 30 s"
    else:
        if not done.returncode:
            return
        why = (done.stderr.strip().splitlines() or [f"sinfo ended with code {done.returncode}"])[-1]
    raise Unavailable(
        f"srun cannot start ranks: no Slurm answers here ({why[:200]})", hint="use --launcher mpirun, or a login node"
    )


def _srun_starts(kind: str, environ: Mapping[str, str], probe: bool) -> bool:
    """Whether srun can start MPI ranks of this kind. `srun --mpi=list` names kinds that then do not load: try one."""
    srun = shutil.which("srun", path=environ.get("PATH"))
    if srun is None:
        return False
    argv = [srun, f"--mpi={kind}", "--nodes=1", "--ntasks=1", "true"] if probe else [srun, "--mpi=list"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=dict(environ), check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and (probe or kind in f"{done.stdout}\n{done.stderr}")
