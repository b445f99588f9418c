"""The checkpoints of a directory: which there are, which are good, and which may go.

    step-00001200/          committed: it has a manifest
    step-00001200-2/        saved again at the same step; the higher number is the newer
    step-00001300.tmp-.../  being written, or left by a program that ended; `clean` removes it
    step-00001100/damaged.json   found damaged when it was read; nobody uses it again
    step-00001100/aside.json     set aside by `roll_back`: nobody uses it until it is brought back

Looking at a checkpoint here is quick: the manifest, the file's size and the digests of its metadata. Its data are
checked when they are read.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from harness.checkpoint.commit import DATA, MANIFEST, TEMPORARY, sync_directory, user_block
from harness.checkpoint.digest import Table, root
from harness.checkpoint.file import read_all
from harness.checkpoint.layout import USER_BLOCK
from harness.checkpoint.manifest import MAX_TEXT, Manifest, NewerVersion, parse
from harness.checkpoint.names import ASIDE, DAMAGED, make_name, parse_name
from harness.checkpoint.policy import Keep
from harness.checkpoint.tags import read_tags
from harness.errors import DataError, InputMissing


class Damaged(DataError):
    """A checkpoint whose bytes are not those that were written, or cannot be read. `proven`: digests differ."""

    def __init__(self, message: str, *, hint: str | None = None, proven: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.proven = proven


@dataclass(frozen=True, order=True)
class Stored:
    """A committed checkpoint. Ordered by age: step, then number of the save at this step."""

    step: int
    number: int
    path: Path


def listing(directory: Path, *, aside: bool = False, broken: bool = False) -> list[Stored]:
    """Committed checkpoints that nobody found damaged, oldest first. Looks at names only. Raises OSError.

    Those that were set aside are left out; with `aside` they are in it too. `broken`: so are those whose manifest is
    gone.
    """
    left_out = (DAMAGED,) if aside else (DAMAGED, ASIDE)
    found = committed(directory, broken=broken)
    return [stored for stored in found if not any((stored.path / mark).exists() for mark in left_out)]


def committed(directory: Path, *, broken: bool = False) -> list[Stored]:
    """All that were ever completed, oldest first, also those damaged or set aside. Raises OSError.

    `broken`: also where the data are alone; each had a manifest before it got its name.
    """
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        name = parse_name(path.name)
        if name is None or path.is_symlink():
            continue
        if (path / MANIFEST).is_file() or (broken and (path / DATA).is_file()):
            found.append(Stored(*name, path))
    return sorted(found)


def count_damaged(directory: Path) -> int:
    """How many checkpoints were found damaged when they were read."""
    return sum(1 for _ in directory.glob(f"step-*/{DAMAGED}"))


def new_name(directory: Path, step: int) -> str:
    """The name of the next checkpoint of a step."""
    names = [parse_name(path.name.partition(TEMPORARY)[0]) for path in directory.iterdir()]
    return make_name(step, max((name[1] for name in names if name is not None and name[0] == step), default=0) + 1)


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run or a checkpoints directory that looks good, None where there is none.

    Neither torch nor MPI. Raises NewerVersion.
    """
    inner = Path(directory) / "checkpoints"
    for stored in reversed(listing(inner if inner.is_dir() else Path(directory))):
        try:
            check(stored.path)
        except NewerVersion:
            raise
        except DataError:
            continue
        return stored.path
    return None


def read_text(path: Path) -> str:
    """The text of a checkpoint's manifest. Raises Damaged, InputMissing."""
    place = path / MANIFEST
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if parse_name(path.name) and (path / DATA).is_file():
            raise Damaged(f"{path} is damaged: its {MANIFEST} is gone") from None
        raise InputMissing(f"{path} is no checkpoint: there is no {MANIFEST} in it") from None
    except OSError as error:
        raise Damaged(f"{place} cannot be read: {error.strerror}") from error
    try:
        size = os.fstat(descriptor).st_size
        if size > MAX_TEXT:
            raise Damaged(f"{place} has {size} bytes, which no manifest has")
        data = bytearray(size)
        read_all(descriptor, data, 0)
        return data.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise Damaged(f"{place} cannot be read: {error}") from error
    finally:
        os.close(descriptor)


def read_manifest(path: Path, text: str | None = None) -> Manifest:
    """`text`: where it has been read already. Raises Damaged, NewerVersion, InputMissing."""
    try:
        return parse(read_text(path) if text is None else text)
    except NewerVersion as error:
        raise NewerVersion(f"{path / MANIFEST}: {error.message}", hint=error.hint) from None
    except (Damaged, InputMissing):
        raise
    except DataError as error:
        raise Damaged(f"{path / MANIFEST} is damaged: {error.message}", proven=True) from error


def open_data(path: Path, manifest: Manifest) -> int:
    """A descriptor of the data file, after a look at its size. Raises Damaged."""
    place = path / DATA
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Damaged(f"{place} cannot be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != manifest.layout.data_end:
        os.close(descriptor)
        raise Damaged(f"{place} has {status.st_size} bytes, its manifest says {manifest.layout.data_end}", proven=True)
    return descriptor


def read_table(descriptor: int, path: Path, manifest: Manifest) -> Table:
    """The digests of the blocks, checked. Raises Damaged."""
    table = np.zeros(manifest.layout.blocks, "<u8")
    try:
        read_all(descriptor, table, manifest.layout.head)
    except (OSError, EOFError) as error:
        raise Damaged(f"{path / DATA} cannot be read: {error}") from error
    if root(table) != manifest.table:
        raise Damaged(f"{path / DATA}: the table of digests is damaged, or belongs to another checkpoint", proven=True)
    return table


def check(path: Path, text: str | None = None) -> Manifest:
    """The manifest of a checkpoint that looks good: all but its data is checked. As `read_manifest`."""
    manifest = read_manifest(path, text)
    name = parse_name(path.name)
    if name is not None and name[0] != manifest.step:
        raise Damaged(f"{path} holds the checkpoint of step {manifest.step}: it was given another name")
    descriptor = open_data(path, manifest)
    try:
        block = bytearray(USER_BLOCK)
        read_all(descriptor, block, 0)
        if block != user_block(manifest.uuid, manifest.step):
            raise Damaged(f"{path / DATA} belongs to another checkpoint than its manifest", proven=True)
        head = bytearray(manifest.layout.head - USER_BLOCK)
        read_all(descriptor, head, USER_BLOCK)
        if xxhash.xxh3_128_hexdigest(head) != manifest.head:
            raise Damaged(f"{path / DATA}: the HDF5 metadata is damaged", proven=True)
        read_table(descriptor, path, manifest)
    except (OSError, EOFError) as error:
        raise Damaged(f"{path / DATA} cannot be read: {error}") from error
    finally:
        os.close(descriptor)
    return manifest


def mark_damaged(path: Path, message: str) -> None:
    """Take a checkpoint out of use, without deleting it. Raises OSError."""
    (path / DAMAGED).write_text(json.dumps({"message": message}) + "\n", encoding="utf-8")


def roll_back(directory: Path, target: Path) -> tuple[list[Path], list[Path]]:
    """Make a checkpoint the newest: those after it are set aside, it and those before it are not. Deletes nothing.

    Returns (now set aside, brought back), oldest first. Where it is interrupted, a checkpoint between the two is the
    newest; calling it again completes it. Raises InputMissing, OSError.
    """
    stored = committed(directory)
    if target not in (one.path for one in stored):
        raise InputMissing(f"{target} is no checkpoint of {directory}")
    at = next(index for index, one in enumerate(stored) if one.path == target)
    back = [one.path for one in stored[: at + 1] if (one.path / ASIDE).exists()]
    for path in back:
        (path / ASIDE).unlink()
        sync_directory(path)
    return set_aside(directory, target), back


def set_aside(directory: Path, target: Path) -> list[Path]:
    """Put those that are newer than a checkpoint out of use, without deleting them; returns them, oldest first.

    Raises OSError.
    """
    stored = committed(directory)
    at = next((index for index, one in enumerate(stored) if one.path == target), len(stored))
    gone = [one.path for one in stored[at + 1 :] if not (one.path / ASIDE).exists()]
    for path in reversed(gone):
        with open(path / ASIDE, "w", encoding="utf-8") as file:
            json.dump({"for": target.name, "at": time.time()}, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path)
    return gone


def clean(directory: Path) -> list[Path]:
    """Remove what programs that ended have left. Only where no other program saves here. Returns what was removed."""
    left = [path for path in directory.glob(f"step-*{TEMPORARY}*") if path.is_dir() and not path.is_symlink()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def prune(directory: Path, keep: Keep, good: dict[Path, Manifest], log: Callable[[str], None]) -> None:
    """Delete what no rule keeps. Only checkpoints that look good count, and nothing newer than the newest of them goes.

    Those with a tag stay, whatever the rule, and so do those that were set aside. `good`: those that were looked at
    before; it is brought up to date. Raises OSError.
    """
    for path in superfluous(directory, keep, good, log):
        if remove(path):
            del good[path]


def superfluous(
    directory: Path, keep: Keep, good: dict[Path, Manifest], log: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """What `prune` would delete, oldest first."""
    candidates = []
    for stored in listing(directory):
        if stored.path not in good:
            try:
                good[stored.path] = check(stored.path)
            except DataError as error:
                log(f"{stored.path} does not count as a checkpoint: {error.message}")
                continue
        candidates.append(stored)
    named = set(read_tags(directory).values())
    # The rules choose among the newest of each step: one that was saved again does not count twice.
    newest = list({stored.step: stored for stored in candidates}.values())
    kept = keep.select([(stored.step, good[stored.path].metrics) for stored in newest])
    stay = {newest[index].path for index in kept}
    return [stored.path for stored in candidates if stored.path not in stay and stored.path.name not in named]


def remove(path: Path) -> bool:
    """Delete a checkpoint: first it stops being one, at once, then its files go. Raises OSError.

    False, and it stays, where it got a tag in this moment.
    """
    gone = path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")
    os.rename(path, gone)
    if path.name in read_tags(path.parent).values():
        os.rename(gone, path)
        return False
    sync_directory(path.parent)
    shutil.rmtree(gone, ignore_errors=True)
    return True
