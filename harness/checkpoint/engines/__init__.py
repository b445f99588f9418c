"""Ways to move bytes into the file. Both make the same file. An engine writes data; it neither creates nor commits.

`direct` writes byte ranges with plain positioned writes. `mpio` writes hyperslabs through HDF5's MPI-IO driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from harness.checkpoint.comm import Comm
from harness.checkpoint.layout import Layout
from harness.checkpoint.plan import Plan
from harness.checkpoint.tensors import Buffer, Bytes
from harness.errors import Unavailable

EngineName = Literal["auto", "direct", "mpio"]
IMAGE = 16 << 20
"""Bytes that are copied, hashed and written at a time: the memory a save needs besides the tensors."""


class Engine(Protocol):
    """`superblock_first`: the file must be a whole HDF5 file before `write`; otherwise it becomes one at the commit."""

    name: str
    superblock_first: bool

    def write(self, path: Path, layout: Layout, plan: Plan, buffers: Sequence[Buffer], comm: Comm) -> dict[int, int]:
        """Write this rank's blocks and make them durable. Returns the digest of each of its blocks, by number.

        `buffers`: one per leaf, in file order. Called by all ranks; a rank that raises keeps no other from returning.
        """
        ...


def choose(name: EngineName, comm: Comm, log: Callable[[str], None]) -> Engine:
    """The engine of that name. auto: direct, which works wherever all ranks see the same directory.

    Raises Unavailable where it cannot work here: the same on all ranks.
    """
    from harness.checkpoint.engines.direct import Direct
    from harness.checkpoint.engines.mpio import Mpio, unavailable

    if name in ("auto", "direct"):
        return Direct()
    if name != "mpio":
        raise Unavailable(f"there is no checkpoint engine {name!r}", hint="use auto, direct or mpio")
    if reason := unavailable(comm):
        raise Unavailable(f"the checkpoint engine mpio cannot be used: {reason}", hint="use direct, or auto")
    return Mpio(log)


def images(layout: Layout, plan: Plan, buffers: Sequence[Buffer]) -> Iterator[tuple[int, int, Bytes]]:
    """(first block, file offset, bytes): this rank's part of the file as it is to be, zeros between tensors.

    The bytes are valid until the next one is asked for.
    """
    staging = np.empty(min(max(IMAGE, layout.block), plan.blocks * layout.block), np.uint8)
    previous: Buffer | None = None
    for block, lo, hi in plan.ranges(layout, IMAGE):
        image = staging[: hi - lo]
        done = 0
        for piece in layout.pieces(lo, hi):
            buffer = buffers[piece.leaf]
            if previous is not None and previous is not buffer:
                previous.release()
            previous = buffer
            at = piece.offset - lo
            image[done:at] = 0
            done = at + piece.hi - piece.lo
            image[at:done] = buffer.read(piece.lo, piece.hi)
        image[done:] = 0
        yield block, lo, image
    if previous is not None:
        previous.release()
