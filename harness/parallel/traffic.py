"""What crosses the network, in bytes, so that forms of training can be compared. Arithmetic; nothing is measured.

Who sends activations of a model that is spread over ranks counts them in a `Traffic`.

>>> allreduce_bytes(1000, ranks=4)
1500.0
"""

from __future__ import annotations


class Traffic:
    """Bytes that this rank has sent to others, at least; `sent` only grows."""

    def __init__(self) -> None:
        self.sent = 0.0


def allreduce_bytes(nbytes: int, ranks: int) -> float:
    """What each rank sends at least to sum a buffer over ranks, and every one to have the sum: 2 (n - 1) / n of it.

    A ring does so (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
    """
    return 2 * (ranks - 1) / ranks * nbytes


def allgather_bytes(nbytes: int, ranks: int) -> float:
    """What each rank sends at least, on average, so that all others get its buffer of this size."""
    return float((ranks - 1) * nbytes)
