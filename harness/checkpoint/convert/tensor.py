"""A tensor on its way from one file to another: its name, its form, and how to get at its bytes, part by part.

Nothing here knows a format. A reader of a format makes a `Source`, a writer of a format takes its tensors:

    for data in pieces(tensor):
        file.write(data)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from harness.checkpoint.schema import ITEMSIZE, MAX_BYTES, MAX_DIMENSIONS
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError

PIECE = 8 << 20
"""Bytes that are read at a time, whatever the tensor's size; conversions hold a few times as much for a moment."""

Read = Callable[[int, int], Bytes]
Wanted = Callable[[str], bool]
"""Whether a tensor of that name is wanted; the others need not be of a kind that can be read."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Tensor:
    """`dtype` is a key of `schema.ITEMSIZE`.

    `read(lo, hi)` gives bytes [lo, hi) of the elements in row-major order, little-endian, whole elements only. They are
    valid until the next call. It raises DataError, StorageError.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Read

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


@dataclass
class Source:
    """What a file holds. `aliases`: second names of tensors. `notes`: sentences for the user.

    A context manager: the tensors can be read until it ends.
    """

    tensors: list[Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def pieces(tensor: Tensor) -> Iterator[Bytes]:
    """The bytes of a tensor in order, at most PIECE at a time."""
    for lo in range(0, tensor.nbytes, PIECE):
        yield tensor.read(lo, min(lo + PIECE, tensor.nbytes))


def expanded(tensors: Iterable[Tensor], aliases: dict[str, str]) -> list[Tensor]:
    """The tensors with each second name as a tensor of its own: for formats that know no second names."""
    by_name = {tensor.name: tensor for tensor in tensors}
    return [*by_name.values(), *(replace(by_name[target], name=name) for name, target in aliases.items())]


def counted(tensors: Iterable[Tensor], progress: Progress, total: int) -> list[Tensor]:
    """The same tensors; reading them reports how far it has come."""
    done = 0

    def count(read: Read) -> Read:
        def counting(lo: int, hi: int) -> Bytes:
            nonlocal done
            data = read(lo, hi)
            done += len(data)
            progress(done, total)
            return data

        return counting

    return [replace(tensor, read=count(tensor.read)) for tensor in tensors]


def checked_shape(name: str, shape: object) -> tuple[int, ...]:
    """The shape that a foreign file gives for a tensor. Raises DataError where no tensor has it."""
    if not isinstance(shape, (list, tuple)) or any(type(length) is not int or length < 0 for length in shape):
        raise DataError(f"{name[:200]!r} has a shape that is none: {str(shape)[:100]}")
    if len(shape) > MAX_DIMENSIONS:
        raise DataError(f"{name[:200]!r} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    # The product with empty dimensions left out: what numpy and torch work with must not overflow either.
    size = 1
    for length in shape:
        size *= max(1, length)
        if size > MAX_BYTES:
            raise DataError(f"{name[:200]!r} has an impossible size: {list(shape)}")
    return tuple(shape)
