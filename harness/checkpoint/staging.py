"""Memory that holds the image of this rank's own part of the file: what is written, apart from what is trained.

    staging = Staging()
    images = staging.prepare(layout, plan)      # memory for the blocks of the plan, zeros between tensors
    staging.fill(buffers)                       # copy the tensors' bytes: afterwards they may change
    digests = engine.write(path, layout, images, comm)

It is one rank's share of the state, about 1/size of it, and is kept for the next save. It knows no files and no ranks.
"""

from __future__ import annotations

import bisect
import gc
import mmap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harness.checkpoint.layout import Layout
from harness.checkpoint.plan import Plan
from harness.checkpoint.tensors import Bytes
from harness.errors import InternalError

if TYPE_CHECKING:
    from harness.checkpoint.tensors import Buffer

IMAGE = 16 << 20
"""Bytes of an image where a rank's part is not large."""
LARGE_IMAGE = 64 << 20
"""Bytes of an image at the most. Fewer, larger writes are about a fifth faster around the page cache."""
IMAGES_WANTED = 8
"""A part gives at least so many images before they become larger than IMAGE: several threads share them."""

GROUP = 1 << 20
"""Bytes of small tensors that are copied at once."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's search for cycles of garbage is put off: among many new objects it takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, eq=False)
class Image:
    """A part of the file as it is to be: whole blocks.

    `block`: number of its first block. `offset`: where it lies in the file, a multiple of the block size. `data`: its
    bytes, in memory that begins at a page.
    """

    block: int
    offset: int
    data: Bytes


class Staging:
    """Reused memory for the blocks of one plan. One save at a time: `prepare` makes earlier images invalid.

    Not safe for several threads at once, but `fill` may run in another thread than `prepare`.
    """

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)
        self._layout: Layout | None = None
        self._plan: Plan | None = None
        self._runs: list[tuple[int, int, int]] = []  # (lo, hi, at): file bytes [lo, hi) lie at `at` of the memory
        self._pieces: list[tuple[int, int, int, int]] = []  # (leaf, lo, hi, at): its bytes [lo, hi) lie at `at`
        self._images: list[Image] = []

    @no_collection()
    def prepare(self, layout: Layout, plan: Plan) -> list[Image]:
        """Memory for the plan's blocks, in images of at most LARGE_IMAGE bytes, in file order; zeros between tensors.

        What is not yet filled is undefined. Raises MemoryError.
        """
        if layout is self._layout and plan == self._plan:
            return list(self._images)
        self._layout = None
        self._images, self._runs, needed = [], [], 0
        for first, last in plan.runs:
            lo, hi = layout.block_range(first)[0], layout.block_range(last - 1)[1]
            self._runs.append((lo, hi, needed))
            needed += -(-(hi - lo) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._reserve(needed)
        self._pieces = []
        for lo, hi, at in self._runs:
            done = at
            for piece in layout.pieces(lo, hi):
                start = at + piece.offset - lo
                self._memory[done:start] = 0
                done = start + piece.hi - piece.lo
                self._pieces.append((piece.leaf, piece.lo, piece.hi, start))
            self._memory[done : at + hi - lo] = 0
        runs = iter(self._runs)
        lo = hi = at = 0
        for block, begin, end in plan.ranges(layout, min(LARGE_IMAGE, max(IMAGE, needed // IMAGES_WANTED))):
            while not lo <= begin < hi:
                lo, hi, at = next(runs)
            self._images.append(Image(block, begin, self._memory[at + begin - lo : at + end - lo]))
        self._layout, self._plan = layout, plan
        return list(self._images)

    @no_collection()
    def fill(self, buffers: Sequence[Buffer], leaves: Collection[int] | None = None) -> None:
        """Copy the bytes of these leaves that lie in the plan's blocks; None: of all that every rank holds whole.

        `buffers`: one per leaf of the layout, in its order. `leaves`: indices into them. What ranks hold in parts comes
        by `exchange`.
        """
        layout = self._prepared()
        wanted = None if leaves is None else frozenset(leaves)
        others = layout.parted
        previous: Buffer | None = None
        group: list[Bytes] = []  # small neighbours, which are copied in one go
        begin = end = 0
        for leaf, lo, hi, at in self._pieces:
            if leaf in others if wanted is None else leaf not in wanted:
                continue
            buffer = buffers[leaf]
            if previous is not None and previous is not buffer:
                previous.release()
            previous = buffer
            data = buffer.read(lo, hi)
            if at != end or end - begin > GROUP:
                self._copy(group, begin, end)
                group, begin = [], at
            group.append(data)
            end = at + len(data)
        self._copy(group, begin, end)
        if previous is not None:
            previous.release()

    def put(self, offset: int, data: Bytes) -> None:
        """Bytes at an offset of the file, inside one run of the plan's blocks. Raises InternalError elsewhere."""
        self.view(offset, offset + len(data))[:] = data

    def view(self, begin: int, end: int) -> Bytes:
        """The memory of bytes [begin, end) of the file, inside one run. Raises InternalError elsewhere."""
        self._prepared()
        index = bisect.bisect_right(self._runs, begin, key=lambda run: run[0]) - 1
        if index < 0 or end > self._runs[index][1]:
            raise InternalError(f"bytes {begin} to {end} of the file are not this rank's to write")
        lo, _, at = self._runs[index]
        return self._memory[at + begin - lo : at + end - lo]

    def close(self) -> None:
        """Give the memory back, as soon as nobody holds its images."""
        self.__init__()  # type: ignore[misc]

    def _copy(self, group: list[Bytes], begin: int, end: int) -> None:
        """Parts that follow each other into [begin, end) of the memory."""
        if len(group) == 1:
            self._memory[begin:end] = group[0]
        elif group:
            np.concatenate(group, out=self._memory[begin:end])

    def _prepared(self) -> Layout:
        if self._layout is None:
            raise InternalError("the staging memory was used before it was prepared")
        return self._layout

    def _reserve(self, size: int) -> None:
        """Memory of at least this size that begins at a page. It is taken from the system as it is touched."""
        if len(self._memory) < size:
            self._memory = np.empty(0, np.uint8)  # first, so that old and new do not exist at once
            self._memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
