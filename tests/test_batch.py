"""The batch arithmetic: its identity, and that the values a message proposes really work."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.batch import BatchPlan, plan_batch
from harness.errors import ConfigError, Exit


def test_the_example_of_the_documentation():
    plan = plan_batch(global_batch=512, ranks=4, micro_batch=16)
    assert plan == BatchPlan(global_batch=512, replicas=4, passes=8, micro_batch=16)
    assert str(plan) == "global batch 512 = 4 ranks x 8 accumulation x 16 samples"
    assert (
        str(plan_batch(global_batch=1, ranks=1, micro_batch=None))
        == "global batch 1 = 1 rank x 1 accumulation x 1 sample"
    )


def test_without_a_micro_batch_there_is_one_pass():
    assert plan_batch(global_batch=96, ranks=3, micro_batch=None) == BatchPlan(96, 3, 1, 32)


def test_a_micro_batch_larger_than_the_share_is_the_share():
    assert plan_batch(global_batch=96, ranks=3, micro_batch=1000) == BatchPlan(96, 3, 1, 32)


@given(ranks=st.integers(1, 500), passes=st.integers(1, 50), micro=st.integers(1, 500))
def test_what_divides_is_planned_exactly(ranks, passes, micro):
    plan = plan_batch(global_batch=ranks * passes * micro, ranks=ranks, micro_batch=micro)
    assert (plan.replicas, plan.passes, plan.micro_batch) == (ranks, passes, micro)
    first, stop = plan.share(ranks - 1)
    assert stop - first == passes * micro and plan.even
    assert plan.cuts(ranks - 1) == [(at, at + micro) for at in range(first, stop, micro)]
    assert (
        plan.weight(micro) == 1.0
        and plan_batch(global_batch=ranks * passes * micro, ranks=ranks, micro_batch=micro, uneven=True) == plan
    )


@given(global_batch=st.integers(1, 3000), ranks=st.integers(1, 80), micro=st.none() | st.integers(1, 400))
def test_an_uneven_batch_is_whole_and_its_weights_add_up(global_batch, ranks, micro):
    if ranks > global_batch:
        with pytest.raises(ConfigError):
            plan_batch(global_batch=global_batch, ranks=ranks, micro_batch=micro, uneven=True)
        return
    plan = plan_batch(global_batch=global_batch, ranks=ranks, micro_batch=micro, uneven=True)
    cuts = [plan.cuts(rank) for rank in range(ranks)]
    assert [at for parts in cuts for first, stop in parts for at in range(first, stop)] == list(range(global_batch))
    sizes = [stop - first for parts in cuts for first, stop in parts]
    assert {len(parts) for parts in cuts} == {plan.passes} and min(sizes) > 0
    assert max(sizes) == plan.micro_batch <= max(2, micro or global_batch)
    assert sum(plan.weight(size) for size in sizes) == pytest.approx(ranks * plan.passes)
    shares = [stop - first for first, stop in map(plan.share, range(ranks))]
    assert max(shares) - min(shares) <= 1
    assert plan.even or plan.weight(1) * global_batch == pytest.approx(ranks * plan.passes)


def test_an_uneven_plan_in_words():
    plan = plan_batch(global_batch=64, ranks=3, micro_batch=8, uneven=True)
    assert str(plan) == "global batch 64 = 3 ranks x 3 accumulation x at most 8 samples"


def proposals(hint: str) -> list[tuple[str, int]]:
    """("ranks", 3) and the like, for every number that a hint proposes."""
    found = []
    for part in hint.split(";"):
        names = re.findall(r"train\.(global_batch|micro_batch)=", part)
        found += [(names[0] if names else "ranks", int(number)) for number in re.findall(r"\d+", part)]
    return found


@given(global_batch=st.integers(1, 3000), ranks=st.integers(1, 80), micro=st.none() | st.integers(1, 400))
def test_either_it_fits_or_every_proposal_does(global_batch, ranks, micro):
    given_values = {"global_batch": global_batch, "ranks": ranks, "micro_batch": micro}
    try:
        plan = plan_batch(**given_values)
    except ConfigError as error:
        proposed = proposals(error.hint)
        assert ("global_batch" in dict(proposed)) and error.code == Exit.CONFIG
        for name, number in proposed:
            changed = plan_batch(**{**given_values, name: number})
            assert changed.replicas * changed.passes * changed.micro_batch == changed.global_batch
    else:
        assert plan.replicas * plan.passes * plan.micro_batch == plan.global_batch == global_batch
        assert plan.replicas == ranks
        assert micro is None or plan.micro_batch <= micro


@given(global_batch=st.integers(1, 300), ranks=st.integers(2, 20), micro=st.none() | st.integers(1, 40))
def test_the_proposed_global_batches_are_the_nearest(global_batch, ranks, micro):
    if global_batch % ranks == 0:
        return

    def fits(number: int) -> bool:
        try:
            plan_batch(global_batch=number, ranks=ranks, micro_batch=micro)
        except ConfigError:
            return False
        return True

    with pytest.raises(ConfigError) as caught:
        plan_batch(global_batch=global_batch, ranks=ranks, micro_batch=micro)
    below = [n for n in range(1, global_batch) if fits(n)][-1:]
    above = next(n for n in range(global_batch + 1, global_batch + 2 * ranks * ((micro or 1) + 1)) if fits(n))
    assert [n for name, n in proposals(caught.value.hint) if name == "global_batch"] == [*below, above]


def test_messages():
    with pytest.raises(ConfigError) as caught:
        plan_batch(global_batch=100, ranks=3, micro_batch=None)
    assert str(caught.value) == (
        "train.global_batch 100 does not divide by 3 ranks\n  use train.global_batch=99 or 102; or 2 ranks or 4 ranks"
    )
    with pytest.raises(ConfigError) as caught:
        plan_batch(global_batch=96, ranks=4, micro_batch=5)
    assert str(caught.value) == (
        "train.micro_batch 5 does not divide the 24 samples that each of 4 ranks takes of the global batch 96\n"
        "  use train.micro_batch=4 or 6; or use train.global_batch=80 or 100"
    )


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"global_batch": 0}, {"micro_batch": 0}, {"ranks": -2}])
def test_nonsense(wrong):
    with pytest.raises(ConfigError, match="at least 1"):
        plan_batch(**{"global_batch": 8, "ranks": 2, "micro_batch": 4, **wrong})


def test_huge_numbers_are_answered_at_once():
    prime = 2**61 - 1
    before = time.perf_counter()
    for ranks, micro in ((2, None), (2, 1000), (1, 1000)):
        with pytest.raises(ConfigError):
            plan_batch(global_batch=prime, ranks=ranks, micro_batch=micro)
    assert time.perf_counter() - before < 5
