"""A `Job` and the machine's MPI -> the command line and environment that start the ranks. Pure; golden files pin it.

Everything Horovod, Open MPI 4 and 5, MPICH, Intel MPI, srun and horovodrun want to be told is told here, and nowhere
else. Sources: Horovod's docs/mpi.rst and runner/mpi_run.py for the flags it recommends; the launchers' manual pages.

    job = Job(program=("python", "-m", "harness", "runs/a"), launcher="mpirun", hosts=(Host("a", 2), Host("b", 2)))
    print(build(job, Mpi("openmpi", (4, 1, 4))).shell())
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from harness.errors import UsageError
from launch.hosts import is_local, show
from launch.mpi import Mpi
from launch.nodelist import Host

Launcher = Literal["mpirun", "horovodrun", "srun", "local"]

EXCLUDED_INTERFACES = ("lo", "docker0", "virbr0")
"""Loopback and bridges of containers and virtual machines: the same address on every node, so TCP over them hangs."""
MANY_HOSTS = 64
"""From here on Horovod starts its daemons from the first node instead of along a tree."""
_EXPORT = re.compile(
    r"(PATH|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|CONDA_PREFIX|TZ|LANG|LC_ALL)"
    r"|(HARNESS|HOROVOD|PYTHON|OMP|MKL|OPENBLAS|KMP|GOMP|TORCH|NCCL|CUDA|HDF5)_?[A-Z0-9_]*"
    r"|(ROMIO|UCX|FI|MPICH|I_MPI|MV2)_[A-Z0-9_]*"
)
_KEEP_HOME = re.compile(r".*CUDA_VISIBLE_DEVICES|HOROVOD_(RANK|SIZE|LOCAL_.*|CROSS_.*)")


@dataclass(frozen=True)
class Elastic:
    """Between how many ranks, and the shell command that tells horovodrun the hosts. A host whose rank has failed stays
    out for `cooldown` seconds, twice as long each time, between these bounds."""

    least: int
    most: int
    discover: str
    cooldown: tuple[int, int]


@dataclass(frozen=True)
class Job:
    """What is to run where, with nothing left to find out. `hosts` says how many ranks each host gets."""

    program: tuple[str, ...]
    launcher: Launcher
    hosts: tuple[Host, ...]
    oversubscribed: bool = False
    """More ranks than cores: waiting ranks must yield."""
    gpus: bool = False
    horovodrun: str = "horovodrun"
    root: bool = False
    """The user is root, which Open MPI refuses unless told."""
    threads: int = 1
    """OMP_NUM_THREADS of a rank."""
    cores: int = 1
    """Cores of a rank, for srun's --cpus-per-task."""
    bind: Literal["none", "core", "socket"] = "none"
    interfaces: str | None = None
    mpi_io: Literal["auto", "romio", "ompio"] = "auto"
    slurm_mpi: str = "pmix"
    gloo: bool = False
    """horovodrun only: its Gloo controller, without MPI."""
    elastic: Elastic | None = None
    """horovodrun over Gloo only: ranks come and go."""
    flags: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    """Set for every rank, whatever else is said here."""
    export: tuple[str, ...] = ()
    """Names of variables to hand on to other hosts, besides those matched here."""
    inherited: tuple[str, ...] = ()
    """Names of all variables that the launcher process has."""

    @property
    def ranks(self) -> int:
        return sum(host.slots for host in self.hosts)

    @property
    def remote(self) -> bool:
        """Some ranks run on other hosts, which do not see this environment by themselves."""
        return len(self.hosts) > 1 or not is_local(self.hosts[0].name)


@dataclass(frozen=True)
class Command:
    """Arguments and the variables to set on top of the environment."""

    argv: tuple[str, ...]
    env: dict[str, str]

    def shell(self) -> str:
        """To be pasted into a shell."""
        words = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        return " \\\n  ".join(_rows([*words, *map(shlex.quote, self.argv)]))


def build(job: Job, mpi: Mpi | None) -> Command:
    """The command for a job. `mpi` may be None for srun, local and horovodrun over Gloo.

    Raises UsageError when the launcher cannot start such a job.
    """
    env = {"OMP_NUM_THREADS": str(job.threads), "PYTHONUNBUFFERED": "1"} | _networks(job) | _mpi_env(job, mpi) | job.env
    if job.launcher == "local":
        if job.ranks != 1:
            raise UsageError(
                f"the launcher local starts one rank, not {job.ranks}", hint="leave --launcher away, or use mpirun"
            )
        argv = list(job.program)
    elif job.launcher == "srun":
        argv = [*_srun(job), *job.flags, *job.program]
    elif job.launcher == "horovodrun":
        argv = [*_horovodrun(job), *job.program]
    elif mpi is None:
        raise UsageError("mpirun needs an MPI")
    elif mpi.family in ("openmpi", "spectrum"):
        argv = [*_openmpi(job, mpi, env), *job.flags, *job.program]
    else:
        argv = _hydra(job, mpi, env)
    return Command(tuple(argv), env)


def _openmpi(job: Job, mpi: Mpi, env: dict[str, str]) -> list[str]:
    argv = [mpi.path]
    prrte = mpi.family == "openmpi" and mpi.major >= 5  # its launcher is another program than that of 4
    if job.root:
        argv += ["--allow-run-as-root"]
    argv += ["-np", str(job.ranks), "-H", show(job.hosts)]
    if mpi.family == "spectrum" and job.bind == "none":
        argv += ["-bind-to", "socket", "-map-by", "socket", "-rank-by", "core"]
    else:
        # slot: fill a host before the next, and allow nodes whose NUMA layouts differ
        over = ":OVERSUBSCRIBE" if job.oversubscribed and prrte else ""
        argv += ["--bind-to", job.bind, "--map-by", f"slot{over}"]
    if job.oversubscribed and not prrte:
        argv += ["--oversubscribe"]
    if mpi.family == "openmpi" and not prrte and not mpi.ucx:
        argv += ["--mca", "pml", "ob1", "--mca", "btl", "^openib"]  # openib crashes with Horovod's threads
    if job.interfaces is not None:
        argv += ["--mca", "btl_tcp_if_include", job.interfaces]
        argv += ["--mca", "oob_tcp_if_include", job.interfaces] if not prrte else []
    elif job.remote:
        argv += ["--mca", "btl_tcp_if_exclude", ",".join(EXCLUDED_INTERFACES)]
        argv += ["--mca", "oob_tcp_if_exclude", ",".join(EXCLUDED_INTERFACES)] if not prrte else []
    if len(job.hosts) >= MANY_HOSTS:
        tree, concurrent = ("--mca", "plm_rsh") if not prrte else ("--prtemca", "plm_ssh")
        argv += [tree, f"{concurrent}_no_tree_spawn", "true", tree, f"{concurrent}_num_concurrent", str(len(job.hosts))]
    if job.remote:
        for name in _exported(job, env):
            if not name.startswith("OMPI_MCA_"):  # those travel by themselves
                argv += ["-x", name]
    return argv


def _hydra(job: Job, mpi: Mpi, env: dict[str, str]) -> list[str]:
    argv = [mpi.path]
    if job.interfaces is not None:
        argv += ["-iface", job.interfaces.split(",")[0]]
    if mpi.family != "intel" and job.bind != "none":
        argv += ["-bind-to", job.bind]
    if job.remote:
        # Hydra hands its whole environment on; what matters is said once more, whatever a site has configured
        argv += ["-genvall"]
        for name in sorted(env):
            argv += ["-genv", name, env[name]]
    if not job.remote:
        return [*argv, "-n", str(job.ranks), *job.flags, *job.program]
    if mpi.family != "intel":
        return [*argv, "-n", str(job.ranks), "-hosts", show(job.hosts), *job.flags, *job.program]
    slots = {host.slots for host in job.hosts}
    if len(slots) == 1:
        names = ",".join(host.name for host in job.hosts)
        return [*argv, "-n", str(job.ranks), "-ppn", str(slots.pop()), "-hosts", names, *job.flags, *job.program]
    argv += job.flags
    for index, host in enumerate(job.hosts):  # unequal hosts: one set of arguments each, ranks count on through them
        argv += [":"] if index else []
        argv += ["-n", str(host.slots), "-host", host.name, *job.program]
    return argv


def _srun(job: Job) -> list[str]:
    argv = ["srun", f"--mpi={job.slurm_mpi}", f"--nodes={len(job.hosts)}", f"--ntasks={job.ranks}"]
    slots = {host.slots for host in job.hosts}
    if len(slots) == 1:
        argv += [f"--ntasks-per-node={slots.pop()}"]
    if not all(is_local(host.name) for host in job.hosts):
        argv += [f"--nodelist={','.join(host.name for host in job.hosts)}"]
    argv += [f"--cpus-per-task={job.cores}"]  # some versions of Slurm do not inherit it from the job
    argv += ["--cpu-bind=" + {"none": "none", "core": "cores", "socket": "sockets"}[job.bind]]
    if job.gpus:
        argv += ["--gpu-bind=none"]  # a rank takes its GPU by local rank; all visible keeps peer-to-peer possible
    if job.oversubscribed:
        argv += ["--overcommit"]
    return [*argv, "--kill-on-bad-exit=1", "--unbuffered", "--export=ALL"]


def _horovodrun(job: Job) -> list[str]:
    argv = [job.horovodrun, "-np", str(job.ranks)]
    if job.elastic is None:
        argv += ["-H", show(job.hosts), "--gloo" if job.gloo else "--mpi"]
    else:
        elastic = job.elastic
        argv += ["--gloo", "--min-np", str(elastic.least), "--max-np", str(elastic.most)]
        argv += ["--host-discovery-script", elastic.discover]
        argv += ["--blacklist-cooldown-range", *map(str, elastic.cooldown)]
    if job.interfaces is not None:
        argv += ["--network-interfaces", job.interfaces]
    elif job.elastic is not None and all(is_local(host.name) for host in job.hosts):
        argv += ["--network-interfaces", "lo"]  # else it waits for a second host, to find out which ones both have
    if not job.gloo and job.flags:
        argv += [f"--mpi-args={shlex.join(job.flags)}"]
    if not job.gloo and job.bind != "none":
        argv += [f"--binding-args=--bind-to {job.bind} --map-by slot"]
    return argv


def _networks(job: Job) -> dict[str, str]:
    if job.interfaces is not None:
        return {"NCCL_SOCKET_IFNAME": job.interfaces} | (
            {"HOROVOD_GLOO_IFACE": job.interfaces.split(",")[0]} if job.gloo else {}
        )
    if job.remote and job.gpus and "NCCL_SOCKET_IFNAME" not in job.inherited:
        return {"NCCL_SOCKET_IFNAME": "^" + ",".join(EXCLUDED_INTERFACES)}
    return {}


def _mpi_env(job: Job, mpi: Mpi | None) -> dict[str, str]:
    if mpi is None:
        return {}
    if mpi.family == "openmpi":
        env = {}
        if job.mpi_io == "ompio":
            env["OMPI_MCA_io"] = "ompio"
        elif job.mpi_io == "romio" or (mpi.major == 4 and "OMPI_MCA_io" not in job.inherited):
            # Open MPI 4's own MPI-IO can hang under HDF5 (HDFGroup/hdf5#1227)
            env["OMPI_MCA_io"] = "romio341" if mpi.major >= 5 else "romio321" if mpi.major == 4 else "romio314"
        if mpi.major == 4 and "OMPI_MCA_odls_base_sigkill_timeout" not in job.inherited:
            # twice so many seconds pass before the ranks of a job that has failed are killed: nothing comes of them
            env["OMPI_MCA_odls_base_sigkill_timeout"] = "0"
        if (job.oversubscribed or not job.gpus) and "OMPI_MCA_mpi_yield_when_idle" not in job.inherited:
            # who waits lets others run: each rank has a thread of Horovod's beside those that compute, which waits for
            # the other ranks' a thousand times a second
            env["OMPI_MCA_mpi_yield_when_idle"] = "1"
        return env
    if mpi.family == "intel":
        pin = {"I_MPI_PIN": "0"} if job.bind == "none" else {"I_MPI_PIN_DOMAIN": job.bind}
        # -ppn is ignored inside a batch job unless it is told to count
        return pin | ({"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "0"} if job.remote else {})
    if mpi.family == "mvapich" and job.bind == "none":
        return {"MV2_ENABLE_AFFINITY": "0"}
    return {}


def _exported(job: Job, env: Iterable[str]) -> list[str]:
    names = {name for name in job.inherited if _EXPORT.fullmatch(name) and not _KEEP_HOME.fullmatch(name)}
    return sorted(names | set(env) | (set(job.export) & set(job.inherited)))


def _rows(words: Iterable[str]) -> list[str]:
    """Words filled into rows; a row ends before an option, so that an option and its values stay together."""
    units: list[str] = []
    for word in words:
        if units and not word.startswith("-") and units[-1].startswith("-"):
            units[-1] += f" {word}"
        else:
            units.append(word)
    rows = [""]
    for unit in units:
        if rows[-1] and len(rows[-1]) + len(unit) > 110:
            rows.append(unit)
        else:
            rows[-1] = f"{rows[-1]} {unit}".lstrip()
    return rows
