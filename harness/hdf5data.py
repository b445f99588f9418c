"""A data set in HDF5 files: many files as one, opened lazily in each process, read in contiguous runs.

Each field is a data set of the file whose first dimension counts samples. Files are opened serially, without MPI and
without locks, so any number of ranks and loader processes read them at once; only paths travel to a loader process.

    data = Hdf5Dataset("/data/train-*.h5", ("images", "labels"))
    images, labels = data.batch(order.ids(0, 64), seeds)        # uint8 (64, 224, 224, 3), int64 (64,)

With `data.block` of some hundred samples a batch is a few long reads; with the default of 1 it is one read per sample,
which suits node-local disks and files in the page cache.
"""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from harness.errors import ConfigError, DataError, InputMissing, StorageError
from harness.order import Ids, Seeds

OPEN_FILES = 64
"""Files one process keeps open at once; the one unused for longest is closed first."""

Transform = Callable[[Any, Seeds], Any]


class Hdf5Dataset:
    """Samples of all `paths`, in the order of the sorted paths.

    `paths` is a file, a glob pattern, or a list of these. `fields` names what is read: a list gives tuples, a mapping
    {name: place in the file} gives dicts. `transform(batch, seeds)` is applied to each batch, in the loader process.

    Raises InputMissing, ConfigError (a field that is not there), DataError (fields of different length, files that
    differ in shape or type, corrupt files).
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        fields: Sequence[str] | Mapping[str, str],
        *,
        transform: Transform | None = None,
    ) -> None:
        if not fields or isinstance(fields, str):
            raise ConfigError("an HDF5 data set needs the names of its fields", hint='such as ["images", "labels"]')
        self.paths = _expand(paths)
        self.fields = dict(fields) if isinstance(fields, Mapping) else {name: name for name in fields}
        self._as_dict = isinstance(fields, Mapping)
        self.transform = transform
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        self._process = os.getpid()
        facts = [self._look(number) for number in range(len(self.paths))]
        for path, fact in zip(self.paths, facts, strict=True):
            if fact.shapes != facts[0].shapes:
                raise DataError(
                    f"{path} holds samples of {fact.shapes}, but {self.paths[0]} of {facts[0].shapes}",
                    hint="files of one data set have the same fields, shapes and types",
                )
        self.shapes = facts[0].shapes
        self._ends: Ids = np.cumsum([fact.samples for fact in facts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        """One sample: the only one of a batch of one, drawn with seed 0."""
        batch = self.batch(np.array([index], np.int64), np.zeros(1, np.uint64))
        if isinstance(batch, Mapping):
            return {name: value[0] for name, value in batch.items()}
        return tuple(value[0] for value in batch)

    def batch(self, ids: Ids, seeds: Seeds) -> Any:
        """Tensors of the samples `ids`, in that order, each of shape (len(ids), ...)."""
        arrays = self.read(ids)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch = tensors if self._as_dict else tuple(tensors.values())
        return batch if self.transform is None else self.transform(batch, seeds)

    def read(self, ids: Ids, only: str | None = None) -> dict[str, NDArray[Any]]:
        """Arrays by field name, of all fields or of one.

        Each run of neighbouring samples is one read; a sample wanted twice is read once.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"samples {ids.min()} to {ids.max()} asked of {len(self)}")
        unique, where = np.unique(ids, return_inverse=True)
        fields = self.fields if only is None else {only: self.fields[only]}
        out = {name: np.empty((len(unique), *self.shapes[name][0]), self.shapes[name][1]) for name in fields}
        for run in runs(unique, self._ends):
            file = self._open(run.file)
            for name, place in fields.items():
                try:
                    if run.stop > run.start:
                        file[place].read_direct(
                            out[name], np.s_[run.start : run.stop], np.s_[run.at : run.at + len(run)]
                        )
                except OSError as error:
                    raise DataError(
                        f"{self.paths[run.file]}: {place}[{run.start}:{run.stop}] cannot be read: {error}",
                        hint="the file is damaged or was cut short; copy it again",
                    ) from error
        if len(unique) == len(ids) and np.array_equal(where, np.arange(len(ids))):
            return out
        return {name: array[where] for name, array in out.items()}

    def close(self) -> None:
        """Close the files this process has open; reading opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict(), "_process": -1}

    def _open(self, number: int) -> h5py.File:
        if self._process != os.getpid():  # HDF5 handles are worthless in another process
            self._files, self._process = OrderedDict(), os.getpid()
        if number not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[number] = _open_file(self.paths[number])
        self._files.move_to_end(number)
        return self._files[number]

    def _look(self, number: int) -> _Facts:
        file, path = self._open(number), self.paths[number]
        lengths, shapes = {}, {}
        for name, place in self.fields.items():
            found = file.get(place)
            if not isinstance(found, h5py.Dataset):
                raise ConfigError(
                    f"{path} has no data set {place!r}", hint=f"it has {', '.join(_datasets(file)[:20]) or 'none'}"
                )
            if not found.shape or found.dtype.kind not in "biuf":
                raise DataError(f"{path}: {place} is of type {found.dtype}, shape {found.shape}, not rows of numbers")
            lengths[place] = found.shape[0]
            shapes[name] = (found.shape[1:], found.dtype.newbyteorder("="))
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{place} {length}" for place, length in lengths.items())
            raise DataError(f"{path}: fields differ in their number of samples: {told}")
        return _Facts(next(iter(lengths.values())), shapes)


@dataclass(frozen=True)
class _Facts:
    samples: int
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) of one file, that go to rows [at, at + stop - start) of the result."""

    file: int
    start: int
    stop: int
    at: int

    def __len__(self) -> int:
        return self.stop - self.start


def runs(ids: Ids, ends: Ids) -> Iterator[Run]:
    """Cut strictly increasing sample numbers into contiguous runs within files. Pure.

    `ends[f]` is the number of samples in files 0 to f.
    """
    if not len(ids):
        return
    files = np.searchsorted(ends, ids, side="right")
    breaks = np.flatnonzero((np.diff(ids) != 1) | (np.diff(files) != 0)) + 1
    for at, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(ids)], strict=True):
        file = int(files[at])
        offset = int(ends[file - 1]) if file else 0
        start = int(ids[at]) - offset
        yield Run(file, start, start + stop - at, at)


def all_fields(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Every data set of the first of these files: the fields of whole samples. Raises InputMissing, DataError."""
    first = _expand(paths)[0]
    with _open_file(first) as file:
        if not (found := _datasets(file)):
            raise DataError(f"{first} has no data sets")
    return found


def _expand(paths: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    found: set[str] = set()
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        matches = [str(path)] if os.path.exists(path) else glob.glob(os.path.expanduser(str(path)), recursive=True)
        if not matches:
            raise InputMissing(
                f"{path}: no such file", hint="give a file, a list of files or a pattern such as data/*.h5"
            )
        found.update(os.path.abspath(match) for match in matches)
    if not found:
        raise ConfigError("an HDF5 data set needs at least one file")
    return tuple(sorted(found))


def _open_file(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)  # the default driver, also in an h5py built with MPI
    except FileNotFoundError as error:
        raise InputMissing(f"{path} is not there") from error
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read (permission denied)") from error
    except OSError as error:
        raise DataError(f"{path} is no HDF5 file, or is damaged: {error}") from error


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []

    def note(name: str, found: object) -> None:
        if isinstance(found, h5py.Dataset):
            names.append(name)

    file.visititems(note)
    return names
