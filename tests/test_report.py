"""How an end is judged from error files, status and exit code; and what is told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import Exit
from launch.report import judge, shell_code

ERROR: dict[str, Any] = {
    "rank": 1, "size": 4, "host": "n02", "pid": 7, "time": 5.0, "step": 120, "section": "data", "type": "ValueError",
    "message": "bad image", "hint": None, "sentence": False, "code": 1,
    "traceback": "Traceback ...\nValueError: bad image\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "returncode", "code", "state"),
    [
        ({"state": "finished", "attempt": 2}, 0, 0, "finished"),
        ({"state": "finished", "attempt": 2}, 1, 0, "finished"),
        ({"state": "finished", "attempt": 1}, 1, 1, "failed"),
        ({"state": "stopped", "attempt": 2}, 75, 75, "stopped"),
        ({"state": "stopped", "attempt": 2}, 1, 75, "stopped"),
        ({}, 75, 75, "stopped"),
        ({"state": "running", "attempt": 2}, 0, 70, "failed"),
        ({"state": "running", "attempt": 2}, -9, 137, "failed"),
        ({"state": "running", "attempt": 2}, 139, 139, "failed"),
        ({}, 3, 3, "failed"),
        ({}, 78, 78, "failed"),
    ],
)
def test_order_of_evidence(status: dict[str, Any], returncode: int, code: int, state: str) -> None:
    ending = judge([], status, attempt=2, returncode=returncode)
    assert (ending.code, ending.state) == (code, state)


def test_an_error_file_comes_before_all() -> None:
    ending = judge([ERROR | {"code": 65}], {"state": "finished", "attempt": 1}, attempt=1, returncode=0)
    assert (ending.code, ending.state, ending.rank) == (65, "failed", 1)


def test_the_first_is_the_cause_unless_it_is_a_consequence() -> None:
    lost = ERROR | {"rank": 0, "type": "HorovodInternalError", "time": 1.0}
    assert judge([lost, ERROR], {}, attempt=1, returncode=1).rank == 1
    assert judge([ERROR, ERROR | {"rank": 3}], {}, attempt=1, returncode=1).rank == 1
    assert judge([lost], {}, attempt=1, returncode=1).rank == 0


def test_a_crash_is_told_whole() -> None:
    text = judge([ERROR, ERROR, ERROR], {}, attempt=1, returncode=1).text
    assert text.splitlines()[0] == "error: rank 1 of 4 on n02 failed at step 120 in data"
    assert "ValueError: bad image" in text
    assert "  Traceback ..." in text
    assert "2 other ranks failed after it" in text


def test_a_sentence_is_only_that() -> None:
    text = judge([ERROR | {"sentence": True, "hint": "do this"}], {}, attempt=1, returncode=1).text
    assert text == "error: bad image\n  do this"


def test_the_launchers_words_name_the_rank() -> None:
    line = "mpirun noticed that process rank 3 with PID 0 on node n07 exited on signal 11 (Segmentation fault)."
    ending = judge([], {"step": 12, "attempt": 1}, attempt=1, returncode=139, noise=["x", line])
    assert ending.text.startswith("error: rank 3 on n07 was ended by SIGSEGV, last seen at step 12")
    assert ending.rank == 3
    text = judge([], {}, attempt=1, returncode=1, noise=["not enough slots"]).text
    assert "the launcher said:\n  | not enough slots" in text


@pytest.mark.parametrize(
    ("line", "code", "rank", "told"),
    [
        ("n07: task 3: Exited with exit code 7", 7, 3, "rank 3 on n07 ended with code 7, last seen at step 12"),
        ("n07: tasks 2-3,5: Exited with exit code 1", 1, 2, "rank 2 on n07 ended with code 1"),
        ("n07: task 1: Segmentation fault (core dumped)", 139, 1, "rank 1 on n07 was ended by SIGSEGV"),
        ("n07: task 1: Killed", 137, 1, "rank 1 on n07 was ended by SIGKILL"),
    ],
)
def test_srun_names_the_first_rank(line: str, code: int, rank: int, told: str) -> None:
    """srun's own code is that of the ranks which it killed afterwards."""
    noise = [
        "srun: cluster configuration lacks support for cpu binding",
        f"srun: error: {line}",
        "srun: launch/slurm: _step_signal: Terminating StepId=5.6",
        "srun: error: n07: task 0: Killed",
    ]
    ending = judge([], {"step": 12, "attempt": 1}, attempt=1, returncode=137, noise=noise)
    assert (ending.code, ending.rank) == (code, rank)
    assert ending.text.startswith(f"error: {told}")


def test_srun_without_a_rank_is_quoted() -> None:
    line = "srun: error: Unable to create step for job 5: Requested node configuration is not available"
    ending = judge([], {}, attempt=1, returncode=1, noise=[line])
    assert (ending.code, ending.rank) == (1, None)
    assert f"  | {line}" in ending.text


def test_hydra_names_the_signal() -> None:
    ending = judge(
        [], {}, attempt=1, returncode=9, noise=["YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)"]
    )
    assert ending.code == 137
    assert "the ranks were ended by SIGKILL" in ending.text


def test_memory_is_suspected_after_a_kill() -> None:
    assert "too little memory" in judge([], {}, attempt=1, returncode=-9).text


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(ERROR)), st.none() | st.integers() | st.text(max_size=20) | st.lists(st.none())
    )
)
def test_hostile_error_files_are_told_somehow(entry: dict[str, Any]) -> None:
    ending = judge([entry], {}, attempt=1, returncode=1)
    assert 1 <= ending.code <= 255
    assert ending.text.startswith("error: ")


@given(st.integers(-64, 255))
def test_codes_are_a_shells(returncode: int) -> None:
    assert 0 <= shell_code(returncode) <= 255
    assert judge([], {}, attempt=1, returncode=returncode).code == (
        Exit.INTERNAL if returncode == 0 else shell_code(returncode)
    )
