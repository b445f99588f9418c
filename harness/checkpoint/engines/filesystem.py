"""What kind of file system a directory lies on, by name: "ext4", "nfs4", "lustre". It reads the mount table (Linux).

>>> filesystem(Path("/proc"))
'proc'
"""

from __future__ import annotations

import os
from pathlib import Path

LOCAL = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
"""Of one computer: ranks on others see their own."""
UNSUITED = {"9p", "cifs", "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "smb3"}
"""Not made for one file that several computers write at once."""


def filesystem(path: Path, table: str = "/proc/self/mountinfo") -> str | None:
    """The type of the file system that holds `path`, which need not exist yet. None where that cannot be told."""
    wanted = os.path.realpath(path)
    best, kind = "", None
    try:
        with open(table, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                mount, _, rest = line.partition(" - ")
                point = _unescape(mount.split(" ")[4])
                inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):  # of several at the same place the last one is seen
                    best, kind = point, rest.split(" ")[0]
    except (OSError, IndexError):
        return None
    return kind


def _unescape(text: str) -> str:
    """Space, tab, newline and backslash are octal numbers in the table."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
