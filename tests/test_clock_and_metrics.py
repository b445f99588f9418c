"""Sections of time, and what all ranks' numbers add up to."""

from __future__ import annotations

import time

import numpy as np
import pytest

from harness.clock import SECTIONS, Clock
from harness.evaluate import combine
from harness.metrics import summarize


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
    table = np.zeros((3, 6 + len(SECTIONS)))
    table[:, 3] = [2.0, 4.0, 6.0]  # sums of losses over two steps
    table[:, 4] = 2
    table[:, 6 + SECTIONS.index("data")] = [0.1, 0.1, 0.7]
    table[:, 6 + SECTIONS.index("communication")] = [0.9, 0.9, 0.3]  # waiting is not own work
    told = summarize(table, 1.5, 2)
    assert told.loss == pytest.approx(2.0)
    assert told.slowest == 2
    assert told.slowdown == pytest.approx(0.7 / 0.3)
    assert told.sections["data"] == pytest.approx(0.15)
    table[:, 5] = [10.0, 20.0, 30.0]
    assert summarize(table, 1.5, 2).sent == 60.0
    assert not (told.stop or told.save or told.announced)
    table[1, 0] = 1
    assert summarize(table, 1.5, 2).stop and not summarize(table, 1.5, 2).save
    table[0, 1] = 1
    assert summarize(table, 1.5, 2).save and not summarize(table, 1.5, 2).announced
    table[2, 2] = 1
    assert summarize(table, 1.5, 2).announced


def test_evaluation_means_are_weighed_by_samples() -> None:
    parts = [{"count": 3, "sums": {"loss": 3.0}}, {"count": 1, "sums": {"loss": 5.0}}, {"count": 0, "sums": {}}]
    assert combine(parts) == {"loss": 2.0}
    assert np.isnan(combine([{"count": 1, "sums": {"loss": np.nan}}, *parts])["loss"])
    infinite = [{"count": 1, "sums": {"loss": value}} for value in (np.inf, -np.inf)]
    assert np.isnan(combine(infinite)["loss"])
