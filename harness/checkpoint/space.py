"""Is there room for what is about to be written: bytes, files, quota.

    preflight(directory, needed=8 << 30, files=2)        # raises StorageError: how much is missing, and what to do

It cannot promise that a write will succeed: others write too, and quotas of most file systems show only when they are
met. `explain` tells of those.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from harness.errors import StorageError

SPARE = 16 << 20
"""Bytes left for others, at the most: a disk filled to its last byte stops more than this program."""
_HINT = "free some space, for example of old checkpoints (`harness ckpt prune`), or choose another directory"


def preflight(directory: Path, needed: int, files: int = 3) -> None:
    """Raises StorageError where the file system cannot take so many bytes or files, OSError where it does not answer.

    `directory` need not exist: the nearest one above it is asked.
    """
    status = os.statvfs(_existing(directory))
    free = status.f_bavail * status.f_frsize
    spare = min(SPARE, needed // 8)
    if free < needed + spare:
        from harness.units import show_size  # which imports more than a reader of checkpoints needs

        raise StorageError(
            f"{show_size(needed)} are needed in {directory}, and {show_size(spare)} to spare;"
            f" {show_size(free)} are free",
            hint=_HINT,
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    if status.f_files > 0 and status.f_favail < files:  # 0: the file system has no limit, or does not tell
        raise StorageError(
            f"{files} more files are needed in {directory}, the file system takes {status.f_favail}"
            f" ({status.f_files} in all)",
            hint="remove files that nobody needs; bytes are free, inodes are not",
        )


def explain(error: OSError) -> tuple[str, str] | None:
    """(what, what to do) for an error that means "no room", None for others."""
    where = f" for {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
    if error.errno == errno.EDQUOT:
        return f"the quota is used up{where}", "see `quota` or `lfs quota`; remove files, or ask for more"
    if error.errno == errno.ENOSPC:
        return f"no space is left{where}", _HINT
    if error.errno == errno.EFBIG:
        return f"the file would be larger than is allowed{where}", "see `ulimit -f` and the file system's limits"
    return None


def _existing(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
