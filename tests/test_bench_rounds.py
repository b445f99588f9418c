"""Rounds: who takes turns when, what counts, and ratios that a slow minute does not change."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.bench.rounds import Contender, Rounds, Spread, run_rounds, slowest, spread, timed
from harness.checkpoint import Single
from harness.errors import InternalError

seconds = st.floats(0.001, 1000)


class Together:
    """Two ranks that are threads; only what rounds use."""

    mpi = None

    def __init__(self, rank: int, board: dict[int, Any], meeting: threading.Barrier) -> None:
        self.rank, self.size, self._board, self._meeting = rank, 2, board, meeting

    def barrier(self) -> None:
        self._meeting.wait(20)

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def all_gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self.barrier()
        told = [self._board[0], self._board[1]]
        self.barrier()
        return told


def on_two(work: Callable[[Together], Any]) -> list[Any]:
    board: dict[int, Any] = {}
    meeting, found = threading.Barrier(2), [None, None]

    def one(rank: int) -> None:
        found[rank] = work(Together(rank, board, meeting))

    helper = threading.Thread(target=one, args=(1,))
    helper.start()
    one(0)
    helper.join(20)
    return found


def test_they_take_turns_forwards_and_backwards_and_the_first_round_warms_up() -> None:
    order: list[str] = []

    def work(name: str) -> Contender:
        def measure(number: int) -> dict[str, float]:
            order.append(f"{number}{name}")
            return {name: float(number + 1)}

        return Contender(name, measure)

    heard: list[str] = []
    found = run_rounds([work("a"), work("b")], 2, Single(), told=lambda number, name: heard.append(f"{number}{name}"))
    assert order == heard == ["0a", "0b", "1b", "1a", "2a", "2b"]
    assert found.first("a") == 1.0 and found.seconds("a") == Spread(2.5, 2.0, 3.0, 2)
    assert "a" in found and "c" not in found and math.isnan(found.first("c")) and found.seconds("c").count == 0


def test_the_slowest_rank_counts() -> None:
    def measure(comm: Together) -> Rounds:
        return run_rounds([Contender("own", lambda number: {"x": 1.0 + comm.rank * (2 - number)})], 1, comm)

    first, second = on_two(measure)
    assert first == second == Rounds(({"x": 3.0}, {"x": 2.0}))


def test_a_contender_that_returns_nothing_is_timed_as_a_whole() -> None:
    def measure(comm: Together) -> Rounds:
        return run_rounds([Contender("nap", lambda number: time.sleep(0.05 * comm.rank))], 1, comm)

    for found in on_two(measure):
        assert found.seconds("nap").least >= 0.05


def test_timed_begins_together() -> None:
    def late(comm: Together) -> float:
        time.sleep(0.2 * comm.rank)
        return timed(lambda: None, comm)

    assert max(on_two(late)) < 0.15


def test_ranks_that_measure_different_things_are_told() -> None:
    def measure(comm: Together) -> str:
        with pytest.raises(InternalError, match="measured other things") as error:
            slowest({f"x{comm.rank}": 1.0}, comm)
        return error.value.message

    on_two(measure)


@given(st.lists(st.tuples(seconds, seconds, st.floats(0.1, 10)), min_size=1, max_size=9))
def test_ratios_do_not_depend_on_how_fast_the_machine_is_in_a_round(rounds: list[tuple[float, float, float]]) -> None:
    plain = Rounds(({}, *({"a": a, "b": b} for a, b, _ in rounds)))
    slowed = Rounds(({}, *({"a": a * factor, "b": b * factor} for a, b, factor in rounds)))
    assert plain.ratio("a", "b").median == pytest.approx(slowed.ratio("a", "b").median)
    assert plain.ratio("a", "b").median == pytest.approx(spread(a / b for a, b, _ in rounds).median)


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=9))
def test_of_several_the_least_in_each_round_counts(rounds: list[tuple[float, float, float]]) -> None:
    found = Rounds(({}, *({"a": a, "b": b, "c": c} for a, b, c in rounds)))
    assert found.ratio("a", "b", "c") == spread(a / min(b, c) for a, b, c in rounds)
    assert found.seconds("b", "c").least == min(min(b, c) for _, b, c in rounds)
    assert found.ratio("a", "d").count == 0


@given(st.lists(seconds, min_size=1, max_size=20))
def test_a_median_lies_between_the_ends(values: list[float]) -> None:
    found = spread(values)
    assert found.least <= found.median <= found.most and found.count == len(values)
    assert (found.least, found.most) == (min(values), max(values))
