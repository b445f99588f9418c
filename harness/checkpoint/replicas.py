"""Are the replicas equal? Ranks compare digests of what they believe to be the same.

Each rank writes a part of a replicated tensor. Were the replicas not equal, the file would hold a tensor that no rank
ever had. So they are compared: one digest of everything first, and only if that differs one per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from harness.checkpoint.comm import Comm
from harness.checkpoint.layout import Layout
from harness.checkpoint.staging import IMAGE
from harness.checkpoint.tensors import Buffer


@dataclass(frozen=True)
class Unequal:
    """Indices of leaves that are not the same everywhere, and the ranks that differ from rank 0."""

    leaves: tuple[int, ...]
    ranks: tuple[int, ...]


def compare(layout: Layout, buffers: Sequence[Buffer], comm: Comm) -> Unequal:
    """Compare the replicated leaves of all ranks. Reads all of them once. Collective."""
    if comm.size == 1:
        return Unequal((), ())
    shared = [index for index, leaf in enumerate(layout.leaves) if leaf.placement == "replicated"]
    digests = np.array([_digest(buffers[index]) for index in shared], "<u8")
    together: list[Any] = comm.all_gather(xxhash.xxh3_128_hexdigest(digests.tobytes()))
    if len(set(together)) == 1:
        return Unequal((), ())
    reference: Any = comm.broadcast(digests.tobytes().hex())
    differs = digests != np.frombuffer(bytes.fromhex(reference), "<u8")
    masks: list[Any] = comm.all_gather(np.packbits(differs).tobytes().hex())
    found = np.array([np.unpackbits(np.frombuffer(bytes.fromhex(mask), np.uint8))[: len(shared)] for mask in masks])
    leaves = tuple(shared[position] for position in np.flatnonzero(found.any(axis=0)))
    return Unequal(leaves, tuple(np.flatnonzero(found.any(axis=1)).tolist()))


def _digest(buffer: Buffer) -> int:
    state = xxhash.xxh3_64()
    for at in range(0, buffer.nbytes, IMAGE):
        state.update(buffer.read(at, min(at + IMAGE, buffer.nbytes)).data)
    buffer.release()
    return state.intdigest()
