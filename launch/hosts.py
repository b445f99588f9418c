"""Where ranks may run: `-H`, a hostfile, a Slurm, PBS or LSF allocation, or this machine -> `Host(name, slots)`.

Not here: how a launcher is told about hosts (`command.py`). Every text is treated as hostile: names are checked, so
that none can pass for an option, and expansion is limited.

>>> [str(host) for host in expand_allocation("n[01-02],x", "4(x2),2")]
['n01:4', 'n02:4', 'x:2']
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from harness.errors import ConfigError, InputMissing, Unavailable

MAX_HOSTS = 100_000
"""More hosts than any machine has; a nodelist that expands to more is a mistake or an attack."""
MAX_SLOTS = 100_000
MAX_TEXT = 4_000_000
LOCAL = "localhost"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_COUNT = re.compile(r"(\d{1,6})(?:\(x(\d{1,6})\))?")
_HOSTFILE_KEYS = ("slots", "max_slots", "max-slots")


@dataclass(frozen=True)
class Host:
    """A node and how many ranks it takes."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


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
        raise Unavailable(f"the batch system's list of hosts cannot be used: {error}", hint="give -H host:slots") from error
    if found is not None:
        return replace(found, cores=cores)
    gpus = count_gpus(environ)
    return Allocation("local", "this machine", (Host(LOCAL, gpus or cores),), gpus, cores)


def place(allocation: Allocation, ranks: int) -> Placement:
    """Fill hosts in their order. Raises Unavailable when there are more ranks than slots.

    This machine alone may be oversubscribed, up to eight ranks per core, so that four ranks can be tried on two cores.
    """
    if allocation.kind == "local":
        limit = max(16, 8 * allocation.cores)
        if ranks > limit:
            raise Unavailable(
                f"{ranks} ranks are more than this machine with {_count(allocation.cores, 'core')} can take (at most {limit})",
                hint=f"use -n {allocation.slots}, or give more hosts with -H a:4,b:4",
            )
        hosts = (Host(LOCAL, ranks),)
        unit, have = ("GPU", allocation.gpus) if allocation.gpus else ("core", allocation.cores)
        if ranks > have:
            return Placement(hosts, ranks > allocation.cores, f"{ranks} ranks share {_count(have, unit)}: expect slow steps")
        return Placement(hosts, ranks > allocation.cores)
    if ranks > allocation.slots:
        raise Unavailable(
            f"{ranks} ranks are more than the {_count(allocation.slots, 'slot')} of {allocation.source}"
            f" ({_shorten(show(allocation.hosts))})",
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


def parse_hosts(text: str) -> tuple[Host, ...]:
    """`a:2,b` -> two slots on a, one on b. Raises ValueError with a sentence."""
    if not text.strip():
        raise ValueError("the list of hosts is empty; write host:slots,host:slots")
    return _merge(_host(part.strip(), "host:slots,host:slots") for part in text.split(","))


def parse_hostfile(text: str) -> tuple[Host, ...]:
    """Lines `host`, `host:N`, `host slots=N`, `#` comments. Raises ValueError with the line's number."""
    hosts = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            host = _host(words[0], "host slots=N")
            for word in words[1:]:
                key, _, value = word.partition("=")
                if key not in _HOSTFILE_KEYS:
                    raise ValueError(f"{word!r} is not understood; write host slots=N")
                if key == "slots":
                    host = Host(host.name, _slots(value))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        hosts.append(host)
    if not hosts:
        raise ValueError("there is no host in it; write a line `host slots=N` per host")
    return _merge(hosts)


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


def expand_nodelist(text: str) -> list[str]:
    """Slurm's `n[01-04,7],x,r[1-2]n[1-2]` -> names in order. Raises ValueError, also past MAX_HOSTS names."""
    if len(text) > MAX_TEXT:
        raise ValueError("the nodelist is too long")
    names: list[str] = []
    for item in _split_outside_brackets(text):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # literal, ranges, literal, ranges, ..., literal
        choices = [[part] if index % 2 == 0 else _ranges(part, text) for index, part in enumerate(parts)]
        if len(names) + math.prod(map(len, choices)) > MAX_HOSTS:
            raise ValueError(f"the nodelist has more than {MAX_HOSTS} hosts")
        for combination in itertools.product(*choices):
            name = "".join(combination)
            if not _NAME.fullmatch(name):
                raise ValueError(f"{_shorten(name)!r} in the nodelist is not a host name")
            names.append(name)
    return names


def expand_counts(text: str) -> list[int]:
    """Slurm's `4(x2),2` -> [4, 4, 2]. Raises ValueError, also past MAX_HOSTS numbers."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if not match:
            raise ValueError(f"{_shorten(text)!r} is not a list of counts such as 4(x2),2")
        counts += [int(match[1])] * min(int(match[2] or 1), MAX_HOSTS + 1)
        if len(counts) > MAX_HOSTS:
            raise ValueError(f"the list of counts is for more than {MAX_HOSTS} hosts")
    return counts


def expand_allocation(nodelist: str, tasks_per_node: str) -> tuple[Host, ...]:
    """Slurm's two variables as hosts. Raises ValueError when they do not fit together."""
    names, counts = expand_nodelist(nodelist), expand_counts(tasks_per_node)
    if len(names) != len(counts):
        raise ValueError(f"SLURM_JOB_NODELIST has {len(names)} hosts, SLURM_TASKS_PER_NODE counts for {len(counts)}")
    return _merge(Host(name, slots) for name, slots in zip(names, counts, strict=True))


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
    return Allocation("lsf", source, _merge(_host(f"{a}:{b}", "host count") for a, b in zip(words[::2], words[1::2], strict=True)))


def _per_line(path: str) -> tuple[Host, ...]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(MAX_TEXT).split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    return _merge(_host(f"{line}:1", "a host name per line") for line in lines)


def _host(text: str, form: str) -> Host:
    name, colon, slots = text.partition(":")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{_shorten(text)!r} is not a host; write {form}")
    return Host(name, _slots(slots) if colon else 1)


def _slots(text: str) -> int:
    if not text.isdecimal() or len(text) > 6 or not 1 <= int(text) <= MAX_SLOTS:
        raise ValueError(f"{_shorten(text)!r} is not a number of slots from 1 to {MAX_SLOTS}")
    return int(text)


def _merge(hosts: Iterable[Host]) -> tuple[Host, ...]:
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
        if len(slots) > MAX_HOSTS or slots[host.name] > MAX_SLOTS:
            raise ValueError(f"more than {MAX_HOSTS} hosts or {MAX_SLOTS} slots on a host")
    return tuple(itertools.starmap(Host, slots.items()))


def _split_outside_brackets(text: str) -> Sequence[str]:
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(items) != text:
        raise ValueError(f"{_shorten(text)!r} is not a nodelist such as n[01-04,7],x")
    return items


def _ranges(text: str, whole: str) -> list[str]:
    values: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if not match:
            raise ValueError(f"[{_shorten(text)}] in the nodelist {_shorten(whole)!r} is not a list of numbers and ranges")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MAX_HOSTS or len(values) > MAX_HOSTS:
            raise ValueError(f"[{_shorten(text)}] in the nodelist runs backwards or is for more than {MAX_HOSTS} hosts")
        values += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return values


def _told(where: str, parse: Callable[[], tuple[Host, ...]]) -> tuple[Host, ...]:
    try:
        return parse()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
