"""Names that people give to checkpoints: `checkpoints/tags/<tag>` holds the name of a checkpoint's directory.

    add_tag(directory, "paper", "step-00001200")
    read_tags(directory)                    # {"paper": "step-00001200"}

A tagged checkpoint is never pruned. A tag is a line of text; what else lies in the directory is no tag.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from harness.checkpoint.commit import MANIFEST, TEMPORARY, make_directories, sync_directory
from harness.checkpoint.file import write_all
from harness.checkpoint.names import parse_name
from harness.errors import InputMissing, UsageError, some

TAGS = "tags"
_TAG = re.compile(r"[A-Za-z0-9._-]{1,100}")
_STEP = re.compile(r"[0-9]+(-[0-9]+)?|step-.*")
_WORDS = ("latest", "best")
_MAX_BYTES = 100  # no name of a checkpoint is longer


def check_tag(tag: str) -> str:
    """The tag itself. Raises UsageError for a name that no tag can have: it might be taken for something else."""
    if not _TAG.fullmatch(tag) or set(tag) == {"."} or TEMPORARY in tag:
        raise UsageError(
            f"{tag[:110]!r} cannot be a tag", hint="a tag is at most 100 letters, digits and signs out of . _ -"
        )
    if tag.lower() in _WORDS or _STEP.fullmatch(tag):
        raise UsageError(f"{tag!r} cannot be a tag: it has a meaning of its own", hint="take another name")
    return tag


def read_tags(directory: Path) -> dict[str, str]:
    """Tag -> name of the checkpoint's directory, sorted by tag; also tags whose checkpoint is gone. Raises OSError."""
    try:
        names = sorted(os.listdir(directory / TAGS))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for name in names:
        if _is_tag(name) and (target := _read(directory / TAGS / name)) is not None:
            found[name] = target
    return found


def tagged(directory: Path, tag: str) -> str:
    """The name of the checkpoint behind a tag. Raises InputMissing where there is no tag, or no target any more."""
    known = read_tags(directory)
    if tag not in known:
        there = f"there are {some(list(known))}" if known else "there are no tags"
        raise InputMissing(f"there is no tag {tag!r} in {directory}; {there}")
    if not (directory / known[tag] / MANIFEST).is_file():
        raise InputMissing(f"the checkpoint behind the tag {tag!r} is gone: {directory / known[tag]}")
    return known[tag]


def add_tag(directory: Path, tag: str, checkpoint: str, *, move: bool = False) -> None:
    """Give a checkpoint a name, durably. `move`: also where another checkpoint has it.

    Raises UsageError (the tag is taken, or no tag), InputMissing (there is no such checkpoint), OSError.
    """
    check_tag(tag)
    if parse_name(checkpoint) is None or not (directory / checkpoint / MANIFEST).is_file():
        raise InputMissing(f"{directory / checkpoint} is no checkpoint")
    before = read_tags(directory).get(tag)
    if before is not None and before != checkpoint and not move and (directory / before / MANIFEST).is_file():
        raise UsageError(f"the tag {tag!r} belongs to {before}", hint="use --move, or another name")
    folder = directory / TAGS
    make_directories(folder)
    temporary = folder / f"{tag}{TEMPORARY}{uuid.uuid4().hex}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            write_all(descriptor, f"{checkpoint}\n".encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, folder / tag)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(folder)
    if not (directory / checkpoint / MANIFEST).is_file():  # pruned meanwhile, by a job that had not seen the tag
        (folder / tag).unlink(missing_ok=True)
        raise InputMissing(f"{directory / checkpoint} was removed just now")


def remove_tag(directory: Path, tag: str) -> str:
    """Take a name away, durably; the checkpoint stays. Returns what it named. Raises InputMissing, OSError."""
    known = read_tags(directory)
    if tag not in known:
        there = f"there are {some(list(known))}" if known else "there are no tags"
        raise InputMissing(f"there is no tag {tag!r} in {directory}; {there}")
    os.unlink(directory / TAGS / tag)
    sync_directory(directory / TAGS)
    return known[tag]


def _is_tag(name: str) -> bool:
    try:
        return bool(check_tag(name))
    except UsageError:
        return False


def _read(path: Path) -> str | None:
    """What a tag's file says; None where it is no tag: a link, a pipe, a long or odd text."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError:
        if path.is_symlink() or not path.is_file():
            return None
        raise  # a tag that cannot be read now must not look like one that is not there: prune would delete
    try:
        text = os.read(descriptor, _MAX_BYTES) if path.is_file() else b""
    finally:
        os.close(descriptor)
    target = text.decode("ascii", "replace").removesuffix("\n")
    return target if parse_name(target) else None
