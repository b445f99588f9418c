"""Which processes of a machine are ranks of a start: seen from the outside, while they come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from launch import processes

FORKS = """
import os, time
child = os.fork()
if child == 0:
    time.sleep(100)
print(child, flush=True)
os.waitpid(child, 0)
time.sleep(100)
"""


@pytest.fixture
def forked() -> Iterator[tuple[int, int]]:
    """A rank, and a process that it has forked and that runs no program of its own."""
    environment = os.environ | {processes.RUN_ID: "a-start"}
    rank = subprocess.Popen([sys.executable, "-c", FORKS], env=environment, stdout=subprocess.PIPE, text=True)
    with rank:
        assert rank.stdout is not None
        yield rank.pid, int(rank.stdout.readline())
        processes.kill(-1, "a-start")


def test_what_a_rank_forks_is_no_rank(forked: tuple[int, int]) -> None:
    assert set(processes.members(-1, "a-start")) == set(forked)
    assert processes.ranks([sys.executable, "-c"], "a-start") == {forked[0]}


def test_a_fork_that_ends_while_it_is_looked_at_is_no_rank(
    forked: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be taken for a rank that has ended without a word."""
    rank, child = forked
    words = processes._words

    def and_then_it_ends(pid: int, file: str) -> list[bytes]:
        found = words(pid, file)
        if (pid, file) == (child, "environ") and found:
            os.kill(child, signal.SIGKILL)
            while os.path.exists(f"/proc/{child}"):
                time.sleep(0.01)
        return found

    monkeypatch.setattr(processes, "_words", and_then_it_ends)
    assert processes.ranks([sys.executable, "-c"], "a-start") == {rank}
    assert not processes.runs(child)
