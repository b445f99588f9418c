"""Sections of time, and what all ranks' numbers add up to."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.clock import SECTIONS, Clock
from harness.evaluate import combine
from harness.metrics import summarize
from harness.pulse import ASKED, PATIENCE, Pulse, Wishes


def test_sections_add_up_and_nested_time_counts_once() -> None:
    clock = Clock()
    begin = time.perf_counter()
    with clock("data"):
        time.sleep(0.02)
        with clock("checkpoint"):
            time.sleep(0.03)
    elapsed = time.perf_counter() - begin
    taken = clock.take()
    assert taken["checkpoint"] >= 0.03
    assert taken["data"] < elapsed - 0.03 + 1e-6
    assert sum(taken.values()) == pytest.approx(elapsed, abs=0.005)
    assert clock.take() == {}


def test_the_section_names_where_an_exception_came_from() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="x"), clock("data"):
        raise ValueError("x")
    assert clock.section == "data"
    with clock("update"):
        pass
    assert clock.section == "data"


def test_summary_of_three_ranks() -> None:
    table = np.zeros((3, ASKED + 3 + len(SECTIONS)))
    table[:, ASKED] = [2.0, 4.0, 6.0]  # sums of losses over two steps
    table[:, ASKED + 1] = 2
    table[:, ASKED + 3 + SECTIONS.index("data")] = [0.1, 0.1, 0.7]
    table[:, ASKED + 3 + SECTIONS.index("communication")] = [0.9, 0.9, 0.3]  # waiting is not own work
    told = summarize(table, 1.5, 2)
    assert told.loss == pytest.approx(2.0)
    assert told.slowest == 2
    assert told.slowdown == pytest.approx(0.7 / 0.3)
    assert told.sections["data"] == pytest.approx(0.15)
    table[:, ASKED + 2] = [10.0, 20.0, 30.0]
    assert summarize(table, 1.5, 2).sent == 60.0
    assert (told.asked == table[:, :ASKED]).all()


def test_one_rank_that_was_asked_is_enough() -> None:
    table = np.zeros((3, ASKED))
    pulse = Pulse(0)
    assert pulse.hear(1, table) == Wishes()
    table[1, 0] = 1
    assert pulse.hear(2, table) == Wishes(stop=True)
    table[0, 1] = 1
    assert pulse.hear(3, table) == Wishes(stop=True, save=True)
    table[2, 2] = 1
    assert pulse.hear(4, table) == Wishes(stop=True, save=True, announced=True)
    assert pulse.ask(True, False, True)[:3] == [True, False, True]


@given(seconds=st.floats(1e-6, 1e4), first=st.integers(0, 10**9), slower=st.floats(0.5, 2))
def test_ranks_meet_about_every_ten_seconds(seconds: float, first: int, slower: float) -> None:
    """Whatever a step takes; ranks that measured different times agree on the steps."""
    ranks, done, asked = [Pulse(first), Pulse(first)], first, 0
    table = np.zeros((2, ASKED))
    last, gaps = first, []
    while done < first + 10**11 and asked < 40:
        done = ranks[0]._next  # the first step that is due
        assert [pulse.due(done) for pulse in ranks] == [True, True]
        assert [pulse.due(done - 1) for pulse in ranks] == [False, False]
        table[:, 3] = [(done - last) * seconds, (done - last) * seconds * slower]
        for pulse in ranks:
            pulse.hear(done, table)
        gaps.append((done - last) * seconds * max(1.0, slower))
        last, asked = done, asked + 1
    assert max(gaps) <= max(PATIENCE, seconds * max(1.0, slower)) * (1 + 1e-6)
    # a question costs something: soon they are seldom
    assert gaps[-1] > PATIENCE / 2 or gaps[-1] >= seconds


def test_a_log_line_before_its_time_takes_the_place_of_a_question() -> None:
    pulse, table = Pulse(0), np.zeros((1, ASKED))
    for done in range(10, 1000, 10):
        pulse.hear(done, table)
        assert not any(pulse.due(step) for step in range(done + 1, done + 10))


def test_evaluation_means_are_weighed_by_samples() -> None:
    parts = [{"count": 3, "sums": {"loss": 3.0}}, {"count": 1, "sums": {"loss": 5.0}}, {"count": 0, "sums": {}}]
    assert combine(parts) == {"loss": 2.0}
    assert np.isnan(combine([{"count": 1, "sums": {"loss": np.nan}}, *parts])["loss"])
    infinite = [{"count": 1, "sums": {"loss": value}} for value in (np.inf, -np.inf)]
    assert np.isnan(combine(infinite)["loss"])
