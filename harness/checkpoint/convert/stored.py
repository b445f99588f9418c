"""The tensors of a checkpoint, read part by part; every block that is read is checked against its digest."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np

from harness.checkpoint.blocks import Blocks
from harness.checkpoint.commit import DATA
from harness.checkpoint.convert.tensor import Source, Tensor
from harness.checkpoint.layout import LARGE
from harness.checkpoint.reader import Checkpoint
from harness.checkpoint.store import Damaged
from harness.checkpoint.tensors import Bytes

_AHEAD = 4 << 20
"""Bytes that are read at once, at least: they are kept for the next part, or the next tensor."""


def read_checkpoint(checkpoint: Checkpoint) -> Source:
    """The tensors in file order, with their names in the checkpoint. Reading raises Damaged."""
    files = ExitStack()
    blocks = Blocks(checkpoint.path, checkpoint.manifest)
    files.callback(blocks.close)
    # Small tensors lie together. Their blocks are kept while large ones, which come between them by name, pass through.
    small, large = _Window(checkpoint, blocks), _Window(checkpoint, blocks)
    layout = checkpoint.manifest.layout
    tensors = [
        Tensor(
            leaf.name, leaf.dtype, leaf.shape, partial((small if leaf.nbytes < LARGE else large).read, leaf.name, start)
        )
        for leaf, start in zip(layout.leaves, layout.starts.tolist(), strict=True)
    ]
    return Source(tensors, dict(checkpoint.manifest.aliases), files=files)


class _Window:
    """The blocks that were read last."""

    def __init__(self, checkpoint: Checkpoint, blocks: Blocks) -> None:
        self._checkpoint, self._blocks, self._layout = checkpoint, blocks, blocks.layout
        self._first = self._last = 0  # blocks [first, last) are in the buffer
        self._buffer: Bytes = np.empty(0, np.uint8)
        self._damaged: set[int] = set()

    def read(self, name: str, start: int, lo: int, hi: int) -> Bytes:
        """Bytes [lo, hi) of the tensor that begins at file offset `start`."""
        if lo >= hi:
            return self._buffer[:0]
        layout = self._layout
        first = (start + lo - layout.data_start) // layout.block
        last = -(-(start + hi - layout.data_start) // layout.block)
        if not self._first <= first <= last <= self._last:
            self._fetch(first, last)
        if not self._damaged.isdisjoint(range(first, last)):
            raise Damaged(f"{self._checkpoint.path / DATA}: {name} is damaged", proven=True)
        base, _ = layout.block_range(self._first)
        return self._buffer[start + lo - base : start + hi - base]

    def _fetch(self, first: int, last: int) -> None:
        layout = self._layout
        last = min(max(last, first + _AHEAD // layout.block), layout.blocks)
        size = self._blocks.size(first, last)
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        self._first = self._last = 0
        try:
            self._damaged = set(self._blocks.read(first, last, self._buffer[:size]))
        except (OSError, EOFError) as error:
            raise Damaged(f"{self._checkpoint.path / DATA} cannot be read: {error}") from error
        self._first, self._last = first, last
