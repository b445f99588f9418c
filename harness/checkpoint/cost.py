"""What one save asks of the file system and of the network, counted without any rank: calls, messages, bytes. Pure.

For the direct engine and replicated tensors, after the first save of a schema, with one older checkpoint that goes.

Rank 0, besides its part of the data, whatever the number of ranks and tensors: it makes the folder and the data file
(`commit.begin`, `put_head`), seals it, writes the manifest (`seal`, `publish`), looks whether the lease is still its
own, and removes what goes. Every other rank opens the data file, writes, and syncs it.

Messages are those of three votes (`ballot`): each rank asks for the save and is answered; rank 0 tells that the file is
there; each rank hands in its digests, 16 bytes per block as base64, and learns how it ended. So rank 0 gets 2 and sends
3 for each other rank: the only thing here that grows with the ranks on one of them. HDF5 and MPI-IO are not involved.

>>> from harness.checkpoint.layout import lay_out
>>> from harness.checkpoint.schema import Leaf
>>> layout = lay_out([Leaf("w", "float32", (1 << 28,))])
>>> count(layout, rank=1, size=4)
Operations(opens=2, writes=13, syncs=1, names=0, listings=0, sent=2, received=3, message_bytes=1665, bytes=268435456)
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.checkpoint.engines.output import LARGE_PART
from harness.checkpoint.file import HEAD_PIECE
from harness.checkpoint.layout import PAGE, USER_BLOCK, Layout
from harness.checkpoint.plan import make_plan
from harness.checkpoint.staging import image_sizes

ASKING, ANSWERING = 300, 400
"""Bytes that another rank sends in a save, without digests, and that rank 0 sends to each of them, at the most."""


@dataclass(frozen=True)
class Operations:
    """Of one rank. `names`: made, renamed, removed or cut files and folders; `listings`: of folders.

    `writes`: at most, as HDF5's metadata may leave pieces of the file's head empty. `message_bytes`: of all
    messages that it sends, at most. `bytes`: of tensors that it writes.
    """

    opens: int
    writes: int
    syncs: int
    names: int
    listings: int
    sent: int
    received: int
    message_bytes: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """`root`: rank 0. `other`: the rank that was asked for, or the first other one; None where there is none."""

    root: Operations
    other: Operations | None


def cost(layout: Layout, *, rank: int, size: int, odirect: bool = True) -> Cost:
    """`odirect`: whether the file system takes writes around the page cache."""
    other = rank or 1
    return Cost(
        count(layout, rank=0, size=size, odirect=odirect),
        count(layout, rank=other, size=size, odirect=odirect) if other < size else None,
    )


def count(layout: Layout, *, rank: int, size: int, odirect: bool = True) -> Operations:
    """What `rank` of `size` does in one save."""
    plan = make_plan(layout, rank=rank, size=size)
    runs = [layout.span(*run) for run in plan.runs]
    own = sum(hi - lo for lo, hi in runs)
    around = odirect and own >= LARGE_PART
    writes = 0
    for _, lo, hi in plan.ranges(layout, image_sizes(sum(-(-(hi - lo) // PAGE) * PAGE for lo, hi in runs))):
        unaligned_end = around and (hi - lo) % PAGE > 0 and hi - lo > PAGE
        writes += 2 if unaligned_end else 1
    opens = 2 if around else 1
    if rank:
        digests = 16 * plan.blocks * 4 // 3
        return Operations(opens, writes, 1, 0, 0, 2, 3, ASKING + digests, own)
    head = -(-(layout.head - USER_BLOCK - PAGE) // HEAD_PIECE)
    # listed: checkpoints three times, tags twice, the lease
    others = size - 1
    opens += 10 if odirect and layout.data_end >= LARGE_PART else 9
    return Operations(opens, writes + head + 4, 6, 8, 6, 3 * others, 2 * others, ANSWERING * others, own)
