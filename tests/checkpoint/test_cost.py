"""The counts of `cost` are those of real saves, and what they say of many ranks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from ranks_cost import count as count_calls
from support import ROOT, needs_mpirun, ranks

from harness.bench.raw import ways
from harness.checkpoint import Single
from harness.checkpoint.cost import Operations, cost, count
from harness.checkpoint.forecast import forecast, sample_leaves
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.schema import Leaf

STATES = ((3, 100), (4, 4_000_000), (40, 250_001))


def layout_of(tensors: int, elements: int) -> Layout:
    return lay_out([Leaf(f"tensors/t{index:05}", "float32", (elements,)) for index in range(tensors)])


def compare(found: dict[str, int], expected: Operations) -> None:
    wanted = asdict(expected)
    for name in ("opens", "syncs", "names", "listings", "sent"):
        assert found.get(name, 0) == wanted[name], (name, found, wanted)
    empty = 1 if expected.names else 0  # all of these heads' metadata may be in the superblock's page
    assert wanted["writes"] - empty <= found.get("writes", 0) <= wanted["writes"]
    assert wanted["message_bytes"] / 3 <= found.get("message_bytes", 0) <= wanted["message_bytes"]


@pytest.mark.parametrize(("tensors", "elements"), STATES)
def test_one_rank_asks_for_what_is_said(tensors: int, elements: int, tmp_path: Path) -> None:
    odirect = "odirect" in ways(tmp_path)
    found = count_calls(tmp_path / "checkpoints", Single(), tensors, elements)
    compare(found, count(layout_of(tensors, elements), rank=0, size=1, odirect=odirect))


@needs_mpirun
@pytest.mark.mpi
def test_two_ranks_ask_for_what_is_said(tmp_path: Path) -> None:
    script = str(ROOT / "tests/checkpoint/ranks_cost.py")
    done = ranks(2, [script, str(tmp_path), *(f"{tensors}x{elements}" for tensors, elements in STATES)])
    assert done.returncode == 0, done.stderr
    odirect = "odirect" in ways(tmp_path)
    for (tensors, elements), told in zip(STATES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        found = cost(layout_of(tensors, elements), rank=1, size=2, odirect=odirect)
        assert found.other is not None
        for mine, expected in zip(told, (found.root, found.other), strict=True):
            compare(mine, expected)
        assert found.root.bytes + found.other.bytes >= 4 * tensors * elements


def test_ranks_and_tensors_cost_what_the_model_says() -> None:
    few, many = (forecast(sample_leaves(1000), ranks=ranks).cost for ranks in (10, 10_000))
    assert few.other is not None and many.other is not None
    assert (few.root.names, few.root.syncs, few.root.opens) == (many.root.names, many.root.syncs, many.root.opens + 1)
    assert (many.root.sent, many.root.received) == (29_997, 19_998)
    assert many.other.names == many.other.listings == 0 and many.other.opens <= 2
    more = cost(lay_out(sample_leaves(30_000)), rank=1, size=10)
    assert more.other is not None
    assert (more.root.names, more.root.opens, more.other.opens) == (few.root.names, few.root.opens, few.other.opens)
    assert forecast(sample_leaves(5), ranks=1).cost.other is None
