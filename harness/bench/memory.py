"""How much memory this process could still get, by its machine and by the limits of its job (cgroups 1 and 2).

>>> available() > 0
True
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_NAMES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
_CACHE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def available(table: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes. Page cache, which the kernel gives up for it, counts as available."""
    return min([int(psutil.virtual_memory().available), *_left(table, root)])


def _left(table: Path, root: Path) -> Iterator[int]:
    """What each limit above this process leaves. What cannot be read limits nothing."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        folder = top / path.lstrip("/")
        for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            for limit, usage in _NAMES:
                try:
                    most, used = int((place / limit).read_text()), int((place / usage).read_text())
                    yield max(0, most - max(0, used - _cached(place)))
                except (OSError, ValueError):  # "max": no limit
                    continue


def _cached(place: Path) -> int:
    """Bytes of files in the page cache that count as used in this group; with its children where it says so (1)."""
    found = {}
    for line in (place / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in _CACHE:
            found[name] = int(value)
    inactive, active, *totals = (found.get(name, 0) for name in _CACHE)
    return max(inactive + active, sum(totals))
