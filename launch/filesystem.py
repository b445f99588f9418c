"""What kind of file system a path is on, and how much is left there. Reads /proc/self/mounts; Linux only.

>>> describe(Path("/proc")).kind
'proc'
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

PARALLEL = ("lustre", "gpfs", "beegfs", "wekafs", "panfs", "pvfs2", "orangefs", "ceph", "fuse.daos")
"""File systems that many nodes may write one file on at the same time."""
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")
"""Shared, but without coherent writes of several nodes to one file."""
MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class FileSystem:
    """`free` in bytes and `inodes` as a plain user may use them; inodes is None where there is no such limit."""

    kind: str
    mount: str
    free: int
    inodes: int | None
    writable: bool


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def describe(path: Path, mounts: str | None = None) -> FileSystem:
    """The file system a path lies on, or will lie on. `mounts` replaces the text of /proc/self/mounts, for tests."""
    here = existing(path)
    if mounts is None:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            mounts = file.read()
    kind, mount = find_mount(os.path.realpath(here), mounts)
    stat = os.statvfs(here)
    return FileSystem(
        kind=kind,
        mount=mount,
        free=stat.f_bavail * stat.f_frsize,
        inodes=stat.f_favail if stat.f_files else None,
        writable=_writable(here),
    )


def _writable(folder: Path) -> bool:
    """By trying, since permissions do not say all: quotas, read-only mounts, root squashed by a server."""
    try:
        with tempfile.TemporaryDirectory(prefix=".harness-check-", dir=folder):
            return True
    except OSError:
        return False


def find_mount(path: str, mounts: str) -> tuple[str, str]:
    """(type, mount point) of the longest mount point above a path; of several on one point the last is on top."""
    best = ("unknown", "/")
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[1])
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best[1]):
            best = (words[2], point)
    return best
