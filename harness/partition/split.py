"""A copy of an HDF5 data set with one file per part: for parts that live on different disks.

split(data, partition, Path("parts"))
# parts/part-00000.h5 ...    the fields of the data set, and `sample`: int64, each sample's number in it
# parts/partition.h5         the partition of parts/part-*.h5, which is a data set like any other
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from harness.errors import ConfigError
from harness.order import Ids
from harness.partition.balance import sample_bytes
from harness.partition.file import Partition, new, write

if TYPE_CHECKING:
    from harness.hdf5data import Hdf5Dataset

PIECE = 64 << 20
"""Bytes copied at once."""
SAMPLE = "sample"


def split(
    data: Hdf5Dataset, partition: Partition, directory: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `directory`, which appears when it is complete. Raises ConfigError when it is there, or nothing fits.

    `progress(bytes so far, bytes in all)`.
    """
    check_fits(partition, data)
    if SAMPLE in data.fields.values():
        raise ConfigError(
            f"the data set has a field {SAMPLE!r}, the name under which parts keep their samples' numbers"
        )
    each, done = sample_bytes(data), 0
    step = max(1, PIECE // each)
    with new(directory) as temporary:
        temporary.mkdir()
        for number, ids in enumerate(partition.ids()):
            with h5py.File(temporary / f"part-{number:05d}.h5", "w") as file:
                file.create_dataset(SAMPLE, data=ids)
                places = {
                    name: file.create_dataset(data.fields[name], (len(ids), *shape), dtype)
                    for name, (shape, dtype) in data.shapes.items()
                }
                for start in range(0, len(ids), step):
                    for name, rows in data.read(ids[start : start + step]).items():
                        places[name][start : start + len(rows)] = rows
                    done += each * len(ids[start : start + step])
                    if progress is not None:
                        progress(done, each * len(data))
        sizes: Ids = partition.sizes
        part = np.repeat(np.arange(partition.parts, dtype=np.int32), sizes)
        told = Partition(part, partition.method, partition.of, partition.seed, f"{directory.name}/part-*.h5")
        write(told, temporary / "partition.h5")


def check_fits(partition: Partition, data: Hdf5Dataset) -> None:
    """Raises ConfigError when the partition is of another number of samples."""
    if len(partition.part) != len(data):
        raise ConfigError(
            f"the partition is of {len(partition.part)} samples, but the data set has {len(data)}",
            hint=f"it was made for {partition.source}" if partition.source else None,
        )
