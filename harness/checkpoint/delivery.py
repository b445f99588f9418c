"""A checkpoint's blocks to where they are wanted, on all ranks: read once where that can be, checked, exchanged.

    load(path, manifest, {"model/fc.weight": [sink]}, comm)

See `restoring` for sinks, `wanted` for who wants what, `blocks` for reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from harness.checkpoint.blocks import SEGMENT, Blocks, Found, Segment, cut
from harness.checkpoint.cached import spare_cache
from harness.checkpoint.comm import Comm
from harness.checkpoint.commit import DATA
from harness.checkpoint.layout import Layout
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.store import Damaged
from harness.checkpoint.tensors import Buffer, Bytes, Part
from harness.checkpoint.wanted import Mask, Sink, Wanted, gather_wanted, wanted_blocks, wanted_ranges
from harness.errors import InternalError, UsageError, some

PARCEL = 512 << 10
"""Bytes that are sent for themselves, as copying them once more would take longer than a message."""
_TAG = 4118


Read: TypeAlias = Literal["exchange", "all"]


def known(read: str) -> Read:
    """A way of reading. Raises UsageError for any other text."""
    if read not in get_args(Read):
        raise UsageError(f"read={read!r} is unknown; it is {' or '.join(get_args(Read))}")
    return cast(Read, read)


def load(
    path: Path, manifest: Manifest, sinks: Mapping[str, Sequence[Sink]], comm: Comm, *, read: Read = "exchange"
) -> None:
    """Fill the sinks, by leaf name, from a checkpoint. Collective; ranks may have different sinks.

    "exchange": blocks that several ranks want are read and checked in shares, and each rank is sent what it wants of
    them, so that each byte leaves the file system once. "all", or without MPI: every rank reads what it wants. On 2 and
    4 ranks of two cores the first took 0.55 of the time of the second, where the file was in the page cache 0.8 to 1.2.
    Raises Damaged, on all ranks alike, naming the damaged tensors; the sinks may then be partly filled.
    """
    reading = _Reading(path, manifest, sinks)
    exchange = read == "exchange" and comm.mpi is not None and comm.size > 1
    try:
        if exchange or comm.size == 1:  # otherwise the ranks of a node share what one of them has brought into it
            reading.spare_cache()
        if exchange:
            wanted = gather_wanted(manifest.layout, reading.ranges, comm)
            near = one_node(comm.mpi)
            _give_all(reading, wanted.by_most & (not near), comm.mpi)
            _give_some(reading, wanted, wanted.by_some | (wanted.by_most & near), comm.mpi)
        for found in reading.fetch(_segments(reading.wanted, manifest.layout.block, 1)):
            if reading.good:
                reading.deliver(reading.layout.block_range(found.first)[0], found.data)
        verdicts: list[Any] = comm.all_gather(reading.verdict())
    finally:
        reading.close()
    failed = next((verdict["failed"] for verdict in verdicts if verdict["failed"]), None)
    if failed:
        raise InternalError(f"the checkpoint {path} could not be restored: {failed}")
    damaged = list(dict.fromkeys(name for verdict in verdicts for name in verdict["damaged"]))
    unreadable = next((verdict["unreadable"] for verdict in verdicts if verdict["unreadable"]), None)
    if damaged:
        raise Damaged(f"{path / DATA}: damaged: {some(damaged, 20)}", proven=True)
    if unreadable:
        raise Damaged(unreadable)


def one_node(mpi: Any) -> bool:
    """Whether all ranks share memory. Collective."""
    from mpi4py import MPI

    node = mpi.Split_type(MPI.COMM_TYPE_SHARED)
    together: bool = node.Get_size() == mpi.Get_size()
    node.Free()
    return together


def _read_together(reading: _Reading, blocks: Mask, mpi: Any) -> Iterator[tuple[Found | None, list[Segment]]]:
    """Each rank reads a share of these blocks. In turns: what this rank has read, and what each has, by rank.

    Nothing comes once one of them could not read. Collective, in each turn.
    """
    size, rank = mpi.Get_size(), mpi.Get_rank()
    segments = _segments(blocks, reading.layout.block, size)
    turns = -(-len(segments) // size)
    own = reading.fetch(segments[rank * turns : (rank + 1) * turns])  # neighbours: up to 1.7 x as fast
    for turn in range(turns):
        found = next(own, None)
        if all(_gather_flags(mpi, reading.good)):
            yield found, segments[turn::turns]


def _give_all(reading: _Reading, blocks: Mask, mpi: Any) -> None:
    """Read these blocks, which then go to all ranks: over a network MPI knows the best way."""
    for found, segments in _read_together(reading, blocks, mpi):
        for owner, segment in enumerate(segments):
            base, end = reading.layout.span(*segment)
            if found is None or owner != mpi.Get_rank():
                reading.take(base, end, lambda data: mpi.Bcast(data, root=owner))  # noqa: B023
                continue
            for lo, hi in _parcels(reading.layout, base, end):
                mpi.Bcast(found.data[lo - base : hi - base], root=owner)
            reading.deliver(base, found.data)


def _give_some(reading: _Reading, wanted: Wanted, blocks: Mask, mpi: Any) -> None:
    """Read these blocks, of which each rank is sent what it wants. On one node that is the fastest for all ranks, too.

    All send before they wait for what they receive, which they take in another order each, not all from the same rank.
    On one node four ranks took 0.6 of the time of broadcasts, two as long with 0.85 of the processor time.
    """
    size, rank = mpi.Get_size(), mpi.Get_rank()
    for found, segments in _read_together(reading, blocks, mpi):
        sent = []
        if found is not None:
            base, end = reading.layout.span(found.first, found.last)
            wants = wanted.of(base, end)
            for to in ((rank + step) % size for step in range(1, size)):
                for lo, hi in _parcels(reading.layout, *wants.get(to, (base, base))):
                    sent.append(mpi.Isend(found.data[lo - base : hi - base], dest=to, tag=_TAG))
            reading.deliver(base, found.data)
        for owner in ((rank - step) % size for step in range(1, size)):
            if owner < len(segments) and reading.wanted[slice(*segments[owner])].any():
                lo, hi = wanted.of(*reading.layout.span(*segments[owner]))[rank]
                reading.take(lo, hi, lambda data: mpi.Irecv(data, source=owner, tag=_TAG).Wait())  # noqa: B023
        for request in sent:
            request.Wait()


def _parcels(layout: Layout, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """File bytes [lo, hi) as they are sent: of a leaf PARCEL bytes and more for themselves, other neighbours together.

    Nothing is sent of what lies between large ones.
    """
    begin = end = lo
    for piece in layout.pieces(lo, hi):
        size = piece.hi - piece.lo
        if size >= PARCEL:
            if end > begin:
                yield begin, end
            yield piece.offset, piece.offset + size
            begin = end = piece.offset + size
        else:
            begin, end = piece.offset if end == begin else begin, piece.offset + size
    if end > begin:
        yield begin, end


class _Reading:
    """One rank's part of `load`. Errors are kept until all ranks can hear of them.

    `ranges`: of the file, with bytes for the sinks. `wanted`: their blocks that have not been delivered yet,
    bool[blocks].
    """

    def __init__(self, path: Path, manifest: Manifest, sinks: Mapping[str, Sequence[Sink]]) -> None:
        self.layout, self._sinks, self._path = manifest.layout, sinks, path
        self.ranges = wanted_ranges(self.layout, sinks)
        self.wanted = wanted_blocks(self.layout, self.ranges)
        self._damaged: list[int] = []
        self._unreadable: str | None = None
        self._failed: str | None = None
        self._received = np.empty(0, np.uint8)
        self._blocks: Blocks | None = None
        try:
            self._blocks = Blocks(path, manifest)
        except Damaged as error:
            self._unreadable = error.message

    def spare_cache(self) -> None:
        """See `cached`."""
        if self._blocks is not None:
            spare_cache(self._blocks.source, self.layout)

    @property
    def good(self) -> bool:
        return not self._damaged and self._unreadable is None and self._failed is None

    def fetch(self, segments: Sequence[Segment]) -> Iterator[Found]:
        """Read these segments. After damage it goes on, so that all of it gets known; after an error no more come."""
        if self._blocks is None or self._unreadable is not None:
            return
        try:
            for found in self._blocks.ahead(segments):
                self._damaged += found.damaged
                yield found
        except (OSError, EOFError) as error:
            self._unreadable = f"{self._path / DATA} cannot be read: {error}"
        except Exception as error:
            self._fail(error)

    def take(self, lo: int, hi: int, receive: Callable[[Bytes], object]) -> None:
        """The file's bytes [lo, hi) from another rank, all that is wanted of their blocks: `receive` fills each parcel.

        One that is a part of a single tensor comes straight into its memory.
        """
        for begin, end in _parcels(self.layout, lo, hi):
            place = self._place(begin, end)
            data = self._room(end - begin) if place is None else place
            receive(data)
            if place is None:
                self._hand_on(begin, data)
        self._have(lo, hi)

    def deliver(self, lo: int, data: Bytes) -> None:
        """Hand the file's bytes from `lo` on to the sinks they belong to: all that these want of a block, and once."""
        self._hand_on(lo, data)
        self._have(lo, lo + len(data))

    def _have(self, lo: int, hi: int) -> None:
        first, last = ((at - self.layout.data_start) // self.layout.block for at in (lo, hi - 1))
        self.wanted[first : last + 1] = False

    def _hand_on(self, lo: int, data: Bytes) -> None:
        try:
            for piece in self.layout.pieces(lo, lo + len(data)):
                for sink in self._sinks.get(self.layout.leaves[piece.leaf].name, ()):
                    sink.write(piece.lo, data[piece.offset - lo : piece.offset - lo + piece.hi - piece.lo])
        except Exception as error:
            self._fail(error)

    def _place(self, lo: int, hi: int) -> Bytes | None:
        """The memory into which these bytes go, where they are all of one tensor and go nowhere else."""
        piece = next(self.layout.pieces(lo, hi))
        sinks = self._sinks.get(self.layout.leaves[piece.leaf].name, ())
        if piece.hi - piece.lo < hi - lo or len(sinks) != 1 or not isinstance(sinks[0], Buffer | Part):
            return None
        try:
            return sinks[0].own(piece.lo, piece.hi)
        except Exception as error:  # as where it is written to; the others wait for this rank to go on
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        self._failed = self._failed or f"{type(error).__name__}: {error}"

    def _room(self, size: int) -> Bytes:
        """Memory for what another rank sends."""
        if len(self._received) < size:
            self._received = np.empty(size, np.uint8)
        return self._received[:size]

    def verdict(self) -> dict[str, Any]:
        names = self._blocks.names(self._damaged) if self._blocks is not None else []
        if self._damaged and not names:
            names = ["the space between tensors"]
        return {"damaged": names[:1000], "unreadable": self._unreadable, "failed": self._failed}

    def close(self) -> None:
        if self._blocks is not None:
            self._blocks.close()


def _segments(needed: Mask, block: int, ranks: int) -> list[Segment]:
    """The needed blocks as runs [first, last): at most SEGMENT bytes each, and enough of them to share."""
    numbers = np.flatnonzero(needed)
    step = max(1, min(SEGMENT // block, -(-len(numbers) // ranks)))
    return [segment for first, last in _runs(numbers) for segment in cut(first, last, step)]


def _runs(numbers: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks) if len(run)]


def _gather_flags(mpi: Any, flag: bool) -> list[bool]:
    flags = np.empty(mpi.Get_size(), np.uint8)
    mpi.Allgather(np.array([flag], np.uint8), flags)
    return [bool(value) for value in flags]
