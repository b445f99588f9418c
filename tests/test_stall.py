"""Horovod's stall message: read from its own words, explained, and provoked for real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from disturbed import launch
from hypothesis import given
from hypothesis import strategies as st
from support import needs_mpirun

from harness.heartbeat import Heartbeat
from launch.console import Parted
from launch.report import judge
from launch.stall import Stall, Stalls, Told, explain, where_to_look
from launch.watch import Hang

HEAD = (  # as Horovod 0.28.1 writes it
    "[2026-11-21 17:04:16.370173: %s /root/wheels/horovod/common/stall_inspector.cc:105] One or more tensors were"
    " submitted to be reduced, gathered or broadcasted by subset of ranks and are waiting for remainder of ranks for"
    " more than %d seconds. This may indicate that different ranks are trying to submit different tensors or that only"
    " subset of ranks is submitting tensors, which will cause deadlock. \n"
)
WARNED = HEAD % ("W", 60) + "Missing ranks:\n1: [allreduce.bias, allreduce.weight]\n"
GIVEN_UP = (
    HEAD % ("E", 1)
    + "Missing ranks:\n0: [a, b, c, d, e, f ...]\n12!: [allgather.metrics]\n"
    + 'One or more rank (marked by "!") is stalled for longer than 4 seconds. Will shutdown.\n'
)
BEAT = Heartbeat(
    rank=1, size=2, host="n7", pid=77, section="data", step=6, seconds=40.0, waits=False, beat=9
)  # fmt: skip


def read(text: str, size: int = 10**6) -> tuple[str, Stall | None]:
    """What is shown of a launcher's stderr, and the stall in it."""
    part, data = Parted(errors=True), text.encode()
    shown = b"".join(part.feed(data[at : at + size]) for at in range(0, len(data), size))
    return (shown + part.close()).decode(), part.stalls.last


@pytest.mark.parametrize("size", [1, 11, 10**6])
def test_a_warning_is_read_and_kept_from_the_console(size: int) -> None:
    shown, stall = read(f"before\n{WARNED}after\n1: [not of it]\n", size)
    assert shown == "before\nafter\n1: [not of it]\n"
    assert stall == Stall(60, {1: ("allreduce.bias", "allreduce.weight")})


def test_the_last_message_counts_with_all_its_ranks() -> None:
    shown, stall = read(WARNED + GIVEN_UP)
    assert shown == ""
    assert stall == Stall(1, {0: ("a", "b", "c", "d", "e", "f ..."), 12: ("allgather.metrics",)}, fatal=True)


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_lines_around_it_are_left_alone(before: str, after: str) -> None:
    stalls = Stalls()
    stalls.line(before)
    assert all(stalls.line(line) for line in WARNED.splitlines())
    stalls.line(after)
    assert stalls.last is not None and 1 in stalls.last.missing


def test_a_stall_is_told_once_as_long_as_it_lasts() -> None:
    told, one, two = Told(), {1: ("allreduce.w",)}, {0: ("allreduce.w",), 1: ("allreduce.w",)}
    lasting = Stall(60, one)
    assert told.is_news(lasting, 100.0)
    assert not told.is_news(lasting, 101.0), "the same message"
    assert not told.is_news(Stall(60, one), 160.0)
    assert not told.is_news(Stall(60, one, fatal=True), 220.0)
    assert told.is_news(Stall(60, two), 280.0)
    assert told.is_news(Stall(60, two), 1000.0), "it was over meanwhile"


def test_one_rank_is_waited_for() -> None:
    stall = Stall(60, {1: ("allreduce.bias", "allreduce.weight")})
    assert explain(stall, {1: BEAT}) == (
        "Horovod waits for rank 1 (n7, last seen in data at step 6), which has not come to allreduce.bias,"
        " allreduce.weight for 60 s"
    )
    assert explain(stall, {}).startswith("Horovod waits for rank 1, which has")
    assert where_to_look(stall, {1: BEAT}) == "`kill -QUIT 77` on n7 writes its stacks into its log, logs/rank-1.log"
    assert where_to_look(stall, {}) == ""


def test_many_ranks_and_many_names_are_cut() -> None:
    text = explain(Stall(60, dict.fromkeys(range(9), ("a", "b", "c", "d", "e", "f ..."))), {})
    assert text == "Horovod waits for rank 0, rank 1, rank 2, rank 3 and 5 more ranks, which have not come to" + (
        " a, b, c and 3 more for 60 s"
    )


def test_ranks_that_wait_for_each_other_take_different_paths() -> None:
    text = explain(Stall(5, {0: ("allreduce.b",), 1: ("allreduce.a",)}), {1: BEAT})
    assert "do not run the same operations: rank 0 not to allreduce.b; rank 1 (n7, last seen in data at step 6)" in text


def test_a_stall_explains_a_hang_and_is_the_cause_where_horovod_gave_up() -> None:
    stall = Stall(60, {1: ("allreduce.w",)})
    hang = judge([], {}, attempt=1, returncode=1, hang=Hang(1, "n7", "rank 1 of 2 on n7 is silent"), stall=stall)
    assert hang.text.splitlines() == [
        "error: rank 1 of 2 on n7 is silent",
        "  Horovod waits for rank 1, which has not come to allreduce.w for 60 s",
    ]
    shut = {"rank": 0, "size": 2, "host": "n6", "type": "HorovodInternalError", "message": "shut down", "code": 1}
    given_up = judge([shut], {}, attempt=1, returncode=1, heartbeats={1: BEAT}, stall=Stall(60, stall.missing, True))
    assert (given_up.kind, given_up.rank, given_up.code) == ("hang", 1, 1)
    assert given_up.text.startswith("error: Horovod waits for rank 1 (n7, last seen in data at step 6), which has not")
    real = shut | {"rank": 1, "type": "ValueError"}
    assert judge([real, shut], {}, attempt=1, returncode=1, stall=Stall(60, stall.missing, True)).kind == "crash"
    assert "Horovod" not in judge([real], {}, attempt=1, returncode=1, stall=stall).text, "it was over by then"
    done = {"state": "finished", "attempt": 1}
    assert judge([], done, attempt=1, returncode=0, stall=Stall(60, stall.missing, True)).kind == "finished"


@needs_mpirun
@pytest.mark.mpi
def test_a_rank_that_does_not_come_is_named_while_it_lasts_and_in_the_end(tmp_path: Path) -> None:
    run = launch(tmp_path, "horovod.stall_warn=2s", "horovod.stall_stop=10s", plan=[("data", "sleep", 7, 1)])
    try:
        code, said = run.wait()
    finally:
        run.end()
    assert code == 1, said
    told = r"Horovod waits for rank 1 \(\S+, last seen in data at step 7\), which has not come to \S+"
    assert re.search(rf"^warning: {told} for 2 s\n  `kill -QUIT \d+` on ", said, re.MULTILINE), said
    assert re.search(rf"^error: {told} for 2 s, .*give up", said, re.MULTILINE), said
    assert "stall_inspector" not in said and "Traceback" not in said
    assert "stall_inspector" in (run.dir.attempt(1).root / "launcher.log").read_text()
    ending = run.ending(1)
    assert (ending["kind"], ending["rank"]) == ("hang", 1)
