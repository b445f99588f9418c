"""Parts of tensors and what is per rank, as entries of a State: in one process, as one of many ranks would see it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import bits, manager

from harness.checkpoint import Box, Flat, Partial, PerRank, Rng, Shard, State
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.manifest import Manifest, parse, render
from harness.checkpoint.restoring import Restore
from harness.checkpoint.schema import Leaf, check_schema
from harness.checkpoint.snapshot import Snapshot
from harness.checkpoint.state import prepare, take
from harness.errors import DataError


def manifest_of(snapshots: list[Snapshot]) -> Manifest:
    """The manifest of what these ranks would save together."""
    first = snapshots[0]
    assert all(snapshot.leaves == first.leaves for snapshot in snapshots), "all ranks have the same leaves"
    return Manifest("0" * 32, 7, 0.0, len(snapshots), lay_out(first.leaves), "0" * 32, "0" * 32, {}, first.record)


def deliver(snapshots: list[Snapshot], layout: Layout, restore: Restore) -> None:
    """Everything that these ranks hold goes to the sinks, and is handed over."""
    assert not restore.problems, restore.problems
    for leaf in layout.leaves:
        data = np.zeros(leaf.nbytes, np.uint8)
        for snapshot in snapshots:
            part = snapshot.parts.get(leaf.name)
            if part is None:
                data = snapshots[0].buffers[leaf.name].read(0, leaf.nbytes)
                break
            for cut in range(leaf.nbytes):  # byte by byte: another way than the one that is tested
                if len(found := part.read(cut, cut + 1)):
                    data[cut] = found[0]
        for sink in restore.sinks.get(leaf.name, ()):
            half = leaf.nbytes // 2
            sink.write(0, data[:half])
            sink.write(half, data[half:])
    restore.finish()


def columns(rank: int, size: int) -> Box:
    return Box((4, 6), (0, 6 * rank // size), (4, 6 * (rank + 1) // size - 6 * rank // size))


def split(seed: int, rank: int, size: int) -> dict[str, Any]:
    """A linear layer split along its inputs, with its optimizer after a step."""
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    box = columns(rank, size)
    layer = torch.nn.Linear(box.count[1], 4)
    with torch.no_grad():
        layer.weight.copy_(whole[:, box.start[1] : box.start[1] + box.count[1]])
        layer.bias.fill_(seed)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.weight.grad, layer.bias.grad = layer.weight.detach() * 3, torch.ones(4)
    optimizer.step()
    return {"model": layer, "optimizer": optimizer, "shards": {"weight": box}}


def as_bits(state: dict[str, Any]) -> Any:
    return bits([state["model"].state_dict(), state["optimizer"].state_dict()["state"]])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("other", [1, 2, 3])
def test_a_split_module_and_its_optimizer(size: int, other: int) -> None:
    saved = [take(State(**split(1, rank, size)), rank, size) for rank in range(size)]
    manifest = manifest_of(saved)
    placements = {leaf.name: (leaf.placement, leaf.shape) for leaf in manifest.layout.leaves}
    assert placements == {
        "model/weight": ("sharded", (4, 6)),
        "model/bias": ("replicated", (4,)),
        **{f"optimizer/weight/{key}": ("sharded", (4, 6)) for key in ("exp_avg", "exp_avg_sq")},
        **{f"optimizer/bias/{key}": ("replicated", (4,)) for key in ("exp_avg", "exp_avg_sq")},
    }
    for rank in range(other):
        state = split(9, rank, other)
        if rank == 0:  # state that is not there yet is made in the local shape
            state["optimizer"] = torch.optim.Adam(state["model"].parameters())
        deliver(saved, manifest.layout, prepare(State(**state), manifest, rank=rank, size=other))
        assert as_bits(state) == as_bits(split(1, rank, other))


def test_names_of_parts() -> None:
    state = split(1, 0, 2)
    box = state.pop("shards")["weight"]
    for name in ("weight", "model.weight"):
        assert "model/weight" in take(State(**state, shards={name: box}), 0, 2).parts
    only = take(State(**state, shards={"optimizer.weight": box}), 0, 2)
    assert set(only.parts) == {"optimizer/weight/exp_avg", "optimizer/weight/exp_avg_sq"}
    with pytest.raises(DataError, match="names 'wait', which is no parameter or buffer of this state"):
        take(State(**state, shards={"wait": box}))
    with pytest.raises(DataError, match=r"model/weight has the shape \[4, 3\], which is not that of Box\("):
        take(State(**state, shards={"weight": columns(0, 3)}))


def test_parts_are_converted(tmp_path: Path) -> None:
    whole = torch.randn(5, 7)
    alone = manager(tmp_path)
    alone.save(1, State(tensors={"a": whole, "b": whole}))
    window = whole[1:4, 2:5]
    live = {
        "a": Shard(torch.zeros(3, 3, dtype=torch.float64), Box((5, 7), (1, 2), (3, 3))),
        "b": Shard(torch.zeros(9, dtype=torch.bfloat16), Flat((5, 7), 3, 12)),
    }
    assert alone.restore(State(tensors=live), partial=Partial(cast=True)) == 1
    assert bits(live["a"].tensor) == bits(window.double())
    assert bits(live["b"].tensor) == bits(whole.reshape(-1)[3:12].bfloat16())
    with pytest.raises(DataError, match=r"tensors/a is float64\[5, 7\] here and float32\[5, 7\] in the checkpoint"):
        alone.restore(State(tensors=live))
    alone.save(2, State(tensors={"a": whole * 1e30, "b": whole}))
    live["a"] = Shard(torch.zeros(3, 3, dtype=torch.float16), Box((5, 7), (1, 2), (3, 3)))
    alone.restore(State(tensors=live), partial=Partial(cast=True))
    assert alone.report.infinite == ["tensors/a"]


def own(rank: int, seed: int = 1) -> dict[str, Any]:
    return {
        "position": seed * 100 + rank,
        "loss": {"mean": rank / 7 if rank else math.nan, "known": bool(rank % 2)},
        "order": torch.arange(5) * seed + rank,
        "table": np.full((2, 3), seed + rank / 10),
        "scalar": torch.tensor(float(seed + rank)),
    }


def test_what_is_per_rank() -> None:
    size = 3
    saved = [take(State(sampler=PerRank(own(rank))), rank, size) for rank in range(size)]
    manifest = parse(render(manifest_of(saved)))
    shapes = {leaf.name: (leaf.dtype, leaf.shape) for leaf in manifest.layout.leaves}
    assert shapes["sampler/position"] == ("int64", (3,)) and shapes["sampler/order"] == ("int64", (3, 5))
    assert shapes["sampler/loss/known"] == ("bool", (3,)) and shapes["sampler/scalar"] == ("float32", (3,))
    for rank in range(size):
        for value in (own(rank, seed=9), {}):
            tensor: Any = value.get("order")
            restore = prepare(State(sampler=PerRank(value)), manifest, rank=rank, size=size)
            deliver(saved, manifest.layout, restore)
            assert repr(value) == repr(own(rank)) or set(value) == set(own(rank))
            assert bits(value["order"]) == bits(own(rank)["order"]) and repr(value["loss"]) == repr(own(rank)["loss"])
            assert value["table"].tolist() == own(rank)["table"].tolist()
            assert bits(value["scalar"]) == bits(own(rank)["scalar"])
            assert (value["position"], type(value["position"])) == (100 + rank, int)
            assert tensor is None or value["order"] is tensor, "in place"


def test_what_is_per_rank_stays_on_another_number_of_ranks() -> None:
    saved = [take(State(sampler=PerRank(own(rank)), rng=Rng(seed=3)), rank, 3) for rank in range(3)]
    manifest = manifest_of(saved)
    value, generator = own(0, seed=9), np.random.default_rng(0)
    state = State(sampler=PerRank(value), rng=Rng(seed=3, data=generator))
    restore = prepare(state, manifest, rank=0, size=2)
    before = generator.bit_generator.state
    deliver(saved, manifest.layout, restore)
    assert repr(value) == repr(own(0, seed=9))
    assert generator.bit_generator.state != before
    assert restore.report.notes == [
        "sampler was saved by 3 ranks, each its own, and these are 2: it stays as it is",
        "rng was saved by 3 ranks, each its own, and these are 2: the generators start anew from their seed, the step"
        " and the rank",
    ]
    assert not restore.report.complete


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": "text"}, "sampler/a is a str; what is per rank is made of tensors and numbers"),
        ({"a": {"b": None}}, "sampler/a/b is a NoneType"),
        ({"a": 1 << 63}, "more than 64 bits"),
        ({1: 2}, "has the key 1"),
        ({"a": [1, 2]}, "sampler/a is a list"),
    ],
)
def test_what_cannot_be_per_rank(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        take(State(sampler=PerRank(value)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda live: live.pop("order"), "only in the checkpoint: sampler/order"),
        (lambda live: live.update(extra=1), "missing from the checkpoint: sampler/extra"),
        (lambda live: live.update(order=torch.zeros(5)), r"sampler/order is float32\[3, 5\] here and int64\[3, 5\]"),
        (lambda live: live.update(order=torch.zeros(6).long()), r"sampler/order is int64\[3, 6\] here"),
        (lambda live: live.update(order=5), "sampler/order is a number here and not in the checkpoint"),
    ],
)
def test_per_rank_entries_that_do_not_fit(change: Any, words: str) -> None:
    saved = [take(State(sampler=PerRank(own(rank))), rank, 3) for rank in range(3)]
    live = own(0)
    change(live)
    restore = prepare(State(sampler=PerRank(live)), manifest_of(saved), rank=0, size=3)
    assert any(re.search(words, problem) for problem in restore.problems), restore.problems


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        [5],
        [["a", "int"]],
        [[["other"], "int"]],
        [[[], "int"]],
        [[["order"], "int"]],
        [[["position"], "str"]],
        [[[["position"]], "int"]],
        [[["..", "position"], "int"]],
    ],
)
def test_hostile_records_of_what_is_per_rank(value: Any) -> None:
    saved = [take(State(sampler=PerRank(own(rank))), rank, 2) for rank in range(2)]
    manifest = manifest_of(saved)
    manifest.state["sampler"] = {"kind": "per_rank", "value": value}
    with pytest.raises(DataError, match="record of sampler is not as it should be"):
        prepare(State(sampler=PerRank(own(0))), manifest, rank=0, size=2)


def test_rows_and_ranks_must_agree_in_a_manifest() -> None:
    leaf = Leaf("sampler/a", "int64", (3, 2), "per_rank")
    good = Manifest("0" * 32, 7, 0.0, 3, lay_out([leaf]), "0" * 32, "0" * 32)
    assert parse(render(good)).layout.leaves == (leaf,)
    bad = Manifest("0" * 32, 7, 0.0, 4, lay_out([leaf]), "0" * 32, "0" * 32)
    with pytest.raises(DataError, match="does not have a row for each rank"):
        parse(render(bad))
    with pytest.raises(DataError, match="is per rank and has no rows"):
        check_schema([Leaf("a", "int64", (), "per_rank")])


def test_shards_of_the_wrong_size() -> None:
    with pytest.raises(DataError, match=r"a shard has the shape \[3\], which is not that of Flat"):
        Shard(torch.zeros(3), Flat((4, 6), 0, 4))
    with pytest.raises(DataError, match=r"a shard has the shape \[12\], which is not that of Box"):
        Shard(torch.zeros(12), Box((4, 6), (0, 0), (2, 6)))


def test_a_mix_of_parts_and_whole_tensors_in_one_dict(tmp_path: Path) -> None:
    """On one rank the part is the whole; a restore takes any part of either."""
    alone = manager(tmp_path)
    whole = torch.randn(4, 6)
    alone.save(1, State(tensors={"a": Shard(whole, Box((4, 6), (0, 0), (4, 6))), "b": whole.clone()}))
    live = {"a": torch.zeros(4, 6), "b": Shard(torch.zeros(2, 3), Box((4, 6), (2, 3), (2, 3)))}
    alone.restore(State(tensors=live))
    assert bits(live["a"]) == bits(whole) and bits(live["b"].tensor) == bits(whole[2:, 3:])
    fresh: dict[str, Any] = {}
    alone.restore(State(tensors=fresh))
    assert bits(fresh) == bits({"a": whole, "b": whole})
