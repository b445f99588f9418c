"""How a checkpoint comes into being: as a directory that nobody looks at, then by two renames. Rank 0 only.

    begin    <name>.tmp-<uuid>/data.h5, with its size
    ...      all ranks write, rank 0 also the metadata of HDF5 (put_head); they vote
    seal     digests, user block, the withheld superblock page; fsync
    publish  manifest.json: temporary file, fsync, rename, fsync of the directory;
             the directory's rename; fsync of its parent

Whatever ends the program in between leaves the earlier checkpoints as they were, and a directory that `store.clean`
removes. Everything here raises OSError.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from harness.checkpoint.digest import Table
from harness.checkpoint.engines.output import Output
from harness.checkpoint.file import SUPERBLOCK, pieces, superblock_page, write_all
from harness.checkpoint.layout import USER_BLOCK, Layout
from harness.checkpoint.manifest import FORMAT, VERSION

DATA = "data.h5"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


def make_directories(path: Path) -> None:
    """Make a directory and those above it, durably."""
    if not path.is_dir():
        make_directories(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def begin(temporary: Path, layout: Layout) -> None:
    """Make the data file in the existing directory `temporary`: full size, all of it a hole."""
    path = temporary / DATA
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, layout.data_end)
    finally:
        os.close(descriptor)


def put_head(temporary: Path, layout: Layout, head: bytes) -> None:
    """Write the HDF5 metadata. Nothing can open the file as HDF5 before `seal`, with which this becomes durable."""
    with Output(temporary / DATA, "auto", layout.data_end) as output:
        for offset, data in pieces(head):
            output.write(data, offset)


def seal(temporary: Path, layout: Layout, head: bytes, table: Table, uuid: str, step: int) -> None:
    """Complete the data file once all ranks have written their parts."""
    descriptor = os.open(temporary / DATA, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write_all(descriptor, table.astype("<u8").tobytes(), layout.head)
        write_all(descriptor, user_block(uuid, step), 0)
        write_all(descriptor, superblock_page(head), SUPERBLOCK[0])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path, manifest: str) -> None:
    """Make it a checkpoint. `final` must not exist."""
    put_manifest(temporary, manifest)
    os.rename(temporary, final)
    sync_directory(final.parent)


def put_manifest(directory: Path, manifest: str) -> None:
    """Write, or replace, the manifest in this directory as a whole."""
    path = directory / MANIFEST
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(f"{path}{TEMPORARY}", flags, 0o644)
    try:
        write_all(descriptor, manifest.encode(), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(f"{path}{TEMPORARY}", path)
    sync_directory(directory)


def abandon(temporary: Path) -> None:
    """Remove what was begun, as far as that works; a later `store.clean` gets the rest."""
    with suppress(OSError):  # in spite of its argument rmtree raises where a close fails
        shutil.rmtree(temporary, ignore_errors=True)


def user_block(uuid: str, step: int) -> bytes:
    """The first 4096 bytes of the data file: one line of JSON that ties it to its manifest, then zeros."""
    line = json.dumps({"format": FORMAT, "version": VERSION, "uuid": uuid, "step": step}) + "\n"
    return line.encode().ljust(USER_BLOCK, b"\0")


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
