"""The data file of a checkpoint, read in whole blocks that are checked.

    blocks = Blocks(path, manifest)
    for first, last, data, damaged in blocks.ahead(segments):   # threads read the next ones meanwhile
        ...
    blocks.close()

While one thread waits for the disk, another one checks digests, and the caller deals with what has come: none of these
holds Python's lock. On two cores and 2 ranks, a restore around the page cache had 0.82 of the speed of plain reads with
segments of 4 MiB, 3 threads and 6 segments in memory; 0.78 with 8 MiB, 2 and 3. On 4 ranks 0.49 and 0.43. From the page
cache 32 MiB take 1.3 to 1.5 times as long as 8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.checkpoint.commit import DATA
from harness.checkpoint.digest import block_digests
from harness.checkpoint.input import Input
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.pages import aligned
from harness.checkpoint.store import open_data, read_table
from harness.checkpoint.tensors import Bytes

SEGMENT = 4 << 20
"""Bytes that one thread reads and checks at a time. More does not stay in a processor's caches until it is used."""
THREADS = 3
Segment = tuple[int, int]
"""Blocks [first, last)."""


def cut(first: int, last: int, most: int) -> Iterator[Segment]:
    """Blocks [first, last) in segments of so many blocks at the most."""
    return ((at, min(at + most, last)) for at in range(first, last, most))


class Found(NamedTuple):
    """The bytes of blocks [first, last), and the numbers of those that are damaged."""

    first: int
    last: int
    data: Bytes
    damaged: list[int]


class Blocks:
    """Raises Damaged when opened. `source`: where the bytes come from."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.layout = manifest.layout
        self.source = Input(open_data(path, manifest), path / DATA)
        try:
            self._table = read_table(self.source.descriptor, path, manifest)
        except BaseException:
            self.close()
            raise

    def read(self, first: int, last: int, buffer: Bytes) -> list[int]:
        """Fill the buffer with blocks [first, last). Returns the numbers of damaged ones. Raises OSError, EOFError."""
        lo, _ = self.layout.block_range(first)
        self.source.read(buffer, lo)
        found = np.array(block_digests(buffer, self.layout.block), np.uint64)
        damaged: list[int] = (first + np.flatnonzero(found != self._table[first:last])).tolist()
        return damaged

    def ahead(self, segments: Sequence[Segment], threads: int = THREADS) -> Iterator[Found]:
        """The segments in order, read and checked by threads. The data are good until the next one is asked for.

        It holds twice as many segments as threads in memory. Raises OSError, EOFError.
        """
        largest = max((self.size(*segment) for segment in segments), default=0)
        free = [aligned(largest) for _ in range(min(2 * threads, len(segments)))]
        reading: deque[tuple[Future[Found], Bytes]] = deque()

        def fetch(first: int, last: int, memory: Bytes) -> Found:
            data = memory[: self.size(first, last)]
            return Found(first, last, data, self.read(first, last, data))

        with ThreadPoolExecutor(threads, "checkpoint-reader") as pool:
            for first, last in segments:
                if not free:
                    future, memory = reading.popleft()
                    yield future.result()
                    free.append(memory)
                memory = free.pop()
                reading.append((pool.submit(fetch, first, last, memory), memory))
            for future, _ in reading:
                yield future.result()

    def size(self, first: int, last: int) -> int:
        """Bytes of blocks [first, last)."""
        lo, hi = self.layout.span(first, last)
        return hi - lo

    def names(self, blocks: Sequence[int]) -> list[str]:
        """Names of the tensors that have bytes in these blocks."""
        pieces = (piece for block in blocks for piece in self.layout.pieces(*self.layout.block_range(block)))
        return list(dict.fromkeys(self.layout.leaves[piece.leaf].name for piece in pieces))

    def close(self) -> None:
        self.source.close()
