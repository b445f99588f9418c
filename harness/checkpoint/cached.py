"""What of a file is in this node's page cache, and whether a restore reads through it or around it."""

from __future__ import annotations

import os

import numpy as np

from harness.checkpoint.engines.output import LARGE_PART
from harness.checkpoint.input import Input
from harness.checkpoint.layout import Layout

PROBES = 64
MOSTLY = 0.9


def spare_cache(source: Input, layout: Layout) -> None:
    """Read around the page cache from now on where the tensors are large and not in it."""
    lo, hi = layout.data_start, layout.data_end
    if hi - lo >= LARGE_PART and share_in_cache(source.descriptor, lo, hi) < MOSTLY:
        source.go_around()


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
