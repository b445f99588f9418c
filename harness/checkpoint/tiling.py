"""Do boxes tile their tensors? Exactly, in time that grows with their number, in any number of dimensions. Pure.

Let f(p) be the number of boxes that contain element p. Boxes tile a tensor when f is 1 everywhere in it. A box adds +1
or -1 to the mixed difference of f at each of its corners (the sign by how many coordinates are upper ones), so it is
enough to compare the corners of all boxes, summed, with those of the tensor itself. And where they differ, the
lexicographically first corner is an element that no box or more than one box holds: all terms of f there but this one
are equal. (In two dimensions this is the well-known test for a perfect rectangle, with signs instead of parities.)

>>> rows = np.array([[0, 0, 0, 2, 1], [0, 0, 1, 1, 2], [0, 1, 2, 1, 1]])    # leaf, start, count
>>> first_fault(rows, {0: (2, 3)})
Fault(leaf=0, element=(1, 1), boxes=0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harness.errors import DataError

Rows = npt.NDArray[np.int64]

MAX_SPLIT = 10
"""Dimensions along which tensors may be split at once: a box has 2**dimensions corners."""


class Fault(NamedTuple):
    """An element of a leaf that so many boxes contain, not one."""

    leaf: int
    element: tuple[int, ...]
    boxes: int


def first_fault(rows: Rows, shapes: Mapping[int, tuple[int, ...]]) -> Fault | None:
    """None where the boxes tile each leaf, else an element that shows that they do not.

    `rows`: int64[n, 1 + 2 * dimensions], a row per box: leaf, start by dimension, count by dimension; none is empty.
    `shapes`: of all leaves of that many dimensions that are to be tiled, none empty. Raises DataError for MAX_SPLIT.
    """
    if not shapes:
        return None
    dimensions = (rows.shape[1] - 1) // 2
    whole = np.array([[leaf, *(0,) * dimensions, *shape] for leaf, shape in shapes.items()], np.int64)
    everything = np.concatenate([rows, whole])
    leaf, start = everything[:, 0], everything[:, 1 : 1 + dimensions]
    end = start + everything[:, 1 + dimensions :]
    weight = np.concatenate([np.ones(len(rows), np.int64), -np.ones(len(whole), np.int64)])
    # A dimension that no leaf is split along would only double the corners.
    order = np.argsort(whole[:, 0])
    lengths = whole[order[np.searchsorted(whole[order, 0], leaf)], 1 + dimensions :]
    split = np.flatnonzero(((start != 0) | (end != lengths)).any(axis=0)).tolist()
    if len(split) > MAX_SPLIT:
        raise DataError(f"tensors are split along {len(split)} dimensions at once; {MAX_SPLIT} are possible")
    corners, weights = [], []
    for upper in range(1 << len(split)):
        chosen = [(end if upper >> bit & 1 else start)[:, d] for bit, d in enumerate(split)]
        corners.append(np.stack([leaf, *chosen], axis=1))
        weights.append(weight * (-1) ** upper.bit_count())
    table, counts = np.concatenate(corners), np.concatenate(weights)
    by = np.lexsort(table.T[::-1])
    table, counts = table[by], counts[by]
    new = np.concatenate([[True], (np.diff(table, axis=0) != 0).any(axis=1)])
    sums = np.add.reduceat(counts, np.flatnonzero(new))
    wrong = np.flatnonzero(sums)
    if not len(wrong):
        return None
    point = table[np.flatnonzero(new)[wrong[0]]]
    element = np.zeros(dimensions, np.int64)
    element[split] = point[1:]
    return Fault(int(point[0]), tuple(element.tolist()), 1 + int(sums[wrong[0]]))
