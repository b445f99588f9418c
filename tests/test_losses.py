"""What an elastic run has lost: who, and what becomes of the others. Heartbeats are files; no rank is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from harness.heartbeat import WAITING, Heartbeat
from harness.rundir import Attempt
from launch.losses import Losses

HERE = os.getpid()
KILLED = "Process 0 exit with status code 137."


@pytest.fixture(scope="module")
def dead() -> int:
    """The process id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    (tmp_path / "0001" / "heartbeats").mkdir(parents=True)
    return Attempt(tmp_path / "0001")


def _beat(attempt: Attempt, rank: int, host: str, pid: int, size: int = 2, section: str = "communication") -> Heartbeat:
    one = Heartbeat(rank, size, host, pid, section, 28, 0.1, True, 5)
    attempt.heartbeat(rank).write_text(json.dumps(asdict(one)))
    return one


def _told(losses: Losses, *lines: str) -> list[str]:
    """Of what was said once, now and a moment later."""
    return [*losses.hear(lines), *losses.hear([])]


def test_a_rank_is_lost_and_the_other_goes_on(attempt: Attempt, dead: int) -> None:
    _beat(attempt, 0, "localhost", dead), _beat(attempt, 1, "127.0.0.1", HERE)
    losses = Losses(attempt, least=1)
    assert _told(losses, KILLED) == [
        "rank 0 of 2 on localhost was ended by SIGKILL, last seen in communication at step 28;"
        " the other goes on from memory"
    ]
    assert set(attempt.heartbeats()) == {1}, "nobody takes its silence for a hang"
    assert not losses.waiting() and losses.hear([]) == []


def test_too_few_are_left_and_wait_until_there_are_more(attempt: Attempt, dead: int) -> None:
    losses = Losses(attempt, least=3)
    assert losses.waiting(), "nobody is there yet"
    _beat(attempt, 0, "localhost", dead, 3), _beat(attempt, 1, "a", HERE, 3), _beat(attempt, 2, "a", HERE + 1, 3)
    assert not losses.waiting()
    (text,) = _told(losses, KILLED)
    assert text.endswith("; the 2 others wait until there are 3 ranks again")
    assert not losses.waiting(), "they have not noticed yet"
    for rank in (1, 2):
        _beat(attempt, rank, "a", HERE + rank, section=WAITING)
    assert losses.waiting()
    _beat(attempt, 0, "b", 77, section="start")
    assert not losses.waiting()
    for rank in (1, 2):
        _beat(attempt, rank, "a", HERE + rank, section="data")
    assert not losses.waiting()
    attempt.heartbeat(0).unlink()
    assert not losses.waiting(), "they train again"


def test_a_whole_host_is_dropped(attempt: Attempt) -> None:
    for rank, host in enumerate("aabb"):
        _beat(attempt, rank, host, 100 + rank, 4)
    (text,) = _told(Losses(attempt, least=1), "Process 2 exit with status code 1.")
    assert text.startswith("rank 2 of 4 on b ended with code 1") and text.endswith("; the 2 others go on from memory")


def test_the_numbers_of_other_hosts_count_for_the_first_loss_only(attempt: Attempt) -> None:
    for rank, host in enumerate("abc"):
        _beat(attempt, rank, host, 100 + rank, 3)
    losses = Losses(attempt, least=1)
    assert _told(losses, KILLED)[0].startswith("rank 0 of 3 on a was ended by SIGKILL")
    for rank, host in enumerate("bc"):
        _beat(attempt, rank, host, 101 + rank)
    assert _told(losses, "Process 1 exit with status code 139.")[0].startswith("what began as rank 1 was ended by SIGS")


def test_it_is_told_once_somebody_is_seen_to_go_on(attempt: Attempt, dead: int) -> None:
    """The rank that goes on has taken the other number already, and its heartbeat is yet to come."""
    before = [_beat(attempt, 0, "localhost", dead)]
    losses = Losses(attempt, least=1)
    assert _told(losses, KILLED) == []
    _beat(attempt, 0, "127.0.0.1", HERE, 1)
    (text,) = losses.hear([], before)
    assert text.startswith("rank 0 of 2 on localhost was ended by SIGKILL")
    assert set(attempt.heartbeats()) == {0}, "that of the other"


def test_who_finished_stopped_or_was_taken_away_is_not_lost(attempt: Attempt, dead: int) -> None:
    _beat(attempt, 0, "localhost", HERE), _beat(attempt, 1, "127.0.0.1", dead)
    losses = Losses(attempt, least=1)
    assert _told(losses, "Process 0 exit with status code 0.", "Process 1 exit with status code 75.") == []
    losses = Losses(attempt, least=1)
    (text,) = _told(losses, "Process 1 exit with status code 134.")
    assert "rank 1 of 2 on 127.0.0.1 was ended by SIGABRT" in text
