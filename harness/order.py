"""The order of samples: one seeded permutation per epoch, over an endless stream of positions. Pure; numpy only.

Position p belongs to epoch p // samples. Who reads which positions is not known here (`data.py`), so the order is the
same on any number of ranks, and a run that stops at a position goes on from it.

>>> Order(samples=4, seed=1).ids(0, 8)
array([3, 2, 0, 1, 0, 3, 2, 1])

Only what numpy promises to keep for ever is used: the raw output of the Philox bit generator (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), sorted stably. `Generator.permutation` may change between versions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Seeds = NDArray[np.uint64]


@dataclass(frozen=True)
class Order:
    """The endless stream of epochs over `samples` samples.

    With `block` > 1, blocks of that many neighbours are permuted and then the samples inside each block, so that a
    batch touches few places of a file. Without `shuffle` every epoch runs from 0 to samples - 1.
    """

    samples: int
    seed: int
    shuffle: bool = True
    block: int = 1
    _epochs: dict[int, Ids] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The permutations of the epochs that were asked for last."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.block < 1 or self.seed < 0:
            raise ValueError("an order needs at least one sample, a block of at least one and a seed of at least 0")

    def ids(self, start: int, stop: int) -> Ids:
        """Indices into the data set of positions [start, stop), int64; they may span epochs.

        An epoch's permutation costs 8 bytes per sample; the two last used are kept.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"positions [{start}, {stop}) are no range")
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, first = divmod(start, self.samples)
            last = min(first + stop - start, self.samples)
            if self.shuffle:
                parts.append(self._permutation(epoch)[first:last])
            else:
                parts.append(np.arange(first, last, dtype=np.int64))
            start += last - first
        return np.concatenate(parts)

    def weight(self, replica: int, replicas: int) -> float:
        """A replica's part of all samples, where they are spread over so many."""
        return 1 / replicas

    def _permutation(self, epoch: int) -> Ids:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _permutation(self.samples, self.seed, epoch, self.block)
        return self._epochs[epoch]


def _permutation(samples: int, seed: int, epoch: int, block: int) -> Ids:
    blocks = -(-samples // block)
    random = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    order = np.argsort(random.random_raw(blocks), kind="stable")
    if block > 1:
        place = np.empty(blocks, np.int64)  # of each block in the epoch
        place[order] = np.arange(blocks)
        order = np.lexsort((random.random_raw(samples), place[np.arange(samples) // block]))
    return order.astype(np.int64, copy=False)


def sample_seeds(seed: int, start: int, stop: int) -> Seeds:
    """A seed for each position in [start, stop), uint64: what augmentation and negative sampling draw from.

    Counter based (the stream of splitmix64 that `seed` begins), so it does not matter which rank or process asks.
    """
    position = np.arange(start, stop, dtype=np.uint64)
    origin = _mix(np.array([seed], np.uint64) ^ np.uint64(0x5851F42D4C957F2D))
    return _mix(origin + (position + np.uint64(1)) * _GOLDEN)


def uniform(seeds: Seeds, count: int, *, stream: int = 0) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) from each seed, shape (len(seeds), count). Different streams are independent."""
    counter = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)
    bits = _mix(_mix(seeds)[:, None] + counter[None, :] * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: Seeds) -> Seeds:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014; constants of Vigna's public-domain version)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
