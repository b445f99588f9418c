"""The bytes of a checkpoint file before its digests, as they are made and written.

The rest of the file is bytes at known places, too (`layout`). So a file needs no HDF5 to come into being, and any HDF5
opens it.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.checkpoint.hdf5 import metadata
from harness.checkpoint.layout import DIGESTS, PAGE, USER_BLOCK, Layout
from harness.checkpoint.pages import aligned
from harness.checkpoint.schema import Leaf
from harness.checkpoint.tensors import Bytes
from harness.errors import InternalError

SUPERBLOCK = (USER_BLOCK, USER_BLOCK + PAGE)
"""The page without which the file is no HDF5 file. It is written last."""
HEAD_PIECE = 1 << 20
"""Bytes of one write of the head; pieces of zeros are left out."""


def build_head(layout: Layout, aliases: Mapping[str, str]) -> bytes:
    """Bytes [USER_BLOCK, layout.head) of the file: the HDF5 metadata, then zeros.

    `aliases`: second names of leaves, for which it was laid out. The table of digests is a data set, too.
    """
    table = Leaf(DIGESTS, "uint64", ((layout.data_start - layout.head) // 8,))
    leaves, starts = [table, *layout.leaves], [layout.head, *layout.starts.tolist()]
    made = metadata(leaves, starts, aliases, base=USER_BLOCK, end=layout.data_end)
    if len(made) > layout.head - USER_BLOCK:
        raise InternalError(f"{len(made)} bytes of HDF5 metadata have no room in {layout.head - USER_BLOCK}")
    return made.ljust(layout.head - USER_BLOCK, b"\0")


@functools.lru_cache(maxsize=1)
def pieces(head: bytes) -> list[tuple[int, Bytes]]:
    """What of the head is not zeros, but for `superblock_page`: (offset in the file, bytes), in memory of its own."""
    memory = aligned(len(head))
    memory[: len(head)] = np.frombuffer(head, np.uint8)
    found = []
    for lo in range(SUPERBLOCK[1] - USER_BLOCK, len(head), HEAD_PIECE):
        piece = memory[lo : min(lo + HEAD_PIECE, len(head))]
        if piece.any():
            found.append((USER_BLOCK + lo, piece))
    return found


def superblock_page(head: bytes) -> bytes:
    """The page that `pieces` leaves out."""
    return head[: SUPERBLOCK[1] - SUPERBLOCK[0]]


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write a whole buffer at a file offset, however many calls that takes. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing could be written")
        view, offset = view[written:], offset + written


def read_all(descriptor: int, buffer: Any, offset: int) -> None:
    """Fill a buffer from a file offset. Raises OSError, EOFError where the file ends before."""
    view = memoryview(buffer).cast("B")
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise EOFError(f"the file ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count
