"""The ways hosts are written, as text -> `Host(name, slots)`: `-H a:2,b`, hostfiles, Slurm's compressed lists. Pure.

Every text is treated as hostile: names are checked, so that none can pass for an option, and expansion is limited.
All functions raise ValueError with a sentence.

>>> [str(host) for host in expand_allocation("n[01-02],x", "4(x2),2")]
['n01:4', 'n02:4', 'x:2']
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_HOSTS = 100_000
"""More hosts than any machine has; a nodelist that expands to more is a mistake or an attack."""
MAX_SLOTS = 100_000
MAX_TEXT = 4_000_000
"""Characters of a hostfile or nodelist that are looked at."""

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


def parse_hosts(text: str) -> tuple[Host, ...]:
    """`a:2,b` -> two slots on a, one on b. Raises ValueError with a sentence."""
    if not text.strip():
        raise ValueError("the list of hosts is empty; write host:slots,host:slots")
    return merge(host_of(part.strip(), "host:slots,host:slots") for part in text.split(","))


def parse_hostfile(text: str) -> tuple[Host, ...]:
    """Lines `host`, `host:N`, `host slots=N`, `#` comments. Raises ValueError with the line's number."""
    hosts = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            host = host_of(words[0], "host slots=N")
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
    return merge(hosts)


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
                raise ValueError(f"{shorten(name)!r} in the nodelist is not a host name")
            names.append(name)
    return names


def expand_counts(text: str) -> list[int]:
    """Slurm's `4(x2),2` -> [4, 4, 2]. Raises ValueError, also past MAX_HOSTS numbers."""
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if not match:
            raise ValueError(f"{shorten(text)!r} is not a list of counts such as 4(x2),2")
        counts += [int(match[1])] * min(int(match[2] or 1), MAX_HOSTS + 1)
        if len(counts) > MAX_HOSTS:
            raise ValueError(f"the list of counts is for more than {MAX_HOSTS} hosts")
    return counts


def expand_allocation(nodelist: str, tasks_per_node: str) -> tuple[Host, ...]:
    """Slurm's two variables as hosts. Raises ValueError when they do not fit together."""
    names, counts = expand_nodelist(nodelist), expand_counts(tasks_per_node)
    if len(names) != len(counts):
        raise ValueError(f"SLURM_JOB_NODELIST has {len(names)} hosts, SLURM_TASKS_PER_NODE counts for {len(counts)}")
    return merge(Host(name, slots) for name, slots in zip(names, counts, strict=True))


def host_of(text: str, form: str) -> Host:
    """`name` or `name:slots`; `form` is what the message says to write."""
    name, colon, slots = text.partition(":")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{shorten(text)!r} is not a host; write {form}")
    return Host(name, _slots(slots) if colon else 1)


def _slots(text: str) -> int:
    if not text.isdecimal() or len(text) > 6 or not 1 <= int(text) <= MAX_SLOTS:
        raise ValueError(f"{shorten(text)!r} is not a number of slots from 1 to {MAX_SLOTS}")
    return int(text)


def merge(hosts: Iterable[Host]) -> tuple[Host, ...]:
    """Hosts that are named more than once become one with all their slots."""
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
        if len(slots) > MAX_HOSTS or slots[host.name] > MAX_SLOTS:
            raise ValueError(f"more than {MAX_HOSTS} hosts or {MAX_SLOTS} slots on a host")
    return tuple(itertools.starmap(Host, slots.items()))


def _split_outside_brackets(text: str) -> Sequence[str]:
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not items or ",".join(items) != text:
        raise ValueError(f"{shorten(text)!r} is not a nodelist such as n[01-04,7],x")
    return items


def _ranges(text: str, whole: str) -> list[str]:
    values: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if not match:
            raise ValueError(f"[{shorten(text)}] in the nodelist {shorten(whole)!r} is no list of numbers and ranges")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= MAX_HOSTS or len(values) > MAX_HOSTS:
            raise ValueError(f"[{shorten(text)}] in the nodelist runs backwards or is for more than {MAX_HOSTS} hosts")
        values += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return values


def shorten(text: str) -> str:
    """For messages."""
    return text if len(text) <= 80 else text[:77] + "..."
