"""Reading: one tensor or part of it, by anybody. `delivery` reads a whole state, by all ranks of a job together.

    with open_checkpoint("runs/exp7/checkpoints/step-00001200") as checkpoint:
        checkpoint.names()
        checkpoint.read("model/fc.weight", rows=slice(0, 16))      # numpy; neither torch, nor MPI, nor HDF5

Every block that is read is checked against its digest. Nothing but the manifest decides what is read from where, and
only `data.h5` beside it is read: links in the HDF5 file lead nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from harness.checkpoint.blocks import SEGMENT, Blocks, Segment, cut
from harness.checkpoint.commit import DATA
from harness.checkpoint.schema import Leaf
from harness.checkpoint.store import Damaged, check
from harness.checkpoint.tensors import Bytes
from harness.errors import InputMissing, UsageError

Array: TypeAlias = "npt.NDArray[Any]"


class Checkpoint:
    """An open checkpoint; see `open_checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = check(path)
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
            if not isinstance(rows, slice) or not shape or rows.step not in (None, 1):
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
            lo, hi = layout.span(first, last)
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
            lo, hi = layout.span(first, last)
            if len(buffer) < hi - lo:
                buffer = np.empty(hi - lo, np.uint8)
            if self._read(first, last, buffer[: hi - lo]):
                raise Damaged(f"{self.path / DATA}: {layout.leaves[index].name} is damaged", proven=True)
            begin, end = max(lo, base + start), min(hi, base + stop)
            yield begin - base, buffer[begin - lo : end - lo]

    def _cut(self, lo: int, hi: int, most: int = SEGMENT) -> Iterator[Segment]:
        """File bytes [lo, hi) as runs of blocks of at most a segment."""
        layout = self.manifest.layout
        first, last = (lo - layout.data_start) // layout.block, -(-(hi - layout.data_start) // layout.block)
        return cut(first, last, max(1, most // layout.block)) if hi > lo else iter(())

    def _read(self, first: int, last: int, buffer: Bytes) -> list[int]:
        try:
            return self._blocks.read(first, last, buffer)
        except (OSError, EOFError) as error:
            raise Damaged(f"{self.path / DATA} cannot be read: {error}") from error


def open_checkpoint(path: str | os.PathLike[str] | None) -> Checkpoint:
    """Open one checkpoint (a `step-...` directory) for reading. Raises InputMissing, Damaged, NewerVersion."""
    if path is None:  # of `latest`
        raise InputMissing("there is no checkpoint to open")
    return Checkpoint(Path(path))


def _as_numpy(data: Bytes, dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype == "complex32":
        return data.view("<f2").astype("<f4").view("<c8")
    return data.view(np.uint8 if dtype.startswith("float8") else np.dtype(dtype))
