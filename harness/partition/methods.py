"""Ways to spread samples over parts that need no features: at random, in a row, by an attribute. Pure; numpy only.

All return the part of each sample, int32 (samples,), with no part empty, and raise ConfigError where that cannot be.
`shares` are the wanted sizes of the parts, in any unit.

>>> contiguous(6, shares=[2, 1])
array([0, 0, 0, 0, 1, 1], dtype=int32)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import ConfigError
from harness.order import Order

Parts = NDArray[np.int32]


def contiguous(samples: int, shares: Sequence[float]) -> Parts:
    """Runs of neighbours of the wanted sizes, rounded."""
    return _repeat(np.diff(_ends(samples, shares), prepend=0))


def random(samples: int, shares: Sequence[float], seed: int) -> Parts:
    """The sizes of `contiguous`, over a seeded permutation of the samples."""
    parts = np.empty(samples, np.int32)
    parts[Order(samples, seed).ids(0, samples)] = contiguous(samples, shares)
    return parts


def groups(values: NDArray[Any], shares: Sequence[float]) -> Parts:
    """Samples of equal value (a user, a label) stay together; sizes come near the wanted ones.

    The largest group first, each to the part that is least full (Graham 1969, "Bounds on multiprocessing timing
    anomalies": for equal shares the largest part is at most 4/3 of what it must be).
    """
    _, group, counts = _unique(values, len(shares))
    part_of = np.empty(len(counts), np.int32)
    heap = [(0.0, -share, part, 0) for part, share in enumerate(shares)]
    heapq.heapify(heap)
    for one in np.argsort(-counts, kind="stable").tolist():
        _, minus, part, load = heap[0]
        part_of[one] = part
        load += int(counts[one])
        heapq.heapreplace(heap, (load / -minus, minus, part, load))
    return part_of[group]


def ranges(values: NDArray[Any], shares: Sequence[float]) -> Parts:
    """Part p has a range of values (of time, say) below those of part p + 1; equal values are never separated."""
    _, group, counts = _unique(values, len(shares))
    so_far = np.cumsum(counts)
    cuts: list[int] = []  # part p ends before the value of this number
    for part, end in enumerate(_ends(len(values), shares)[:-1].tolist()):
        nearest = int(np.searchsorted(so_far, end))
        if nearest and end - so_far[nearest - 1] <= so_far[min(nearest, len(so_far) - 1)] - end:
            nearest -= 1
        least = cuts[-1] + 1 if cuts else 1
        cuts.append(min(max(nearest + 1, least), len(counts) - (len(shares) - 1 - part)))
    return _repeat(np.diff([*cuts, len(counts)], prepend=0))[group]


def _repeat(sizes: NDArray[np.int64]) -> Parts:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def _ends(samples: int, shares: Sequence[float]) -> NDArray[np.int64]:
    """Where each part ends in a row of so many samples."""
    ends: NDArray[np.int64] = np.rint(np.cumsum(shares) / np.sum(shares) * samples).astype(np.int64)
    if (np.diff(ends, prepend=0) < 1).any():
        raise ConfigError(
            f"{samples} samples are too few for {len(shares)} parts of the sizes that are asked for",
            hint="a part has at least one sample",
        )
    return ends


def _unique(values: NDArray[Any], parts: int) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ConfigError("the attribute is not finite for some samples, which then belong nowhere")
    found, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(found) < parts:
        raise ConfigError(
            f"the attribute has {len(found)} different values, too few for {parts} parts",
            hint="samples of the same value stay together: use fewer parts, or another attribute",
        )
    return found, group, counts
