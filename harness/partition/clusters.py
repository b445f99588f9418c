"""Parts that hold similar samples, by scikit-learn: k-means, and Ward's clusters, which add the least variance.

Both look at a sample of the data that fits in memory and put every sample into the cluster whose centre is nearest.
Clusters have the sizes that the data gives them. scikit-learn is imported here only, when one of these is asked for.

    kmeans(rows, 100_000, 8, seed=0)      # rows(ids) -> (len(ids), ...): the features of some samples
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import ConfigError, Unavailable
from harness.order import Ids, Order
from harness.partition.methods import Parts

Rows = Callable[[Ids], NDArray[Any]]
Features = NDArray[np.float32]
KMEANS_SAMPLE = 100_000
WARD_SAMPLE = 5_000
"""Samples that centres are found from; Ward's method needs the distances of all pairs: 100 MB."""
PIECE = 64 << 20
"""Bytes of features in memory at once while samples are put into clusters."""


def kmeans(rows: Rows, samples: int, parts: int, seed: int) -> Parts:
    """Clusters with the least squared distances to their centres (Lloyd, after k-means++), the best of 4 tries."""
    with _sklearn():
        from sklearn.cluster import KMeans
    looked_at = _features(rows, _some(samples, KMEANS_SAMPLE, seed), parts)
    fitted = KMeans(parts, n_init=4, random_state=seed % 2**32).fit(looked_at)
    return _nearest(rows, samples, fitted.cluster_centers_)


def ward(rows: Rows, samples: int, parts: int, seed: int) -> Parts:
    """Clusters made by merging the two whose union has the least additional variance (Ward 1963), until so many."""
    with _sklearn():
        from sklearn.cluster import AgglomerativeClustering
    looked_at = _features(rows, _some(samples, WARD_SAMPLE, seed), parts)
    labels = AgglomerativeClustering(parts, linkage="ward").fit_predict(looked_at)
    if len(labels) == samples:  # exactly the tree's clusters
        return np.asarray(labels, np.int32)
    return _nearest(rows, samples, np.stack([looked_at[labels == part].mean(0) for part in range(parts)]))


class _sklearn:
    """Around the imports: a package that is not there is told in a sentence."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise Unavailable("clusters need scikit-learn", hint="pip install 'harness[clusters]'") from error


def _some(samples: int, most: int, seed: int) -> Ids:
    """Sorted sample numbers, all or a seeded choice."""
    return np.sort(Order(samples, seed).ids(0, min(samples, most)))


def _features(rows: Rows, ids: Ids, parts: int) -> Features:
    """float32 (len(ids), features)."""
    found = np.asarray(rows(ids), np.float32).reshape(len(ids), -1)
    if not np.isfinite(found).all():
        raise ConfigError("the features are not finite for some samples, which then belong to no cluster")
    if parts > len(ids):
        raise ConfigError(f"{len(ids)} samples are too few for {parts} parts")
    return found


def _nearest(rows: Rows, samples: int, centres: NDArray[Any]) -> Parts:
    """The number of the nearest centre of every sample. Raises ConfigError where no sample is near one."""
    from sklearn.metrics import pairwise_distances_argmin

    parts = np.empty(samples, np.int32)
    step = max(1, PIECE // (4 * centres.shape[1]))
    for start in range(0, samples, step):
        ids = np.arange(start, min(start + step, samples), dtype=np.int64)
        parts[ids] = pairwise_distances_argmin(_features(rows, ids, 1), centres.astype(np.float32))
    if (empty := len(centres) - len(np.unique(parts))) > 0:
        raise ConfigError(
            f"{empty} of {len(centres)} clusters are empty: the samples have too few different features",
            hint="use fewer parts",
        )
    return parts
