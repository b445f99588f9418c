"""What the tensors of a benchmark hold: numbers that do not compress, other ones in each round, known by a digest.

    fill(tensors, seed=1)           # the same on all ranks
    change(tensors)                 # as a training step does: no page of memory stays as it was
    before = digest(tensors)
    wipe(tensors); restore(); assert digest(tensors) == before

A file system that stores equal bytes once, or compresses, would else look faster than it is in a training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash

Tensors: TypeAlias = "Sequence[torch.Tensor]"
_STRIDE = 1024
"""Every so many of the 4-byte numbers is changed: one on each page."""


def fill(tensors: Tensors, seed: int) -> None:
    """Random float32 in [0, 1), the same for the same seed and shapes. Tensors are contiguous float32 on the CPU."""
    generator = np.random.Generator(np.random.SFC64(seed))
    for array in _flat(tensors):
        generator.random(dtype=np.float32, out=array)


def change(tensors: Tensors) -> None:
    """Another number on each page, by the smallest step that there is; the same on all ranks."""
    for array in _flat(tensors):
        array.view(np.int32)[::_STRIDE] += 1


def wipe(tensors: Tensors) -> None:
    """All zeros."""
    for array in _flat(tensors):
        array[:] = 0


def digest(tensors: Tensors) -> str:
    """32 hex digits that stand for all bytes, in order (XXH3-128)."""
    found = xxhash.xxh3_128()
    for array in _flat(tensors):
        found.update(array.view(np.uint8).data)
    return str(found.hexdigest())


def _flat(tensors: Tensors) -> Iterable[npt.NDArray[Any]]:
    for tensor in tensors:
        if tensor.numel():
            yield tensor.detach().view(-1).numpy()
