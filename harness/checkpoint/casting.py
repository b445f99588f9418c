"""Bytes of one dtype into a live tensor of another, a piece at a time: at most one piece is held twice.

>>> import numpy as np
>>> live = np.zeros((2, 3), np.float64)
>>> cast = Cast(live, "float32", "model/w")
>>> cast.write(0, np.arange(6, dtype="<f4").view(np.uint8)[:14])       # in any pieces, also in the middle of an element
>>> cast.write(14, np.arange(6, dtype="<f4").view(np.uint8)[14:]); live.tolist()
[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from harness.checkpoint.schema import ITEMSIZE
from harness.checkpoint.shards import boxes
from harness.checkpoint.tensors import Bytes, dtype_of, is_torch, numpy_dtype

PIECE = 8 << 20
"""Bytes that are converted at a time."""


def can_cast(source: str, target: str) -> bool:
    """Whether a tensor may be converted: any float to any, an integer or bool to an integer that holds all its values.

    >>> can_cast("bfloat16", "float32"), can_cast("int32", "int64"), can_cast("int64", "int32")
    (True, True, False)
    """
    if source not in ITEMSIZE or target not in ITEMSIZE:
        return False
    if source == target:
        return True
    if "float" in source and "float" in target:
        return True
    low, high = _range(source), _range(target)
    return bool(low and high and high[0] <= low[0] and low[1] <= high[1] and target != "bool")


def _range(dtype: str) -> tuple[int, int] | None:
    """Smallest and largest value of an integer type."""
    if dtype == "bool":
        return 0, 1
    if "int" not in dtype:
        return None
    bits = 8 * ITEMSIZE[dtype]
    return (0, (1 << bits) - 1) if dtype.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


class Cast:
    """A sink for the bytes of a tensor of dtype `source` and of the live tensor's shape.

    `infinite` tells whether a finite value had no room in the live tensor's dtype.
    """

    def __init__(self, array: Any, source: str, name: str) -> None:
        self.name, self.infinite = name, False
        self._array = array.detach() if is_torch(array) else array
        self._source, self._item = source, ITEMSIZE[source]
        self._shape = tuple(int(length) for length in array.shape)
        self.nbytes = self._item * math.prod(self._shape)
        self._split: dict[int, tuple[Bytes, int]] = {}  # elements of which a part has come: their bytes, how many

    def write(self, lo: int, data: Bytes) -> None:
        """Bytes [lo, lo + len(data)) of the stored tensor. Each byte is written once."""
        hi = lo + len(data)
        first, last = -(-lo // self._item), hi // self._item
        if first > last:
            self._part(lo, data)  # all of it within one element
            return
        self._part(lo, data[: first * self._item - lo])
        step = PIECE // self._item
        for begin in range(first, last, step):
            end = min(begin + step, last)
            self._elements(begin, end, data[begin * self._item - lo : end * self._item - lo])
        self._part(last * self._item, data[last * self._item - lo :])

    def _part(self, lo: int, data: Bytes) -> None:
        if not len(data):
            return
        element, at = divmod(lo, self._item)
        whole, had = self._split.pop(element, (np.empty(self._item, np.uint8), 0))
        whole[at : at + len(data)] = data
        if had + len(data) == self._item:
            self._elements(element, element + 1, whole)
        else:
            self._split[element] = whole, had + len(data)

    def _elements(self, first: int, last: int, data: Bytes) -> None:
        if first == last:
            return
        if is_torch(self._array):
            self._into_torch(first, last, data)
        else:
            self._into_numpy(first, last, data)

    def _into_torch(self, first: int, last: int, data: Bytes) -> None:
        import torch

        values = torch.from_numpy(np.array(data)).view(getattr(torch, self._source))
        target = self._array.dtype
        if target.is_floating_point and torch.finfo(target).max < torch.finfo(values.dtype).max:
            converted = values.to(self._array.device).to(target)
            # float8_e4m3fn has no infinity: what is too large for it becomes not a number.
            finite = torch.isfinite(values.float() if self._item == 1 else values)
            self.infinite |= bool((finite.to(converted.device) & ~torch.isfinite(converted.float())).any())
            values = converted
        with torch.no_grad():
            for place, piece in self._places(first, last):
                self._array[place] = values[piece].reshape(self._array[place].shape)

    def _into_numpy(self, first: int, last: int, data: Bytes) -> None:
        if self._source == "bfloat16":
            values = (np.array(data).view("<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.array(data).view(numpy_dtype(self._source))
        with np.errstate(over="ignore", invalid="ignore"):
            converted = values.astype(self._array.dtype)
        if dtype_of(self._array).startswith("float"):
            self.infinite |= bool((np.isinf(converted) & np.isfinite(values)).any())
        for place, piece in self._places(first, last):
            self._array[place] = converted[piece].reshape(self._array[place].shape)

    def _places(self, first: int, last: int) -> list[tuple[tuple[slice, ...], slice]]:
        """Elements [first, last) as places in the live tensor, whatever its strides, and their part of the elements."""
        found, at = [], 0
        for start, count in boxes(self._shape, first, last):
            length = math.prod(count)
            found.append((tuple(slice(a, a + n) for a, n in zip(start, count, strict=True)), slice(at, at + length)))
            at += length
        return found
