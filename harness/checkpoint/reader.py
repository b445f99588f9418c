"""Reading: one tensor or part of it, by anybody; a whole state, by all ranks of a job together.

    with open_checkpoint("runs/exp7/checkpoints/step-00001200") as checkpoint:
        checkpoint.names()
        checkpoint.read("model/fc.weight", rows=slice(0, 16))      # numpy; neither torch, nor MPI, nor HDF5

Every block that is read is checked against its digest. Nothing but the manifest decides what is read from where, and
only `data.h5` beside it is read: links in the HDF5 file lead nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from harness.checkpoint.cached import Read, all_read
from harness.checkpoint.comm import Comm
from harness.checkpoint.commit import DATA
from harness.checkpoint.digest import block_digests
from harness.checkpoint.file import read_all
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.schema import Leaf
from harness.checkpoint.store import Damaged, check, open_data, read_table
from harness.checkpoint.tensors import Bytes
from harness.checkpoint.wanted import Sink, gather_wanted, wanted_blocks
from harness.errors import InputMissing, InternalError, UsageError

Array: TypeAlias = "npt.NDArray[Any]"
SEGMENT = 32 << 20
"""Bytes that are read, checked and sent to the other ranks at a time."""
_NAMED = 20


class Blocks:
    """The data file of a checkpoint, read in whole blocks that are checked. Raises Damaged when opened."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.layout = manifest.layout
        self.descriptor = open_data(path, manifest)
        try:
            self._table = read_table(self.descriptor, path, manifest)
        except BaseException:
            self.close()
            raise

    def read(self, first: int, last: int, buffer: Bytes) -> list[int]:
        """Fill the buffer with blocks [first, last). Returns the numbers of damaged ones. Raises OSError, EOFError."""
        lo, _ = self.layout.block_range(first)
        read_all(self.descriptor, buffer, lo)
        found = np.array(block_digests(buffer, self.layout.block), np.uint64)
        damaged: list[int] = (first + np.flatnonzero(found != self._table[first:last])).tolist()
        return damaged

    def names(self, blocks: Sequence[int]) -> list[str]:
        """Names of the tensors that have bytes in these blocks."""
        pieces = (piece for block in blocks for piece in self.layout.pieces(*self.layout.block_range(block)))
        return list(dict.fromkeys(self.layout.leaves[piece.leaf].name for piece in pieces))

    def close(self) -> None:
        os.close(self.descriptor)


class Checkpoint:
    """An open checkpoint; see `open_checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest, _ = check(path)
        self._blocks = Blocks(path, self.manifest)
        self._index = {leaf.name: index for index, leaf in enumerate(self.manifest.layout.leaves)}

    def names(self) -> list[str]:
        """Names of all tensors, second names included, sorted."""
        return sorted([*self._index, *self.manifest.aliases])

    def metadata(self, name: str) -> Leaf:
        """Name, dtype, shape and placement of a tensor. Raises InputMissing."""
        return self.manifest.layout.leaves[self._find(name)]

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """A tensor, or `rows` of its first dimension (without a step), as a new array. Raises InputMissing, Damaged.

        numpy has neither bfloat16 nor complex32 nor float8: bfloat16 is widened to float32, without loss; complex32 to
        complex64; a float8 comes as its bytes, uint8.
        """
        index = self._find(name)
        leaf = self.manifest.layout.leaves[index]
        start, stop = 0, leaf.nbytes
        shape = leaf.shape
        if rows is not None:
            if not shape or rows.step not in (None, 1):
                raise UsageError(f"{leaf} has no such rows: {rows}")
            first, last, _ = rows.indices(shape[0])
            shape = (max(0, last - first), *shape[1:])
            row = leaf.nbytes // leaf.shape[0] if leaf.shape[0] else 0
            start, stop = first * row, max(first, last) * row
        data = np.empty(stop - start, np.uint8)
        for at, part in self._parts(index, start, stop, SEGMENT):
            data[at - start : at - start + len(part)] = part
        return _as_numpy(data, leaf.dtype).reshape(shape)

    def chunks(self, name: str, lo: int = 0, hi: int | None = None, *, most: int = 8 << 20) -> Iterator[Array]:
        """Elements [lo, hi) of a tensor in row-major order, flat, in arrays of at most about `most` bytes.

        dtypes as `read`; an array is good until the next one is asked for. Raises InputMissing, Damaged.
        """
        index = self._find(name)
        leaf = self.manifest.layout.leaves[index]
        size = leaf.itemsize
        for _, part in self._parts(index, lo * size, leaf.nbytes if hi is None else hi * size, most):
            yield _as_numpy(part, leaf.dtype)

    def verify(self) -> list[str]:
        """Read everything. Returns the names of damaged tensors. Raises Damaged where the file cannot be read."""
        layout = self.manifest.layout
        damaged: list[int] = []
        for first, last in self._cut(layout.data_start, layout.data_end):
            lo, hi = layout.block_range(first)[0], layout.block_range(last - 1)[1]
            damaged += self._read(first, last, np.empty(hi - lo, np.uint8))
        names = self._blocks.names(damaged)
        return names if names or not damaged else ["the space between tensors"]

    def close(self) -> None:
        self._blocks.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, name: str) -> int:
        name = name.removeprefix("/")
        index = self._index.get(self.manifest.aliases.get(name, name))
        if index is None:
            raise InputMissing(f"the checkpoint {self.path} holds no {name!r}")
        return index

    def _parts(self, index: int, start: int, stop: int, most: int) -> Iterator[tuple[int, Bytes]]:
        """Bytes [start, stop) of a leaf, checked, in parts (position in the leaf, bytes). Raises Damaged."""
        layout = self.manifest.layout
        base = int(layout.starts[index])
        buffer = np.empty(0, np.uint8)
        for first, last in self._cut(base + start, base + stop, most):
            lo, hi = layout.block_range(first)[0], layout.block_range(last - 1)[1]
            if len(buffer) < hi - lo:
                buffer = np.empty(hi - lo, np.uint8)
            if self._read(first, last, buffer[: hi - lo]):
                raise Damaged(f"{self.path / DATA}: {layout.leaves[index].name} is damaged", proven=True)
            begin, end = max(lo, base + start), min(hi, base + stop)
            yield begin - base, buffer[begin - lo : end - lo]

    def _cut(self, lo: int, hi: int, most: int = SEGMENT) -> Iterator[tuple[int, int]]:
        """File bytes [lo, hi) as runs of blocks of at most a segment."""
        layout = self.manifest.layout
        first, last = (lo - layout.data_start) // layout.block, -(-(hi - layout.data_start) // layout.block)
        step = max(1, most // layout.block)
        for block in range(first, last, step) if hi > lo else ():
            yield block, min(block + step, last)

    def _read(self, first: int, last: int, buffer: Bytes) -> list[int]:
        try:
            return self._blocks.read(first, last, buffer)
        except (OSError, EOFError) as error:
            raise Damaged(f"{self.path / DATA} cannot be read: {error}") from error


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open one checkpoint (a `step-...` directory) for reading. Raises InputMissing, Damaged, NewerVersion."""
    return Checkpoint(Path(path))


def load(
    path: Path, manifest: Manifest, sinks: Mapping[str, Sequence[Sink]], comm: Comm, *, read: Read = "auto"
) -> None:
    """Fill the sinks, by leaf name, from a checkpoint. Collective; ranks may have different sinks.

    With MPI, what several ranks want (`gather_wanted`) is read and checked by them in shares and exchanged, so that
    each byte leaves the file system once; without, or where `cached.all_read` finds that faster (`read`: "auto", else
    "exchange" or "all"), every rank reads what it wants. Raises Damaged, on all ranks alike,
    naming the damaged tensors; the sinks may then be partly filled.
    """
    reading = _Reading(path, manifest, sinks)
    try:
        if not all_read(read, reading.descriptor, manifest.layout.data_start, manifest.layout.data_end, comm):
            for ranks, blocks in gather_wanted(manifest.layout, sinks, comm):
                _read_together(reading, blocks, ranks, comm.mpi)
        for segment in _segments(reading.wanted, manifest.layout.block, 1):
            reading.fetch(*segment)
            if reading.good:
                reading.deliver(*segment, reading.buffer(*segment))
        verdicts: list[Any] = comm.all_gather(reading.verdict())
    finally:
        reading.close()
    failed = next((verdict["failed"] for verdict in verdicts if verdict["failed"]), None)
    if failed:
        raise InternalError(f"the checkpoint {path} could not be restored: {failed}")
    damaged = list(dict.fromkeys(name for verdict in verdicts for name in verdict["damaged"]))
    unreadable = next((verdict["unreadable"] for verdict in verdicts if verdict["unreadable"]), None)
    if damaged:
        shown = ", ".join(damaged[:_NAMED]) + (f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else "")
        raise Damaged(f"{path / DATA}: damaged: {shown}", proven=True)
    if unreadable:
        raise Damaged(unreadable)


def _read_together(reading: _Reading, blocks: npt.NDArray[np.bool_], ranks: Sequence[int], world: Any) -> None:
    """Some ranks read the blocks that all of them want: each a share, which it sends to the others."""
    some = len(ranks) < world.Get_size()
    mpi = world.Create_group(world.Get_group().Incl(ranks)) if some else world
    size, rank = mpi.Get_size(), mpi.Get_rank()
    segments = _segments(blocks, reading.layout.block, size)
    for start in range(0, len(segments), size):
        together = segments[start : start + size]
        if rank < len(together):
            reading.fetch(*together[rank])
        if all(_gather_flags(mpi, reading.good)):
            for owner, segment in enumerate(together):
                buffer = reading.buffer(*segment, received=owner != rank)
                mpi.Bcast(buffer, root=owner)
                reading.deliver(*segment, buffer)
    if some:
        mpi.Free()


class _Reading:
    """One rank's part of `load`. Errors are kept until all ranks can hear of them.

    `wanted`: the blocks with bytes for the sinks that have not been delivered yet, bool[blocks].
    """

    def __init__(self, path: Path, manifest: Manifest, sinks: Mapping[str, Sequence[Sink]]) -> None:
        self.layout, self._sinks, self._path = manifest.layout, sinks, path
        self.wanted = wanted_blocks(self.layout, sinks)
        self._damaged: list[int] = []
        self._unreadable: str | None = None
        self._failed: str | None = None
        self._own = self._others = np.empty(0, np.uint8)
        self._blocks: Blocks | None = None
        try:
            self._blocks = Blocks(path, manifest)
        except Damaged as error:
            self._unreadable = error.message

    @property
    def descriptor(self) -> int | None:
        """The open file, None where it could not be opened."""
        return None if self._blocks is None else self._blocks.descriptor

    @property
    def good(self) -> bool:
        return not self._damaged and self._unreadable is None and self._failed is None

    def fetch(self, first: int, last: int) -> None:
        """Read blocks [first, last) into this rank's buffer. After damage it goes on, so that all of it gets known."""
        if self._blocks is None or self._unreadable is not None:
            return
        try:
            self._damaged += self._blocks.read(first, last, self.buffer(first, last))
        except (OSError, EOFError) as error:
            self._unreadable = f"{self._path / DATA} cannot be read: {error}"

    def buffer(self, first: int, last: int, received: bool = False) -> Bytes:
        """Memory for these blocks: of what this rank read, or of what it received."""
        size = self.layout.block_range(last - 1)[1] - self.layout.block_range(first)[0]
        if received:
            if len(self._others) < size:
                self._others = np.empty(size, np.uint8)
            return self._others[:size]
        if len(self._own) < size:
            self._own = np.empty(size, np.uint8)
        return self._own[:size]

    def deliver(self, first: int, last: int, data: Bytes) -> None:
        """Hand the blocks' bytes to the sinks they belong to, each block once."""
        base = self.layout.block_range(first)[0]
        try:
            for begin, end in _runs(first + np.flatnonzero(self.wanted[first:last])):
                lo, hi = self.layout.block_range(begin)[0], self.layout.block_range(end - 1)[1]
                for piece in self.layout.pieces(lo, hi):
                    for sink in self._sinks.get(self.layout.leaves[piece.leaf].name, ()):
                        sink.write(piece.lo, data[piece.offset - base : piece.offset - base + piece.hi - piece.lo])
        except Exception as error:
            self._failed = self._failed or f"{type(error).__name__}: {error}"
        self.wanted[first:last] = False

    def verdict(self) -> dict[str, Any]:
        names = self._blocks.names(self._damaged) if self._blocks is not None else []
        if self._damaged and not names:
            names = ["the space between tensors"]
        return {"damaged": names[:1000], "unreadable": self._unreadable, "failed": self._failed}

    def close(self) -> None:
        if self._blocks is not None:
            self._blocks.close()


def _segments(needed: npt.NDArray[np.bool_], block: int, ranks: int) -> list[tuple[int, int]]:
    """The needed blocks as runs [first, last): at most SEGMENT bytes each, and enough of them to share."""
    numbers = np.flatnonzero(needed)
    step = max(1, min(SEGMENT // block, -(-len(numbers) // ranks)))
    return [(at, min(at + step, last)) for first, last in _runs(numbers) for at in range(first, last, step)]


def _runs(numbers: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks) if len(run)]


def _gather_flags(mpi: Any, flag: bool) -> list[bool]:
    flags = np.empty(mpi.Get_size(), np.uint8)
    mpi.Allgather(np.array([flag], np.uint8), flags)
    return [bool(value) for value in flags]


def _as_numpy(data: Bytes, dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype == "complex32":
        return data.view("<f2").astype("<f4").view("<c8")
    return data.view(np.uint8 if dtype.startswith("float8") else np.dtype(dtype))
