"""Memory that holds the image of this rank's own part of the file: what is written, apart from what is trained.

    staging = Staging()
    images = staging.prepare(layout, plan)      # memory for the blocks of the plan, zeros between tensors
    staging.fill(buffers)                       # copy the tensors' bytes: afterwards they may change
    digests = engine.write(path, layout, images, comm)

It is one rank's share of the state, about 1/size of it, and is kept for the next save. It knows no files and no ranks.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from harness.checkpoint.gpu import Gpu, copy_from_device
from harness.checkpoint.layout import Layout
from harness.checkpoint.pages import Coming, aligned
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
FIRST_IMAGE = 4 << 20
"""Bytes of the first image. The disk has something to do the sooner, while the rest is copied."""

GROUP = 1 << 20
"""Bytes of small tensors that are copied at once."""

_Piece = tuple[int, int, int, int]
"""(leaf, lo, hi, at): its bytes [lo, hi) lie at `at` of the memory."""
_Group = tuple[list[Any], int, int]
"""(parts, begin, end): parts that follow each other, all of numpy or all on one GPU, are bytes [begin, end) there."""


class _Known(NamedTuple):
    """What `fill` has found to copy: the same again, as long as the buffers are the same."""

    buffers: Sequence[Buffer]
    leaves: frozenset[int] | None
    groups: list[_Group]


@dataclass(frozen=True, eq=False)
class Image:
    """A part of the file as it is to be: whole blocks.

    `block`: number of its first block. `offset`: where it lies in the file, a multiple of the block size. `data`: its
    bytes, in memory that begins at a page.
    """

    block: int
    offset: int
    data: Bytes


def image_sizes(part: int) -> Iterator[int]:
    """Bytes of each image at the most, where a rank's part of the file has so many, in whole pages per run.

    >>> [size >> 20 for size, _ in zip(image_sizes(1 << 30), range(9), strict=False)]
    [4, 4, 8, 8, 16, 16, 32, 32, 64]
    """
    most = min(LARGE_IMAGE, max(IMAGE, part // IMAGES_WANTED))
    size = min(FIRST_IMAGE, most)
    while True:
        yield from (size, size)
        size = min(2 * size, most)


class Staging:
    """Reused memory for the blocks of one plan. One save at a time: `prepare` makes earlier images invalid.

    Not safe for several threads at once, but `fill` may run in another thread than `prepare`.
    """

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)
        self._layout: Layout | None = None
        self._plan: Plan | None = None
        self._runs: list[tuple[int, int, int]] = []  # (lo, hi, at): file bytes [lo, hi) lie at `at` of the memory
        self._pieces: list[_Piece] = []
        self._known: list[_Known] = []
        self._images: list[Image] = []
        self._ends: list[int] = []  # where each image ends in the memory
        self._gpu = Gpu()
        self._coming: Coming | None = None

    def prepare(self, layout: Layout, plan: Plan) -> list[Image]:
        """Memory for the plan's blocks, in images of at most LARGE_IMAGE bytes, in file order; zeros between tensors.

        What is not yet filled is undefined. New memory is got ready in a thread: work between this and `fill` goes on
        beside that. Raises MemoryError.
        """
        self._gpu.mark()
        if layout is self._layout and plan == self._plan:
            return list(self._images)
        self._layout = None
        self._images, self._runs, needed = [], [], 0
        for first, last in plan.runs:
            lo, hi = layout.span(first, last)
            self._runs.append((lo, hi, needed))
            needed += -(-(hi - lo) // mmap.PAGESIZE) * mmap.PAGESIZE
        new = self._reserve(needed)
        self._pieces, self._ends, self._known = [], [], []
        runs = iter(self._runs)
        lo = hi = at = 0
        for block, begin, end in plan.ranges(layout, image_sizes(needed)):
            while not lo <= begin < hi:
                lo, hi, at = next(runs)
            first, last = at + begin - lo, at + end - lo
            self._images.append(Image(block, begin, self._memory[first:last]))
            self._ends.append(last)
            done = first
            for piece in layout.pieces(begin, end):
                start = first + piece.offset - begin
                if not new:
                    self._memory[done:start] = 0
                done = start + piece.hi - piece.lo
                self._pieces.append((piece.leaf, piece.lo, piece.hi, start))
            if not new:
                self._memory[done:last] = 0
        self._layout, self._plan = layout, plan
        return list(self._images)

    def fill(
        self,
        buffers: Sequence[Buffer],
        leaves: Collection[int] | None = None,
        reached: Callable[[int], None] | None = None,
    ) -> None:
        """Copy the bytes of these leaves that lie in the plan's blocks; None: of all that every rank holds whole.

        `buffers`: one per leaf of the layout, in its order. `leaves`: indices into them. What ranks hold in parts comes
        by `exchange`. `reached` hears now and then how many of the images, from the first on, have got their bytes.
        """
        layout = self._prepared()
        wanted = None if leaves is None else frozenset(leaves)
        self._known = [known for known in self._known if known.buffers is buffers]
        known = next((known for known in self._known if known.leaves == wanted), None)
        if known is not None:
            self._copy_groups(known.groups, reached)
        else:
            others = layout.parted
            pieces = [
                piece for piece in self._pieces if (piece[0] not in others if wanted is None else piece[0] in wanted)
            ]
            devices = {buffers[leaf].device for leaf, _, _, _ in pieces}
            groups: Iterable[_Group] = _grouped(buffers, pieces)
            if all(buffers[leaf].in_place for leaf, _, _, _ in pieces):
                groups = made = list(groups)
                self._known.append(_Known(buffers, wanted, made))
            with self._gpu.copying(self._memory, devices):  # what comes from a GPU is there at its end
                self._copy_groups(groups, reached if devices <= {None} else None)
        if reached is not None:
            reached(len(self._images))

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
        self._wait(at + end - lo)
        return self._memory[at + begin - lo : at + end - lo]

    def close(self) -> None:
        """Give the memory back, as soon as nobody holds its images."""
        self._gpu.close()
        self.__init__()  # type: ignore[misc]

    def _copy_groups(self, groups: Iterable[_Group], reached: Callable[[int], None] | None) -> None:
        number = 0
        for parts, begin, end in groups:
            if reached is not None and self._ends[number] <= begin:
                number = bisect.bisect_right(self._ends, begin)
                reached(number)
            self._wait(end)
            if isinstance(parts[0], np.ndarray):
                np.concatenate(parts, out=self._memory[begin:end])
            else:
                copy_from_device(parts, self._memory[begin:end])

    def _wait(self, end: int) -> None:
        """Until new memory is there up to this byte."""
        if self._coming is not None and self._coming.wait(end):
            self._coming = None

    def _prepared(self) -> Layout:
        if self._layout is None:
            raise InternalError("the staging memory was used before it was prepared")
        return self._layout

    def _reserve(self, size: int) -> bool:
        """Memory of at least this size that begins at a page: whether it is new, and zeros."""
        if len(self._memory) >= size:
            return False
        self._gpu.close()
        self._memory = np.empty(0, np.uint8)  # first, so that old and new do not exist at once
        self._memory = aligned(size)
        self._coming = Coming(self._memory)
        return True


def _grouped(buffers: Sequence[Buffer], pieces: Iterable[_Piece]) -> Iterator[_Group]:
    """The pieces' bytes, neighbours in the memory that are on the same device together.

    Where a buffer passes through a copy, a group is valid until the next one is asked for.
    """
    group: list[Any] = []
    begin = end = 0
    previous: Buffer | None = None
    for leaf, lo, hi, at in pieces:
        buffer = buffers[leaf]
        if buffer is not previous and previous is not None:
            previous.release()
        data = buffer.part(lo, hi)
        if at != end or end - begin > GROUP or (group and type(data) is not type(group[0])):
            if group:
                yield group, begin, end
            group, begin = [], at
        group.append(data)
        end = at + hi - lo
        previous = buffer
    if group:
        yield group, begin, end
    if previous is not None:
        previous.release()
