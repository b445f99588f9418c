"""Python values as JSON, and back to exactly what they were; tensors in them become named leaves.

None, bool, int, float, str, list and dict with text keys are themselves. What JSON lacks is a dict with one key that
begins with `$`: `{"$tuple": [...]}`, `{"$float": "nan"}`, `{"$dict": [[key, value], ...]}` for other keys,
`{"$bytes": base64}`, `{"$tensor": ["torch", leaf name]}`, `{"$scalar": ["torch", "float32", 3.0]}`. Nothing else
passes, so reading creates no objects but these: that is the difference to a pickle.

>>> encode({"betas": (0.9, 0.999), "best": float("inf")}, "extra", {})
{'betas': {'$tuple': [0.9, 0.999]}, 'best': {'$float': 'inf'}}
>>> decode({"betas": {"$tuple": [0.9, 0.999]}}, None)
{'betas': (0.9, 0.999)}
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np

from harness.checkpoint.comm import Json
from harness.checkpoint.schema import ITEMSIZE, escape
from harness.checkpoint.tensors import dtype_of, is_tensor, is_torch
from harness.errors import DataError

MAX_DEPTH = 64
MAX_BYTES = 16 << 20

Make = Callable[[str, str], Any]
"""(leaf name, "torch" or "numpy") -> the tensor that the leaf's bytes will be written to."""


def encode(value: object, path: str, leaves: MutableMapping[str, Any], depth: int = 0) -> Json:
    """JSON of a value. Tensors are added to `leaves`, named by their path. Raises DataError for what cannot be stored.

    Single numbers (0-dimensional tensors of a real dtype) are stored as numbers, not as leaves.
    """
    if depth > MAX_DEPTH:
        raise DataError(f"{path[:200]} is nested deeper than {MAX_DEPTH} levels")
    if is_tensor(value):
        return _encode_tensor(value, path, leaves)
    if isinstance(value, np.generic):
        return scalar("numpy-scalar", value.dtype.name, value.item(), path)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return _number(value, path)
    if isinstance(value, (bytes, bytearray)):
        if len(value) > MAX_BYTES:
            raise DataError(f"{path} has {len(value)} bytes; store more than {MAX_BYTES} as an array")
        return {"$bytes": base64.b64encode(value).decode()}

    def inner(key: object, item: object) -> Json:
        return encode(item, f"{path}/{escape(str(key))}", leaves, depth + 1)

    if isinstance(value, (list, tuple)):
        items = [inner(index, item) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Counter):
        return {"$counter": [[_key(key, path), count] for key, count in value.items()]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: inner(key, item) for key, item in value.items()}
        return {"$dict": [[_key(key, path), inner(key, item)] for key, item in value.items()]}
    raise DataError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold",
        hint="it takes numbers, text, bytes, None, lists, tuples, dicts, numpy arrays and torch tensors",
    )


def decode(value: Json, make: Make | None) -> Any:
    """The value behind JSON from `encode`; `make` provides the tensors. Raises DataError for anything unexpected."""
    try:
        return _decode(value, make, 0)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError, binascii.Error) as error:
        raise DataError(f"a value of the checkpoint cannot be understood: {error}") from error


def _decode(value: Any, make: Make | None, depth: int) -> Any:
    if depth > 4 * MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, list):
        return [_decode(item, make, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decode(item, make, depth + 1) for key, item in value.items()}
    if len(value) != 1:
        raise ValueError(f"{tag} stands beside other keys")
    content = value[tag]
    if tag == "$tuple":
        return tuple(_decode(item, make, depth + 1) for item in content)
    if tag == "$dict":
        return {_decode(key, None, depth + 1): _decode(item, make, depth + 1) for key, item in content}
    if tag == "$counter":
        return Counter({_decode(key, None, depth + 1): int(count) for key, count in content})
    if tag == "$float":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
    if tag == "$bytes":
        return base64.b64decode(content, validate=True)
    if tag == "$scalar":
        return _scalar(*content)
    if tag == "$tensor" and make is not None:
        kind, name = content
        return make(name, kind)
    if tag == "$sparse":
        return _sparse(content, make, depth)
    raise ValueError(f"{tag} is unknown")


def _encode_tensor(value: Any, path: str, leaves: MutableMapping[str, Any]) -> Json:
    kind = "torch" if is_torch(value) else "numpy"
    if kind == "torch" and value.is_sparse:
        parts = {"indices": value._indices(), "values": value._values()}
        return {
            "$sparse": {
                "shape": list(value.shape),
                "coalesced": value.is_coalesced(),
                **{key: _encode_tensor(part, f"{path}/{key}", leaves) for key, part in parts.items()},
            }
        }
    dtype = dtype_of(value)
    if value.ndim == 0 and dtype in ITEMSIZE and not dtype.startswith(("complex", "float8")):
        return scalar(kind, dtype, value.item(), path)
    leaves[path] = value
    return {"$tensor": [kind, path]}


def scalar(kind: str, dtype: str, value: Any, path: str) -> Json:
    """JSON of a single number of a dtype; kind: "torch", "numpy" (0-dimensional arrays) or "numpy-scalar"."""
    return {"$scalar": [kind, dtype, _number(value, path)]}


def _number(value: Any, path: str) -> Json:
    if isinstance(value, complex):
        raise DataError(f"{path} is a complex number; store it as an array")
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if abs(value) >= 1 << 4096:
        raise DataError(f"{path} is an integer of more than 4096 bits")
    return int(value)


def _key(key: object, path: str) -> Json:
    if key is None or isinstance(key, (bool, int, float, str)):
        return encode(key, path, {})
    if isinstance(key, tuple):
        return {"$tuple": [_key(part, path) for part in key]}
    raise DataError(f"{path} is a dict with the key {key!r}; a checkpoint takes text, numbers and tuples of them")


def _scalar(kind: str, dtype: str, number: Json) -> Any:
    if dtype not in ITEMSIZE:
        raise ValueError(f"the dtype {dtype} is unknown")
    value = _decode(number, None, 0)
    if not isinstance(value, (bool, int, float)):
        raise ValueError("a scalar is not a number")
    if kind == "torch":
        import torch

        return torch.tensor(value, dtype=getattr(torch, dtype))
    scalar = np.dtype(dtype).type(value)
    return scalar if kind == "numpy-scalar" else np.array(scalar)


def _sparse(content: dict[str, Any], make: Make | None, depth: int) -> Any:
    import torch

    indices, values = (_decode(content[key], make, depth + 1) for key in ("indices", "values"))
    return PendingSparse(torch.Size(content["shape"]), indices, values, bool(content["coalesced"]))


class PendingSparse:
    """A sparse tensor whose parts have not been read yet: making one looks at the indices."""

    def __init__(self, shape: Any, indices: Any, values: Any, coalesced: bool) -> None:
        self.shape, self.indices, self.values, self.coalesced = shape, indices, values, coalesced

    def make(self) -> Any:
        import torch

        return torch.sparse_coo_tensor(
            self.indices, self.values, self.shape, is_coalesced=self.coalesced, check_invariants=True
        )


def complete(value: Any) -> Any:
    """The decoded value once all leaves have been read: sparse tensors are made. Lists and dicts change in place."""
    if isinstance(value, PendingSparse):
        return value.make()
    if isinstance(value, dict):
        for key in value:
            value[key] = complete(value[key])
    elif isinstance(value, list):
        value[:] = [complete(item) for item in value]
    elif isinstance(value, tuple):
        return tuple(complete(item) for item in value)
    return value
