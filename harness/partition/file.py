"""A partition on disk: one HDF5 file with the part of each sample, and how it came about. No sample is in it.

    PARTS.h5    /part    int32 (samples,), from 0 to parts - 1
                attributes: format, version, parts, method, of, seed, source

>>> write(Partition(np.array([0, 1, 0], np.int32), method="random"), Path("parts.h5"))        # doctest: +SKIP
>>> read(Path("parts.h5")).sizes                                                               # doctest: +SKIP
array([2, 1])
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from harness.errors import DataError, InputMissing, StorageError, UsageError
from harness.order import Ids
from harness.partition.methods import Parts

FORMAT, VERSION = "harness-partition", 1


@dataclass(frozen=True)
class Partition:
    """The part of each sample, int32 (samples,); no part is empty. The other fields tell how it was made."""

    part: Parts
    method: str = ""
    of: str = ""
    """The field it goes by."""
    seed: int = 0
    source: str = ""
    """The data set, as it was named."""

    @property
    def parts(self) -> int:
        return int(self.part.max()) + 1

    @property
    def sizes(self) -> Ids:
        """Samples of each part, int64 (parts,)."""
        return np.bincount(self.part).astype(np.int64)

    def ids(self) -> list[Ids]:
        """The samples of each part in ascending order. Together they are every sample once."""
        order = np.argsort(self.part, kind="stable").astype(np.int64, copy=False)
        return np.split(order, np.cumsum(self.sizes)[:-1])


def write(partition: Partition, path: Path) -> None:
    """Make the file; it is whole or not there. Raises StorageError, and UsageError when something is there already."""
    with new(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("part", data=partition.part)
        file.attrs.update(
            format=FORMAT,
            version=VERSION,
            parts=partition.parts,
            method=partition.method,
            of=partition.of,
            seed=np.uint64(partition.seed),
            source=partition.source,
        )


def read(path: Path) -> Partition:
    """Raises InputMissing, DataError."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = file.attrs.get("format"), int(file.attrs.get("version", 0))
            if found[0] != FORMAT or "part" not in file:
                raise DataError(f"{path} is no partition", hint="`harness data partition` makes one")
            if found[1] > VERSION:
                raise DataError(f"{path} is of version {found[1]}; this harness reads up to {VERSION}")
            part = file["part"][:]
            told = {name: str(file.attrs.get(name, "")) for name in ("method", "of", "source")}
            seed = int(file.attrs.get("seed", 0))
    except FileNotFoundError as error:
        raise InputMissing(f"{path}: no such file", hint="`harness data partition` makes a partition") from error
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no HDF5 file, or is damaged: {error}") from error
    if part.dtype != np.int32 or part.ndim != 1 or not len(part) or part.min() < 0 or part.max() >= len(part):
        raise DataError(f"{path}: /part is no list of parts")
    partition = Partition(part, seed=seed, **told)
    if (empty := np.flatnonzero(partition.sizes == 0)).size:
        raise DataError(f"{path}: part {empty[0]} has no samples")
    return partition


@contextmanager
def new(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, a file or a directory, that becomes `path` when the block ends well.

    What fails or is interrupted leaves nothing; what is there already is refused and stays as it is.
    """
    check_new(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        _sync(temporary)
        if os.path.lexists(path):
            raise UsageError(f"{path} was made by another program meanwhile", hint="choose another name")
        os.rename(temporary, path)
        _sync(path.parent, deep=False)
    except OSError as error:
        raise StorageError(f"{path} was not written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def check_new(path: Path) -> None:
    """Raises UsageError where something is there already."""
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already", hint="choose another name, or remove it first")


def _sync(path: Path, *, deep: bool = True) -> None:
    for one in [*(path.iterdir() if deep and path.is_dir() else ()), path]:
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
