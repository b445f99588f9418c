"""What the numbers of a tensor are like, and how those of two checkpoints differ. Streaming: memory does not grow.

with open_checkpoint(path) as checkpoint:
    statistics(checkpoint, "model/fc.weight")
differences(open_checkpoint(a), open_checkpoint(b))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.checkpoint.comm import Json
from harness.checkpoint.reader import Checkpoint
from harness.checkpoint.schema import Leaf

Array = npt.NDArray[Any]
PIECE = 8 << 20


@dataclass(frozen=True)
class Statistics:
    """Of a tensor's numbers; of complex ones, of their absolute values. None where there is no number to tell of.

    `least`, `greatest` and `mean` leave out NaN; `nan` and `infinite` count.
    """

    least: float | int | None
    greatest: float | int | None
    mean: float | None
    nan: int
    infinite: int


@dataclass(frozen=True)
class Difference:
    """One tensor. `kind`: only in A, only in B, shape, dtype, values. `count` of elements, `most`: largest |a - b|."""

    name: str
    kind: str
    a: str | None = None
    b: str | None = None
    count: int | None = None
    most: float | None = None


def statistics(checkpoint: Checkpoint, name: str) -> Statistics:
    """Read a tensor in pieces. Raises InputMissing, Damaged."""
    leaf = checkpoint.metadata(name)
    least: Any = None
    greatest: Any = None
    total, numbers, nan, infinite = 0.0, 0, 0, 0
    with np.errstate(all="ignore"):  # a sum of large numbers may be infinite, and is told so
        for part in checkpoint.chunks(name, most=PIECE):
            values = _real(part, leaf.dtype)
            if values.dtype.kind == "f":
                missing = np.isnan(values)
                nan += int(missing.sum())
                infinite += int(np.isinf(values).sum())
                values = values[~missing]
            if len(values) == 0:
                continue
            low, high = values.min().item(), values.max().item()
            least = low if least is None else min(least, low)
            greatest = high if greatest is None else max(greatest, high)
            total += float(values.sum(dtype=np.float64))
            numbers += len(values)
    return Statistics(least, greatest, total / numbers if numbers else None, nan, infinite)


def differences(
    a: Checkpoint, b: Checkpoint, *, tolerance: float = 0.0, progress: Callable[[int, int], None] | None = None
) -> Iterator[Difference]:
    """The tensors that are not the same in both, by name. Two NaN are equal; elements within `tolerance` are, too.

    `progress` is called with (bytes compared so far, bytes in all). Raises Damaged.
    """
    names = sorted({*a.names(), *b.names()})
    there_a, there_b = set(a.names()), set(b.names())
    total = sum(a.metadata(name).nbytes for name in there_a & there_b)
    done = 0
    for name in names:
        if name not in there_a or name not in there_b:
            which = a if name in there_a else b
            leaf = which.metadata(name)
            text = f"{leaf.dtype}{list(leaf.shape)}"
            yield Difference(name, "only in A", a=text) if which is a else Difference(name, "only in B", b=text)
            continue
        one, other = a.metadata(name), b.metadata(name)
        if one.shape != other.shape:
            yield Difference(name, "shape", str(list(one.shape)), str(list(other.shape)))
        elif one.dtype != other.dtype:
            yield Difference(name, "dtype", one.dtype, other.dtype)
        else:
            count, most = _compare(a, b, name, one, tolerance)
            if count:
                yield Difference(name, "values", count=count, most=most)
        done += one.nbytes
        if progress is not None:
            progress(done, total)


def state_differences(a: Json, b: Json, path: str = "") -> Iterator[tuple[str, Json, Json]]:
    """(path, value in A, value in B) of what differs in two trees of JSON; what is missing is None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from state_differences(a.get(key), b.get(key), f"{path}/{key}" if path else str(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from state_differences(one, other, f"{path}/{index}")
    elif a != b or type(a) is not type(b):
        yield path, a, b


def _compare(a: Checkpoint, b: Checkpoint, name: str, leaf: Leaf, tolerance: float) -> tuple[int, float]:
    count, most = 0, 0.0
    step = max(1, PIECE // leaf.itemsize)
    elements = math.prod(leaf.shape)
    for lo in range(0, elements, step):
        hi = min(lo + step, elements)
        one, other = _whole(a, name, lo, hi), _whole(b, name, lo, hi)
        if np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            continue
        differ, largest = _apart(_decoded(one, leaf.dtype), _decoded(other, leaf.dtype), tolerance)
        count, most = count + differ, largest if math.isnan(largest) else max(most, largest)
    return count, most


def _apart(one: Array, other: Array, tolerance: float) -> tuple[int, float]:
    with np.errstate(all="ignore"):
        unequal = one != other
        if one.dtype.kind in "fc":
            unequal &= ~(np.isnan(one) & np.isnan(other))
        one, other = one[unequal], other[unequal]
        wide = np.complex128 if one.dtype.kind == "c" else np.float64
        # Of integers the larger minus the smaller, so that differences of unsigned ones are right.
        apart = np.abs(one.astype(wide) - other.astype(wide))
        if one.dtype.kind in "iu":
            apart = np.maximum(apart, 1.0)  # beyond 2**53 two numbers may look the same
        beyond = ~(apart <= tolerance)  # NaN on one side counts
        return int(beyond.sum()), float(apart[beyond].max()) if beyond.any() else 0.0


def _whole(checkpoint: Checkpoint, name: str, lo: int, hi: int) -> Array:
    parts = [part.copy() for part in checkpoint.chunks(name, lo, hi, most=PIECE)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _decoded(values: Array, dtype: str) -> Array:
    """Numbers also of dtypes that numpy lacks and `Checkpoint.read` gives as bytes."""
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (values.astype("<u2") << 8).view("<f2")
    return _E4M3[values] if dtype == "float8_e4m3fn" else values


def _real(values: Array, dtype: str) -> Array:
    values = _decoded(values, dtype)
    return np.abs(values) if values.dtype.kind == "c" else values


def _e4m3() -> Array:
    """The 256 values of float8_e4m3fn: bias 7, no infinity, NaN where all bits are set.

    OCP 8-bit Floating Point Specification (OFP8), 1.0, 2023.
    """
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[code & 127 == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3()
