"""Where ranks may run: `-H`, a hostfile, a Slurm, PBS or LSF allocation, or this machine; and putting ranks there.

Not here: the texts in which hosts are written (`nodelist.py`), how a launcher is told about them (`command.py`).

    allocation = find("a:2,b:2", None)
    placement = place(allocation, ranks=3)
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from harness.errors import ConfigError, InputMissing, Unavailable, UsageError
from launch.nodelist import (
    MAX_TEXT,
    Host,
    expand_allocation,
    expand_nodelist,
    host_of,
    merge,
    parse_hostfile,
    parse_hosts,
    shorten,
)

LOCAL = "localhost"


@dataclass(frozen=True)
class Allocation:
    """The hosts ranks may use. `kind` says who granted them, `source` says it in words for messages."""

    kind: Literal["local", "given", "slurm", "pbs", "lsf"]
    source: str
    hosts: tuple[Host, ...]
    gpus: int = 0
    """GPUs of this machine; 0 where there are none or the hosts are others."""
    cores: int = 1
    """Cores this process may use on this machine."""

    @property
    def slots(self) -> int:
        return sum(host.slots for host in self.hosts)


@dataclass(frozen=True)
class Placement:
    """Ranks put on hosts: `slots` of each host are the ranks it gets."""

    hosts: tuple[Host, ...]
    oversubscribed: bool = False
    note: str | None = None


def show(hosts: Iterable[Host]) -> str:
    """'a:2,b:2', the form of `-H`."""
    return ",".join(map(str, hosts))


def is_local(name: str) -> bool:
    """Whether a host's name means this machine."""
    own = socket.gethostname()
    return name in (LOCAL, "127.0.0.1", own, own.split(".")[0])


def find(hosts: str | None, hostfile: str | None, environ: Mapping[str, str] = os.environ) -> Allocation:
    """The hosts the user gave, else those of the allocation this process is in, else this machine.

    Raises ConfigError, InputMissing or Unavailable with the place of the mistake.
    """
    cores = count_cores()
    if hosts is not None:
        return Allocation("given", f"-H {hosts}", _told("launch.hosts (-H)", lambda: parse_hosts(hosts)), cores=cores)
    if hostfile is not None:
        return Allocation("given", f"the hostfile {hostfile}", read_hostfile(Path(hostfile)), cores=cores)
    try:
        found = _slurm(environ) or _pbs(environ) or _lsf(environ)
    except ValueError as error:
        raise Unavailable(
            f"the batch system's list of hosts is of no use: {error}", hint="give -H host:slots"
        ) from error
    if found is not None:
        return replace(found, cores=cores)
    gpus = count_gpus(environ)
    return Allocation("local", "this machine", (Host(LOCAL, gpus or cores),), gpus, cores)


def check_hosts(hosts: str | None, hostfile: Path | None) -> None:
    """Of a command line: that one of them is given at most, and that hosts are a list. Raises UsageError."""
    if hosts is None:
        return
    if hostfile is not None:
        raise UsageError("give -H or --hostfile, not both")
    try:
        parse_hosts(hosts)
    except ValueError as error:
        raise UsageError(f"-H {hosts}: {error}") from error


def place(allocation: Allocation, ranks: int) -> Placement:
    """Fill hosts in their order. Raises when there are more ranks than slots: UsageError for hosts that were given,
    Unavailable for those of a job or this machine.

    This machine alone may be oversubscribed, up to eight ranks per core, so that four ranks can be tried on two cores.
    """
    if allocation.kind == "local":
        limit = max(16, 8 * allocation.cores)
        if ranks > limit:
            raise Unavailable(
                f"{ranks} ranks are too many for this machine with {_count(allocation.cores, 'core')}: at most {limit}",
                hint=f"use -n {allocation.slots}, or give more hosts with -H a:4,b:4",
            )
        hosts = (Host(LOCAL, ranks),)
        unit, have = ("GPU", allocation.gpus) if allocation.gpus else ("core", allocation.cores)
        if ranks > have:
            note = f"{ranks} ranks share {_count(have, unit)}: expect slow steps"
            return Placement(hosts, ranks > allocation.cores, note)
        return Placement(hosts, ranks > allocation.cores)
    if ranks > allocation.slots:
        raise (UsageError if allocation.kind == "given" else Unavailable)(
            f"{ranks} ranks are more than the {_count(allocation.slots, 'slot')} of {allocation.source}"
            f" ({shorten(show(allocation.hosts))})",
            hint=f"use -n {allocation.slots} at most, or more slots"
            + (": -H a:4 is four slots on host a" if allocation.kind == "given" else " in the job"),
        )
    placed: list[Host] = []
    left = ranks
    for host in allocation.hosts:
        if left and host.slots:
            placed.append(Host(host.name, min(host.slots, left)))
            left -= placed[-1].slots
    return Placement(tuple(placed))


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file. Raises InputMissing or ConfigError."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT)
    except OSError as error:
        raise InputMissing(f"the hostfile {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the hostfile {path} is not text") from error
    return _told(f"the hostfile {path}", lambda: parse_hostfile(text))


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that ranks on this machine would see: CUDA_VISIBLE_DEVICES if it is set, else what nvidia-smi lists."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        if not names[0] or names[0] == "-1":
            return 0
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=15, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0  # no driver, or a driver that hangs: not a GPU machine
    found = len(re.findall(r"^GPU \d+:", listing, re.MULTILINE))
    return found if visible is None else min(found, len(names))


def count_cores() -> int:
    """Cores this process may use: its affinity mask, further limited by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    for quota, period in _quotas():
        if quota > 0 and period > 0:
            cores = min(cores, max(1, quota // period))
    return cores


def _quotas() -> Iterable[tuple[int, int]]:
    root = Path("/sys/fs/cgroup")
    for file in {root / "cpu.max", *_own_cgroup(root)}:
        words = _read(file).split()
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
            yield int(words[0]), int(words[1])
    quota, period = _read(root / "cpu/cpu.cfs_quota_us").strip(), _read(root / "cpu/cpu.cfs_period_us").strip()
    if quota.isdecimal() and period.isdecimal():
        yield int(quota), int(period)


def _own_cgroup(root: Path) -> list[Path]:
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::/"):
            return [root / line[4:] / "cpu.max"]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _slurm(environ: Mapping[str, str]) -> Allocation | None:
    nodelist = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not environ.get("SLURM_JOB_ID") or not nodelist:
        return None
    names = expand_nodelist(nodelist)
    hosts = expand_allocation(nodelist, environ.get("SLURM_TASKS_PER_NODE") or f"1(x{len(names)})")
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if "SLURM_NTASKS" not in environ and gpus.isdecimal() and int(gpus) > 0:
        hosts = tuple(Host(host.name, int(gpus)) for host in hosts)  # no task count was asked for: one rank per GPU
    return Allocation("slurm", f"the Slurm job {environ['SLURM_JOB_ID']}", hosts, int(gpus) if gpus.isdecimal() else 0)


def _pbs(environ: Mapping[str, str]) -> Allocation | None:
    if not environ.get("PBS_NODEFILE"):
        return None
    hosts = _per_line(environ["PBS_NODEFILE"])
    return Allocation("pbs", f"the PBS job {environ.get('PBS_JOBID', '')}".rstrip(), hosts)


def _lsf(environ: Mapping[str, str]) -> Allocation | None:
    source = f"the LSF job {environ.get('LSB_JOBID', '')}".rstrip()
    if environ.get("LSB_DJOB_HOSTFILE"):
        return Allocation("lsf", source, _per_line(environ["LSB_DJOB_HOSTFILE"]))
    words = environ.get("LSB_MCPU_HOSTS", "").split()
    if not words:
        return None
    if len(words) % 2:
        raise ValueError("LSB_MCPU_HOSTS is not a list of hosts and counts")
    pairs = zip(words[::2], words[1::2], strict=True)
    return Allocation("lsf", source, merge(host_of(f"{name}:{slots}", "host count") for name, slots in pairs))


def _per_line(path: str) -> tuple[Host, ...]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(MAX_TEXT).split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    return merge(host_of(f"{line}:1", "a host name per line") for line in lines)


def _told(where: str, parse: Callable[[], tuple[Host, ...]]) -> tuple[Host, ...]:
    try:
        return parse()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
