"""Memory that begins at a page, as reading and writing around the page cache want it."""

from __future__ import annotations

import mmap

import numpy as np

from harness.checkpoint.tensors import Bytes


def aligned(size: int) -> Bytes:
    """At least `size` zeros, in whole pages, taken from the system as they are touched. Raises MemoryError, OSError.

    What goes around the page cache, and a GPU's copies, ends in the pages that are here when it begins. A fork
    meanwhile (workers of a data loader) would leave those to the child; so children do not get them at all.
    """
    memory = mmap.mmap(-1, max(-(-size // mmap.PAGESIZE), 1) * mmap.PAGESIZE)
    memory.madvise(mmap.MADV_DONTFORK)
    return np.frombuffer(memory, np.uint8)
