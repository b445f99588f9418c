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

from harness.checkpoint.agree import together
from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.digest import Table
from harness.checkpoint.layout import Layout
from harness.checkpoint.tensors import Buffer
from harness.errors import some

_PIECE = 16 << 20


@dataclass(frozen=True)
class Unequal:
    """Indices of leaves that are not the same everywhere, and the ranks that differ from rank 0."""

    leaves: tuple[int, ...]
    ranks: tuple[int, ...]


def compare(layout: Layout, buffers: Sequence[Buffer], comm: Comm, step: int) -> Unequal:
    """Compare the replicated leaves of all ranks. Reads all of them once. Collective. Raises SaveFailed."""
    shared = [index for index, leaf in enumerate(layout.leaves) if leaf.placement == "replicated"]

    def digest() -> tuple[Table, Json]:
        made = np.array([digest_of(buffers[index]) for index in shared], "<u8")
        return made, xxhash.xxh3_128_hexdigest(made.tobytes())

    digests, roots = together(comm, step, "while it compared its replicas", digest)
    if len(set(roots)) == 1:
        return Unequal((), ())
    reference: Any = comm.broadcast(digests.tobytes().hex())
    differs = digests != np.frombuffer(bytes.fromhex(reference), "<u8")
    masks: list[Any] = comm.all_gather(np.packbits(differs).tobytes().hex())
    masked = np.array([np.unpackbits(np.frombuffer(bytes.fromhex(mask), np.uint8))[: len(shared)] for mask in masks])
    leaves = tuple(shared[position] for position in np.flatnonzero(masked.any(axis=0)))
    return Unequal(leaves, tuple(np.flatnonzero(masked.any(axis=1)).tolist()))


def found(layout: Layout, unequal: Unequal, first: str) -> str:
    """What was found, with the first names and ranks. `first`: whom they should be equal to."""
    names = some([layout.leaves[index].name for index in unequal.leaves])
    return f"ranks that should be equal are not: rank {some(unequal.ranks)} differs from {first} in {names}"


def digest_of(buffer: Buffer) -> int:
    """XXH3-64 of a tensor's bytes."""
    state = xxhash.xxh3_64()
    for at in range(0, buffer.nbytes, _PIECE):
        state.update(buffer.read(at, min(at + _PIECE, buffer.nbytes)).data)
    buffer.release()
    return state.intdigest()
