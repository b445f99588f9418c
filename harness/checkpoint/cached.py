"""Whether it is faster that every rank reads all it wants, or that ranks read shares and exchange them.

Exchanged, each byte leaves the file system once, whatever the number of nodes. On one node it does so anyhow: the ranks
share the page cache. Measured there with 1 GB on 2 and 4 ranks of two cores, time of all reading over time of
exchanging, medians of 5 rounds: 0.4 to 0.7 where the file is in the page cache; 0.6 to 1.15 where it is not, within
what the rounds differ. So `auto` lets all read where they are on one node and the file is in its memory, else exchange.
"""

from __future__ import annotations

import os
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np

from harness.checkpoint.comm import Comm
from harness.checkpoint.engines.output import LARGE_PART
from harness.checkpoint.input import Input
from harness.checkpoint.layout import Layout
from harness.errors import UsageError

Read: TypeAlias = Literal["auto", "exchange", "all"]
PROBES = 64
MOSTLY = 0.9


def known(read: str) -> Read:
    """A way of reading. Raises UsageError for any other text."""
    if read not in get_args(Read):
        raise UsageError(f"read={read!r} is unknown; it is {', '.join(get_args(Read))}")
    return cast(Read, read)


def each_reads(read: Read, source: Input | None, layout: Layout, comm: Comm) -> bool:
    """Whether each rank reads for itself, from a source that is told to go around the page cache where that is faster.

    Around it goes what is large, is not there, and is not read by a neighbour too. Collective.
    """
    cached = source is not None and share_in_cache(source.descriptor, layout.data_start, layout.data_end) >= MOSTLY
    if (alone := comm.mpi is None or comm.size == 1) or read != "auto":
        each = alone or read == "all"
    else:
        chosen: Any = comm.broadcast(cached)  # rank 0's
        each = bool(chosen) and one_node(comm.mpi)
    large = layout.data_end - layout.data_start >= LARGE_PART
    if source is not None and large and not cached and (comm.size == 1 or not each):
        source.go_around()
    return each


def one_node(mpi: Any) -> bool:
    """Whether all ranks share memory. Collective."""
    from mpi4py import MPI

    node = mpi.Split_type(MPI.COMM_TYPE_SHARED)
    together: bool = node.Get_size() == mpi.Get_size()
    node.Free()
    return together


def share_in_cache(descriptor: int, lo: int, hi: int) -> float:
    """The share of the file's bytes [lo, hi) in this node's page cache, from a few of them: 0 to 1.

    0 where the file system or the kernel cannot say. Asking for a byte may bring what is around it into memory, so that
    other places are asked each time.
    """
    found = 0
    for place in np.random.default_rng().integers(lo, max(hi, lo + 1), PROBES).tolist():
        try:
            found += os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except (OSError, AttributeError, NotImplementedError):
            return 0.0
    return found / PROBES
