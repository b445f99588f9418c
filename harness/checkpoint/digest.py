"""Digests that find damage: xxh3 of each block, and one of all of them. They do not protect against forgery.

A block's digest is XXH3-64 (seed 0) of its file bytes; the space between tensors is zeros. The root is XXH3-128 of the
table of digests as little-endian uint64.

>>> root([digest(b"")])
'66f7ee01ee4a1e7332e080078f9f652e'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Table = npt.NDArray[np.uint64]


def block_digests(data: Any, block: int) -> list[int]:
    """The digest of each `block` bytes of a buffer; the last one may be shorter."""
    view = memoryview(data)
    return [xxhash.xxh3_64_intdigest(view[at : at + block]) for at in range(0, len(view), block)]


def digest(data: Any) -> int:
    """XXH3-64 of a buffer."""
    return xxhash.xxh3_64_intdigest(data)


def root(table: Sequence[int] | Table) -> str:
    """32 hex digits that stand for the whole table."""
    return xxhash.xxh3_128_hexdigest(np.asarray(table, "<u8").tobytes())
