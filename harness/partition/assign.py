"""From a data set and the name of a method to the part of each sample.

assign(Hdf5Dataset("train.h5", ["images", "user"]), "groups", "user", shares=[1, 1, 1], seed=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import UsageError
from harness.order import Ids
from harness.partition import clusters, methods
from harness.partition.methods import Parts

if TYPE_CHECKING:
    from harness.hdf5data import Hdf5Dataset

CLUSTERS = {"kmeans": clusters.kmeans, "ward": clusters.ward}
ATTRIBUTES = {"groups": methods.groups, "ranges": methods.ranges}
METHODS = ("random", "contiguous", *ATTRIBUTES, *CLUSTERS)


def assign(data: Hdf5Dataset, by: str, of: str, *, shares: Sequence[float], seed: int) -> Parts:
    """int32 (samples,). `of`: the field that ATTRIBUTES and CLUSTERS go by; the latter have no use for unequal shares.

    Raises UsageError for what does not go together, ConfigError where a part would be empty, Unavailable.
    """
    if by not in METHODS:
        raise UsageError(f"--by {by} is none of {', '.join(METHODS)}")
    if of and of not in data.fields:
        raise UsageError(f"--of {of}: the data set has {', '.join(data.fields)}")
    if by == "random":
        return methods.random(len(data), shares, seed)
    if by == "contiguous":
        return methods.contiguous(len(data), shares)
    if not of:
        raise UsageError(f"--by {by} needs --of FIELD, the field it goes by")

    def rows(ids: Ids) -> NDArray[Any]:
        return data.read(ids, of)[of]

    if by in CLUSTERS:
        if len(set(shares)) > 1:
            raise UsageError(f"--sizes does not go with --by {by}: clusters have the sizes that the data gives them")
        return CLUSTERS[by](rows, len(data), len(shares), seed)
    if data.shapes[of][0]:
        raise UsageError(f"--by {by} needs one number per sample; {of} has rows of the shape {data.shapes[of][0]}")
    return ATTRIBUTES[by](rows(np.arange(len(data), dtype=np.int64)), shares)
