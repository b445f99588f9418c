"""What saving would mean for each rank, worked out without any rank: bytes, file ranges, balance, cost of planning.

    forecast(sample_leaves(100_000), ranks=10_000, rank=17).seconds_cold

Nothing is read or written; the planning that is timed here is the one that a save does.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass

from harness.checkpoint.cost import Cost, cost
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.plan import make_plan
from harness.checkpoint.schema import Leaf, check_schema, schema_hash

LOOKED_AT = 64
"""Ranks whose bytes are compared for the balance, where there are more."""


@dataclass(frozen=True)
class Forecast:
    """For one `rank` of `ranks`: `ranges` are file bytes [lo, hi), `bytes` their sum.

    `least`, `most`, `mean`: bytes of the `looked_at` ranks. `seconds_cold`: from names and shapes to this rank's
    ranges; `seconds_warm`: again for a state of the same shape; `memory`: most bytes of memory in the cold case.
    `cost`: what a save asks of the file system and of the network.
    """

    ranks: int
    rank: int
    tensors: int
    file_bytes: int
    block: int
    bytes: int
    ranges: tuple[tuple[int, int], ...]
    least: int
    most: int
    mean: float
    looked_at: int
    seconds_cold: float
    seconds_warm: float
    memory: int
    cost: Cost


def forecast(leaves: Sequence[Leaf], *, ranks: int, rank: int = 0) -> Forecast:
    """Plan a save of these tensors, as if every rank held all of them.

    Where they are sharded, who holds what would shift some blocks, and knowing it takes the ranks themselves. Raises
    DataError where they cannot be saved, ValueError for an impossible rank.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of {ranks} ranks, which count from 0")
    began = time.perf_counter()
    layout = _plan(leaves, ranks, rank)
    cold = time.perf_counter() - began
    began = time.perf_counter()
    make_plan(layout, rank=rank, size=ranks)
    warm = time.perf_counter() - began
    looked_at = range(ranks) if ranks <= LOOKED_AT else [ranks * i // LOOKED_AT for i in range(LOOKED_AT)]
    sizes = [sum(hi - lo for lo, hi in _ranges(layout, ranks, one)) for one in looked_at]
    ranges = _ranges(layout, ranks, rank)
    return Forecast(
        ranks=ranks,
        rank=rank,
        tensors=len(leaves),
        file_bytes=layout.data_end,
        block=layout.block,
        bytes=sum(hi - lo for lo, hi in ranges),
        ranges=tuple(ranges),
        least=min(sizes),
        most=max(sizes),
        mean=(layout.data_end - layout.data_start) / ranks,
        looked_at=len(sizes),
        seconds_cold=cold,
        seconds_warm=warm,
        memory=_memory(leaves, ranks, rank),
        cost=cost(layout, rank=rank, size=ranks),
    )


def sample_leaves(count: int) -> list[Leaf]:
    """Tensors such as a transformer of many layers has: a few large ones, many small ones. Sizes are made up."""
    shapes = ((1024, 1024), (1024,), (4096, 1024), (4096,), (1024, 4096), (1024,))
    names = ("attention.weight", "attention.bias", "up.weight", "up.bias", "down.weight", "down.bias")
    return [
        Leaf(f"model/layers.{index // len(names)}.{names[index % len(names)]}", "float32", shapes[index % len(names)])
        for index in range(count)
    ]


def _plan(leaves: Sequence[Leaf], ranks: int, rank: int) -> Layout:
    check_schema(leaves)
    schema_hash(leaves, {})
    layout = lay_out(leaves)
    make_plan(layout, rank=rank, size=ranks)
    return layout


def _memory(leaves: Sequence[Leaf], ranks: int, rank: int) -> int:
    """Of a second planning, since watching memory takes time."""
    tracemalloc.start()
    try:
        _plan(leaves, ranks, rank)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _ranges(layout: Layout, ranks: int, rank: int) -> list[tuple[int, int]]:
    plan = make_plan(layout, rank=rank, size=ranks)
    return [layout.span(*run) for run in plan.runs]
