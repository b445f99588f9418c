"""A state in host memory: what a checkpoint holds, without a file.

    memory = remember(state, step=40)                  # a copy of every tensor, and the JSON
    ...
    recall(state, memory)                              # bit for bit as it was

It costs one copy of the state per rank, and one pass over it. Nothing here is collective; that ranks give a memory to
each other is `harness.elastic`'s. States that are divided between ranks are refused: a part is of no use alone.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

import numpy as np

from harness.checkpoint.layout import lay_out
from harness.checkpoint.manifest import Manifest, parse, render
from harness.checkpoint.state import State, complain, prepare, take
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError

_NO_DIGEST = "0" * 32
"""Of a file that is not there."""


@dataclass(frozen=True)
class Memory:
    """The bytes of every leaf by name, and what is not a tensor, as a checkpoint's manifest."""

    manifest: Manifest
    leaves: dict[str, Bytes]

    @property
    def step(self) -> int:
        return self.manifest.step


def remember(state: State, step: int, before: Memory | None = None) -> Memory:
    """Copy the state as it is after `step` steps. `before`: a memory whose arrays may be overwritten.

    Raises DataError for a state that is divided between ranks, or that a checkpoint cannot hold.
    """
    snapshot = take(state)
    if snapshot.parts:
        raise DataError(f"{min(snapshot.parts)} is divided between the ranks, so no rank can remember it alone")
    manifest = Manifest(
        uuid=uuid.uuid4().hex,
        step=step,
        created=time.time(),
        world=1,
        layout=lay_out(snapshot.leaves),
        table=_NO_DIGEST,
        head=_NO_DIGEST,
        aliases=snapshot.aliases,
        state=snapshot.record,
    )
    old = {} if before is None else before.leaves
    leaves = {}
    for name, buffer in snapshot.buffers.items():
        kept = old.get(name)
        leaves[name] = kept if kept is not None and kept.size == buffer.nbytes else np.empty(buffer.nbytes, np.uint8)
        np.copyto(leaves[name], buffer.read(0, buffer.nbytes))
        buffer.release()
    return Memory(manifest, leaves)


def recall(state: State, memory: Memory) -> None:
    """Bring the state to what it was. Raises DataError, before anything has changed, where it is another one now."""
    restore = prepare(state, memory.manifest)
    if restore.problems:
        raise complain(restore.problems, f"of step {memory.step} in memory")
    for name, sinks in restore.sinks.items():
        for sink in sinks:
            sink.write(0, memory.leaves[name])
    restore.finish()


def outline(memory: Memory) -> str:
    """All of a memory but the tensors, as text."""
    return render(memory.manifest)


def empty(text: str) -> Memory:
    """A memory of this `outline`, with room for its tensors. Raises DataError."""
    manifest = parse(text)
    return Memory(manifest, {leaf.name: np.empty(leaf.nbytes, np.uint8) for leaf in manifest.layout.leaves})
