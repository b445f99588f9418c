"""The order of samples: a permutation per epoch, the same on any number of ranks, resumable at any position."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.batch import plan_batch
from harness.data import train_batches
from harness.order import Order, sample_seeds, uniform

PINNED = [7, 1, 6, 4, 3, 5, 9, 0, 2, 8]
PINNED_BLOCKS = [4, 7, 6, 5, 3, 1, 0, 2, 8, 9]
PINNED_SEEDS = [1552145602316812589, 10983570552481309232]

orders = st.builds(
    Order,
    samples=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
    block=st.integers(1, 70),
)


@given(orders, st.integers(0, 5))
def test_every_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    ids = order.ids(epoch * order.samples, (epoch + 1) * order.samples)
    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(order.samples))


@given(orders, st.lists(st.integers(0, 40), max_size=8))
def test_any_cut_of_the_stream_gives_the_same_ids(order: Order, lengths: list[int]) -> None:
    """A stop and a restart anywhere: what is read before and after is what would have been read without."""
    cuts = np.cumsum([0, *lengths])
    parts = [order.ids(int(a), int(b)) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *parts]), order.ids(0, int(cuts[-1])))


@given(orders)
def test_blocks_stay_together(order: Order) -> None:
    if order.shuffle:
        numbers = order.ids(0, order.samples) // order.block
        assert 1 + np.count_nonzero(np.diff(numbers)) == -(-order.samples // order.block)


@given(order=orders, data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_sample_is_lost_or_repeated_over_ranks_and_passes(order: Order, data: st.DataObject) -> None:
    """What all ranks read in a step is, in rank order, the step's part of the stream: for every split of the batch."""
    ranks, passes, micro = (data.draw(st.integers(1, 4)) for _ in range(3))
    plan = plan_batch(global_batch=ranks * passes * micro, ranks=ranks, micro_batch=micro)
    start = data.draw(st.integers(0, 6))
    stop = start + data.draw(st.integers(0, 4))
    read = [
        list(
            train_batches(
                Numbers(order.samples), order, plan, replica=rank, start_step=start, stop_step=stop, seed=order.seed
            )
        )
        for rank in range(ranks)
    ]
    for step in range(stop - start):
        batches = [batch for part in read for batch in part[step * passes : (step + 1) * passes]]
        begin = (start + step) * plan.global_batch
        whole = range(begin, begin + plan.global_batch)
        assert [batch.first for batch in batches] == list(whole[:: plan.micro_batch])
        assert np.array_equal(np.concatenate([b.ids for b in batches]), order.ids(whole.start, whole.stop))
        seeds = np.concatenate([batch.data[1] for batch in batches])
        assert np.array_equal(seeds, sample_seeds(order.seed, whole.start, whole.stop))


class Numbers:
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def batch(self, ids: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ids, seeds


def test_epochs_and_seeds_differ() -> None:
    order = Order(1000, seed=1)
    first, second = order.ids(0, 1000), order.ids(1000, 2000)
    assert np.count_nonzero(first == second) < 20
    assert np.count_nonzero(first == Order(1000, seed=2).ids(0, 1000)) < 20
    assert np.count_nonzero(Order(1000, seed=1, block=8).ids(0, 1000) == first) < 20


def test_without_shuffle_it_counts() -> None:
    assert Order(3, seed=5, shuffle=False).ids(2, 8).tolist() == [2, 0, 1, 2, 0, 1]


def test_all_permutations_are_equally_likely() -> None:
    """6 permutations of 3 in 6000 epochs: each about 1000 times (standard deviation 29)."""
    ids = Order(3, seed=7).ids(0, 18_000).reshape(-1, 3) @ np.array([9, 3, 1])
    _, counts = np.unique(ids, return_counts=True)
    assert len(counts) == 6
    assert np.all(np.abs(counts - 1000) < 150)


def test_the_order_is_pinned() -> None:
    """A resumed run must go on with the same order under any later version of numpy or of this program."""
    assert Order(10, seed=42).ids(0, 10).tolist() == PINNED
    assert Order(10, seed=42, block=4).ids(0, 10).tolist() == PINNED_BLOCKS
    assert sample_seeds(42, 0, 2).tolist() == PINNED_SEEDS


def test_sample_seeds_are_those_of_the_position() -> None:
    assert np.array_equal(sample_seeds(3, 5, 9), sample_seeds(3, 0, 20)[5:9])
    assert len(set(sample_seeds(3, 0, 10_000).tolist()) | set(sample_seeds(4, 0, 10_000).tolist())) == 20_000


def test_uniform_numbers_are_uniform_and_independent() -> None:
    draws = uniform(sample_seeds(0, 0, 20_000), 3)
    other = uniform(sample_seeds(0, 0, 20_000), 1, stream=1)
    both = np.column_stack([draws, other])
    assert both.min() >= 0
    assert both.max() < 1
    assert np.allclose(both.mean(0), 0.5, atol=0.01)
    assert np.allclose(both.var(0), 1 / 12, atol=0.005)
    assert np.all(np.abs(np.corrcoef(both.T) - np.eye(4)) < 0.03)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"block": 0}, {"seed": -1}])
def test_impossible_orders(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="an order needs"):
        Order(**({"samples": 4, "seed": 0} | wrong))


def test_impossible_ranges() -> None:
    for start, stop in ((-1, 3), (3, 1)):
        with pytest.raises(ValueError, match="are no range"):
            Order(4, seed=0).ids(start, stop)
