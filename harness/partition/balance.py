"""How even a partition is: samples, bytes, and the spread of an attribute in each part. Reads the data once.

for part in balance(partition, data, "label"):
    print(part.samples, part.values)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.order import Ids
from harness.partition.file import Partition

if TYPE_CHECKING:
    from harness.hdf5data import Hdf5Dataset

PIECE = 64 << 20
"""Bytes of the attribute in memory at once."""


@dataclass(frozen=True)
class Part:
    """One part. `least` to `values` are of an attribute that is one number per sample, else None."""

    samples: int
    nbytes: int
    """Of all fields of its samples."""
    spread: float | None = None
    """Root of the mean squared distance of the samples to their mean: for one number, the standard deviation."""
    least: float | None = None
    mean: float | None = None
    greatest: float | None = None
    values: int | None = None
    """Different values."""


def balance(partition: Partition, data: Hdf5Dataset, of: str = "") -> list[Part]:
    """A `Part` for each part; without `of`, their sizes only. `of` is a field of `data`."""
    sizes, each = partition.sizes.tolist(), sample_bytes(data)
    if not of:
        return [Part(size, size * each) for size in sizes]
    means, spreads = _spreads(partition, data, of)
    parts = [Part(size, size * each, spread) for size, spread in zip(sizes, spreads.tolist(), strict=True)]
    if data.shapes[of][0]:
        return parts
    values = data.read(np.arange(len(data), dtype=np.int64), of)[of]
    told = [values[ids] for ids in partition.ids()]
    return [
        Part(part.samples, part.nbytes, part.spread, float(v.min()), float(m), float(v.max()), len(np.unique(v)))
        for part, v, m in zip(parts, told, means[:, 0], strict=True)
    ]


def sample_bytes(data: Hdf5Dataset) -> int:
    """Bytes of one sample in all fields."""
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in data.shapes.values())


def _spreads(partition: Partition, data: Hdf5Dataset, of: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean (parts, features) and spread (parts,) of each part, float64; two passes, exact where means are large."""
    features = int(np.prod(data.shapes[of][0]))
    sizes, step = partition.sizes, max(1, PIECE // (8 * features))
    sums, squares = np.zeros((partition.parts, features)), np.zeros(partition.parts)
    for turn in ("mean", "spread"):
        for start in range(0, len(data), step):
            ids: Ids = np.arange(start, min(start + step, len(data)), dtype=np.int64)
            rows, part = data.read(ids, of)[of].reshape(len(ids), -1).astype(np.float64), partition.part[ids]
            if turn == "mean":
                np.add.at(sums, part, rows)
            else:
                squares += np.bincount(part, ((rows - sums[part]) ** 2).sum(1), partition.parts)
        if turn == "mean":
            sums /= sizes[:, None]
    return sums, np.sqrt(squares / sizes)
