"""The order of samples where parts are kept apart: part p gives an equal share of every global batch. Pure; numpy only.

Position `p` of the stream is place `p % batch` of step `p // batch`. A batch is cut into as many equal shares as there
are parts; part k fills the k-th from its own samples, in its own seeded order, as often as it takes (a smaller part
begins its next epoch earlier). So the k-th of P ranks reads only part k, and on fewer ranks, each with some parts,
every step still has the same samples: a run goes on exactly on any number of ranks that divides the parts.

>>> PartOrder([np.array([0, 1, 2]), np.array([3, 4])], batch=4, seed=0).ids(0, 8)
array([0, 2, 4, 3, 1, 2, 4, 3])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from harness.errors import ConfigError
from harness.order import Ids, Order, sample_seeds

if TYPE_CHECKING:
    from harness.partition.file import Partition


class PartOrder:
    """Like `Order`, over parts. `parts`: the samples of each; `batch`: the global batch, a multiple of their number.

    Raises ConfigError when it is not one.
    """

    def __init__(self, parts: Sequence[Ids], *, batch: int, seed: int, shuffle: bool = True, block: int = 1) -> None:
        if batch % len(parts):
            below, above = batch // len(parts) * len(parts), -(-batch // len(parts)) * len(parts)
            raise ConfigError(
                f"train.global_batch {batch} does not divide by the {len(parts)} parts of data.partition",
                hint="use train.global_batch=" + " or ".join(str(n) for n in (below, above) if n),
            )
        self.parts = parts
        self.samples = sum(map(len, parts))
        self.share = batch // len(parts)
        seeds = sample_seeds(seed, 0, len(parts)).tolist()
        self._orders = [
            Order(len(part), part_seed, shuffle, block) for part, part_seed in zip(parts, seeds, strict=True)
        ]

    def ids(self, start: int, stop: int) -> Ids:
        """Indices into the data set of positions [start, stop), int64."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions [{start}, {stop}) are no range")
        found = [np.empty(0, np.int64)]
        while start < stop:
            turn, within = divmod(start, self.share)  # turn: how many shares lie before
            step, part = divmod(turn, len(self.parts))
            count = min(self.share - within, stop - start)
            first = step * self.share + within
            found.append(self.parts[part][self._orders[part].ids(first, first + count)])
            start += count
        return np.concatenate(found)

    def weight(self, replica: int, replicas: int) -> float:
        """The part of all samples that a replica's parts hold."""
        first, end = (len(self.parts) * r // replicas for r in (replica, replica + 1))
        return sum(map(len, self.parts[first:end])) / self.samples


def check_partition(partition: Partition, path: str, *, samples: int, ranks: int) -> None:
    """Raises ConfigError where it is of another data set, or its parts cannot be shared out evenly."""
    if len(partition.part) != samples:
        raise ConfigError(
            f"data.partition {path} is of {len(partition.part)} samples, but the training data has {samples}",
            hint=f"it was made for {partition.source}" if partition.source else None,
        )
    if partition.parts % ranks:
        fits = [n for n in range(1, partition.parts + 1) if partition.parts % n == 0]
        near = [max((n for n in fits if n < ranks), default=0), min((n for n in fits if n > ranks), default=0)]
        raise ConfigError(
            f"data.partition {path} has {partition.parts} parts, which {ranks} ranks cannot share evenly",
            hint="use "
            + " or ".join(str(n) for n in near if n)
            + " ranks, or a partition of a multiple of their number",
        )
