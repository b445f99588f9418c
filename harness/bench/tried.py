"""Which settings of section `horovod` are worth a try for a model, beside those of its config. Pure.

Of buckets every fourth power of two, and one that takes all gradients: what lies between two of them differs by less
than two runs do. Not tried: `fusion`, as buckets are packed already, and `cycle_time`, which Horovod reads once, at its
start.

>>> [one.name for one in tried(Horovod(bucket=2**20), gradients=5_000_000)]
['bucket 4MiB', 'one bucket', 'compression fp16']
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.config import Horovod

BUCKETS = (2**20, 2**22, 2**24, 2**26, 2**28)
"""Bytes."""
CONFIGURED = "as configured"


@dataclass(frozen=True)
class Tried:
    """Changes to section `horovod`. `exact`: they leave the mathematics of a run as it is."""

    name: str
    changes: dict[str, Any]
    exact: bool = True


def tried(horovod: Horovod, gradients: int, *, sparse: bool = False) -> list[Tried]:
    """Settings that differ from the given ones in their effect.

    gradients: bytes of all of a model's. sparse: some of them are.
    """
    found = list(_buckets(horovod.bucket, gradients)) if horovod.op != "adasum" else []
    if sparse:
        dense = not horovod.sparse_as_dense
        found.append(Tried(f"sparse_as_dense {str(dense).lower()}", {"sparse_as_dense": dense}))
    other = "fp16" if horovod.compression == "none" else "none"
    return [*found, Tried(f"compression {other}", {"compression": other}, exact=False)]


def _buckets(own: int, gradients: int) -> Iterator[Tried]:
    for size in BUCKETS:
        if size < gradients and size != own:
            yield Tried(f"bucket {size >> 20}MiB", {"bucket": size})
    if own < gradients:
        yield Tried("one bucket", {"bucket": -(-gradients >> 20) << 20})
