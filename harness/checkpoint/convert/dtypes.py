"""Other dtypes for tensors that pass through: what a user asks for, and the next wider one where a format has none.

Floats only. To a narrower one they are rounded to the nearest, ties to even, as torch does it; what is too large
becomes infinite, and that is told. Integers, bools and complex numbers stay what they are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.checkpoint.convert.tensor import Tensor
from harness.checkpoint.schema import ITEMSIZE
from harness.checkpoint.tensors import Bytes
from harness.errors import DataError, UsageError

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What a user may ask for."""
WIDER = {"bfloat16": "float32", "float8_e4m3fn": "float32", "float8_e5m2": "float32", "complex32": "complex64"}
"""The next dtype that numpy has. Every value is kept."""
_FLOATS = {"float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64"}

Array = npt.NDArray[Any]


def wanted(dtype: str | None) -> str | None:
    """The dtype behind its short name. Raises UsageError."""
    if dtype is None or dtype in SHORT.values():
        return dtype
    if dtype not in SHORT:
        raise UsageError(f"there is no dtype {dtype!r} to convert to", hint=f"use one of {', '.join(SHORT)}")
    return SHORT[dtype]


def fitted(
    tensors: Collection[Tensor], dtype: str | None, known: Collection[str], target: str, notes: list[str]
) -> list[Tensor]:
    """The tensors in dtypes that the target has (`known`): floats as `dtype`, where one is given.

    What was widened for the target's sake is added to `notes` now; what became infinite, while the tensors are read.
    Raises DataError where a tensor cannot be stored.
    """
    result = []
    widened: dict[tuple[str, str], int] = {}
    for tensor in tensors:
        chosen = dtype if dtype is not None and tensor.dtype in _FLOATS else tensor.dtype
        if chosen not in known:
            wide = WIDER.get(chosen, "")
            if wide not in known:
                raise DataError(
                    f"{target} has no {chosen}, which {tensor.name} is", hint="leave it out, or use another format"
                )
            widened[chosen, wide] = widened.get((chosen, wide), 0) + 1
            chosen = wide
        result.append(as_dtype(tensor, chosen, notes))
    for (narrow, wide), count in widened.items():
        these = "1 tensor is" if count == 1 else f"{count} tensors are"
        notes.append(f"{target} has no {narrow}: {these} stored as {wide}, every value as it was")
    return result


def as_dtype(tensor: Tensor, dtype: str, notes: list[str]) -> Tensor:
    """The same tensor, converted as it is read."""
    if dtype == tensor.dtype:
        return tensor
    here, there = tensor.itemsize, ITEMSIZE[dtype]
    told = False

    def read(lo: int, hi: int) -> Bytes:
        nonlocal told
        data, overflow = convert(tensor.read(lo // there * here, hi // there * here), tensor.dtype, dtype)
        if overflow and not told:
            told = True
            notes.append(f"some values of {tensor.name} are too large for {dtype} and became infinite")
        return data

    return replace(tensor, dtype=dtype, read=read)


def convert(data: Bytes, source: str, target: str) -> tuple[Bytes, bool]:
    """Elements of one dtype as those of another: (bytes, whether a finite value became infinite)."""
    if (source, target) == ("complex32", "complex64"):
        return data.view("<f2").astype("<f4").view(np.uint8), False
    values = _numbers(data, source)
    if target == "bfloat16":
        values = values.astype("<f4", copy=False) if values.dtype.itemsize <= 4 else _narrow(values, "<f4")
        made = _bfloat16(values)
        finite = (made & 0x7F80) != 0x7F80
    else:
        made = _narrow(values, np.dtype(target).newbyteorder("<"))
        finite = np.isfinite(made)
    overflow = bool(np.any(np.isfinite(values) & ~finite)) if ITEMSIZE[target] <= 4 else False
    return made.view(np.uint8), overflow


def _narrow(values: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype)


def _numbers(data: Bytes, dtype: str) -> Array:
    """The values in a dtype of numpy that has them all."""
    if dtype == "bfloat16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype.startswith("float8"):
        return _TABLES[dtype][data]
    return data.view(np.dtype(dtype).newbyteorder("<"))


def _bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """The upper half of float32, rounded to nearest, ties to even."""
    bits = values.view("<u4")
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16  # wraps for NaN only
    quiet = (bits >> 16) | 0x0040
    made: npt.NDArray[np.uint16] = np.where(np.isnan(values), quiet, rounded).astype("<u2")
    return made


def _float8(exponent: int, mantissa: int, infinities: bool) -> npt.NDArray[np.float32]:
    """All 256 values of an 8-bit float. `infinities`: whether the largest exponent means infinity and NaN (IEEE)."""
    bias = (1 << (exponent - 1)) - 1
    table = np.zeros(256, np.float32)
    for code in range(256):
        power, fraction = (code >> mantissa) & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
        if power == (1 << exponent) - 1 and infinities:
            value = float("nan") if fraction else float("inf")
        elif power == (1 << exponent) - 1 and fraction == (1 << mantissa) - 1:
            value = float("nan")
        elif power == 0:
            value = fraction * 2.0 ** (1 - bias - mantissa)
        else:
            value = (1 + fraction / (1 << mantissa)) * 2.0 ** (power - bias)
        table[code] = -value if code & 0x80 else value
    return table


_TABLES = {"float8_e4m3fn": _float8(4, 3, False), "float8_e5m2": _float8(5, 2, True)}
