"""Who works with whom: arithmetic only; the collectives of groups are tried in `tests/parallel/`."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.batch import plan_batch
from harness.errors import ConfigError
from harness.parallel.groups import arrange, groups_of, together

NODES = st.lists(st.sampled_from("abcd"), min_size=1, max_size=24)


@settings(deadline=None)
@given(NODES, st.integers(1, 4), st.integers(1, 3))
def test_every_rank_has_one_place_and_its_groups_agree(hosts: list[str], model: int, pipeline: int) -> None:
    hosts = hosts * (model * pipeline)
    grid = arrange(hosts, model=model, pipeline=pipeline)
    ranks = sorted(rank for stages in grid.cells for parts in stages for rank in parts)
    assert ranks == list(range(len(hosts)))
    assert grid.place(0) == (0, 0, 0), "rank 0 tells and saves"
    for rank in ranks:
        replica, stage, part = grid.place(rank)
        assert (grid.model(rank)[part], grid.stages(rank)[stage], grid.replicas(rank)[replica]) == (rank,) * 3
        assert (len(grid.model(rank)), len(grid.stages(rank))) == (model, pipeline)
        assert all(grid.model(other) == grid.model(rank) for other in grid.model(rank))
        assert all(grid.replicas(other) == grid.replicas(rank) for other in grid.replicas(rank))


@settings(deadline=None)
@given(NODES, st.integers(1, 6))
def test_as_many_groups_as_can_be_are_within_a_node(hosts: list[str], size: int) -> None:
    hosts = hosts * size
    groups = together(range(len(hosts)), hosts.__getitem__, size)
    assert sorted(rank for group in groups for rank in group) == list(range(len(hosts)))
    within = sum(len({hosts[rank] for rank in group}) == 1 for group in groups)
    assert within >= sum(count // size for count in Counter(hosts).values())
    assert groups == sorted(groups)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_shards_and_copies_of_the_optimizer_cover_the_replicas(
    nodes: int, each: int, model: int, pipeline: int
) -> None:
    hosts = [str(node) for node in range(nodes) for _ in range(each * model * pipeline)]
    grid = arrange(hosts, model=model, pipeline=pipeline)
    for rank in range(len(hosts)):
        for spread in ("none", "node", "all"):
            shards, copies = grid.shards(rank, spread), grid.copies(rank, spread)
            assert set(shards) & set(copies) == {rank}
            assert len(shards) * len(copies) == len(grid.replicas(rank))
            assert {*shards, *copies} <= set(grid.replicas(rank))
        assert len({hosts[other] for other in grid.shards(rank, "node")}) == 1


@settings(deadline=None)
@given(NODES, st.integers(1, 3), st.integers(1, 3), st.sampled_from(["none", "all"]))
def test_every_group_of_several_has_its_process_set(hosts: list[str], model: int, pipeline: int, spread: str) -> None:
    hosts = hosts * (model * pipeline)
    grid = arrange(hosts, model=model, pipeline=pipeline)
    sets = grid.sets(spread)  # type: ignore[arg-type]
    assert len(set(sets)) == len(sets) and all(list(one) == sorted(one) for one in sets)
    known = {**{one: str(one) for one in sets}, tuple(range(len(hosts))): "world"}
    for rank in range(len(hosts)):
        groups = groups_of(grid, rank, known, spread)  # type: ignore[arg-type]
        for group in (groups.model, groups.replicas, groups.shards, groups.copies):
            assert group.ranks[group.index] == rank
            assert list(group.ranks) == sorted(group.ranks)
            assert (group.process_set is None) == (group.size == 1)
        assert groups.stages.ranks[groups.stages.index] == rank
    speaking = [rank for rank in range(len(hosts)) if groups_of(grid, rank, known).speaks]
    assert len(speaking) == len(grid.cells), "one for each replica"


def test_node_shards_have_sets_and_uneven_nodes_are_refused() -> None:
    assert arrange("aabb").sets("node") == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert arrange("aabb", model=2).sets("node") == [(0, 1), (0, 2), (1, 3), (2, 3)]
    with pytest.raises(ConfigError, match="equally many replicas on every node, not 2 on a, 1 on b"):
        arrange("aab").sets("node")


def test_ten_thousand_ranks_take_no_time() -> None:
    grid = arrange([str(rank // 8) for rank in range(10_000)], model=4)
    assert len(grid.sets()) == 2500 + 4
    assert len(grid.replicas(17)) == 2500


def test_ranks_that_form_no_replicas_are_refused_with_the_nearest_that_do() -> None:
    assert plan_batch(global_batch=8, ranks=4, micro_batch=None, each=2).share(1) == (4, 8)
    with pytest.raises(ConfigError) as caught:
        plan_batch(global_batch=8, ranks=7, micro_batch=None, each=3)
    assert str(caught.value) == (
        "7 ranks cannot be cut into replicas of 3 ranks (section parallel)\n  start 6 or 9 ranks"
    )
    with pytest.raises(ConfigError, match="start 4 ranks"):
        plan_batch(global_batch=8, ranks=3, micro_batch=None, each=4)
    with pytest.raises(ConfigError) as caught:
        plan_batch(global_batch=8, ranks=6, micro_batch=None, each=2)
    assert str(caught.value) == (
        "train.global_batch 8 does not divide by 3 replicas of 2 ranks\n"
        "  use train.global_batch=6 or 9; or 4 ranks or 8 ranks"
    )
    assert str(plan_batch(global_batch=8, ranks=4, micro_batch=2, each=4)) == (
        "global batch 8 = 1 replica of 4 ranks x 4 accumulation x 2 samples"
    )
