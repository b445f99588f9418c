"""How an end is judged from error files, status and exit code; and what is told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import Exit
from harness.heartbeat import Heartbeat
from launch.report import judge, shell_code
from launch.watch import Hang

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


BEAT = Heartbeat(
    rank=3, size=4, host="n07", pid=7, section="data", step=811, seconds=1.0, waits=False, beat=9
)  # fmt: skip
NOTICED = "mpirun noticed that process rank 3 with PID 0 on node n07 exited on signal 9 (Killed)."
HANG = Hang(3, "n07", "rank 3 of 4 on n07 is stopped (SIGSTOP), last seen in data at step 811, 40 s ago")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, "crash"), (64, "user"), (65, "user"), (66, "user"), (69, "user"), (70, "crash"), (74, "io"), (78, "user")],
)
def test_the_kind_follows_from_the_code(code: int, kind: str) -> None:
    assert judge([ERROR | {"code": code}], {}, attempt=1, returncode=1).kind == kind
    assert judge([], {}, attempt=1, returncode=code).kind == kind


def test_kinds_of_good_ends() -> None:
    assert judge([], {"state": "finished", "attempt": 1}, attempt=1, returncode=0).kind == "finished"
    assert judge([], {"state": "stopped", "attempt": 1}, attempt=1, returncode=75).kind == "stopped"
    assert judge([], {}, attempt=1, returncode=75).kind == "stopped"


def test_a_killed_rank_was_last_seen_where_its_heartbeat_says() -> None:
    status = {"step": 800, "attempt": 1}
    ending = judge([], status, attempt=1, returncode=137, noise=[NOTICED], heartbeats={3: BEAT})
    assert (ending.kind, ending.rank) == ("crash", 3)
    assert ending.cause == "rank 3 on n07 was ended by SIGKILL, last seen in data at step 811"
    ending = judge([], status, attempt=1, returncode=137, noise=[NOTICED])
    assert ending.cause == "rank 3 on n07 was ended by SIGKILL, last seen at step 800"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"noise": [NOTICED], "memory": True}, "memory"),
        ({"noise": [NOTICED, "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0"]}, "memory"),
        ({"noise": ["srun: error: n07: task 3: Out Of Memory"]}, "memory"),
        ({"errors": [ERROR | {"type": "OutOfMemoryError"}]}, "memory"),
        ({"noise": [NOTICED.replace("signal 9", "signal 11")], "memory": True}, "crash"),
        ({"memory": True, "returncode": 139}, "crash"),
    ],
)
def test_too_little_memory(arguments: dict[str, Any], kind: str) -> None:
    ending = judge(**({"errors": [], "status": {}, "attempt": 1, "returncode": 137} | arguments))
    assert ending.kind == kind
    assert ending.state == "failed"


CANCELLED = "ON n01 CANCELLED AT 2026-11-21T21:34:05 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***"
"""As Slurm 22.05 says it; Hydra's words are those of MPICH 4.0.2."""


@pytest.mark.parametrize(
    ("noise", "host"),
    [
        (["ORTE has lost communication with a remote daemon.", "Remote daemon: [[25846,0],1] on node n07"], "n07"),
        (["ORTE was unable to reliably start one or more daemons."], None),
        (["srun: error: Node failure on n07", f"slurmstepd-n01: error: *** STEP 1.0 {CANCELLED}"], "n07"),
        ([f"slurmstepd-n01: error: *** JOB 1 {CANCELLED}"], None),
        (["[mpiexec@n01] control_cb (pm/pmiserv/pmiserv_cb.c:206): assert (!closed) failed"], None),
    ],
)
def test_a_host_that_is_gone(noise: list[str], host: str | None) -> None:
    lost = ERROR | {"type": "HorovodInternalError", "rank": 0}
    for errors in ([], [lost]):
        ending = judge(errors, {}, attempt=1, returncode=205, noise=noise, heartbeats={3: BEAT})
        assert (ending.kind, ending.host, ending.state, ending.code) == ("lost", host, "failed", 1)
    assert judge([ERROR], {}, attempt=1, returncode=1, noise=noise).kind == "crash", "a rank has told the cause"
    if host:
        assert "the host n07 is gone; rank 3 of 4 on it was last seen in data at step 811" in ending.text


@pytest.mark.parametrize(
    ("noise", "host"),
    [
        (
            ["ssh: connect to host n07 port 22: Connection refused", "ORTE was unable to reliably start one or more"],
            "n07",
        ),
        (["ssh: Could not resolve hostname n07: Name or service not known"], "n07"),
        (["ssh not successful for host n07:", "RuntimeError: could not connect to some hosts via ssh"], "n07"),
        (["Launching horovod task function was not successful:"], None),
        (["x.TimeoutException: Timed out waiting for tasks to start. Please check connectivity between"], None),
    ],
)
def test_a_host_that_cannot_be_reached(noise: list[str], host: str | None) -> None:
    ending = judge([], {}, attempt=1, returncode=255, noise=noise)
    assert (ending.kind, ending.host, ending.code) == ("lost", host, 1)
    assert ending.cause == (f"the host {host} cannot be reached" if host else "a host cannot be reached")
    assert f"`ssh {host or 'HOST'} true` must work without a question" in ending.text
    later = judge([], {}, attempt=1, returncode=1, noise=noise, heartbeats={3: BEAT})
    assert "is gone" in later.text or "has lost a host" in later.text


def test_a_code_that_is_no_signal() -> None:
    assert judge([], {}, attempt=1, returncode=255).cause.startswith("the ranks ended with code 255")


def test_a_hang_that_was_seen_is_the_cause_of_what_came_after() -> None:
    after = ERROR | {"type": "HorovodInternalError"}
    status = {"state": "stopped", "attempt": 1}
    for errors in ([], [after]):
        ending = judge(errors, status, attempt=1, returncode=143, hang=HANG, killed=HANG.text)
        assert (ending.kind, ending.rank, ending.cause, ending.code) == ("hang", 3, HANG.text, 1)
    assert judge([ERROR], {}, attempt=1, returncode=1, hang=HANG).kind == "crash"
    lost = judge([], {}, attempt=1, returncode=1, hang=Hang(3, "n07", "x", lost=True))
    assert (lost.kind, lost.host) == ("lost", "n07")


def test_a_code_that_our_own_signal_has_made_is_not_told() -> None:
    ending = judge([], {}, attempt=1, returncode=143, killed="a rank ended without a word")
    assert (ending.kind, ending.code, ending.cause) == ("crash", 1, "a rank ended without a word")


def test_a_hang_told_by_a_rank() -> None:
    message = "last seen in data at step 811 for 10 min, longer than watchdog.data (10 min) allows"
    ending = judge([ERROR | {"kind": "hang", "type": "Hang", "message": message}], {}, attempt=1, returncode=1)
    assert (ending.kind, ending.code) == ("hang", 1)
    assert ending.text == f"error: rank 1 of 4 on n02 hangs: {message}"


def test_horovodrun_says_which_rank_went_and_how() -> None:
    said = [
        "Process 3 exit with status code 0.",
        "Process 1 exit with status code 137.",
        "Process 0 exit with status code 1.",
    ]
    here = Heartbeat(1, 4, "n02", 7, "data", 120, 1.0, False, 5)
    ending = judge([], {}, attempt=1, returncode=1, noise=said, heartbeats={1: here})
    assert (ending.code, ending.rank, ending.kind) == (137, 1, "crash"), "the first one has ended the others"
    assert ending.text.startswith("error: rank 1 on n02 was ended by SIGKILL, last seen in data at step 120")
    assert judge([], {}, attempt=1, returncode=1, noise=said, memory=True).kind == "memory"
    last = judge([], {}, attempt=1, returncode=1, noise=said, elastic=True)
    assert (last.code, last.rank) == (1, 0), "an elastic run has survived the others"
    assert last.text == "error: rank 0 ended with code 1 and left no error report"


def test_what_an_elastic_run_has_survived_is_no_cause() -> None:
    for state, code in (("finished", 0), ("stopped", 75)):
        status = {"state": state, "attempt": 1}
        assert judge([ERROR], status, attempt=1, returncode=1, elastic=True).code == code
        assert judge([ERROR], status, attempt=1, returncode=1).code == 1
    assert judge([ERROR], {"state": "running", "attempt": 1}, attempt=1, returncode=1, elastic=True).rank == 1


def test_horovodrun_has_a_code_of_its_own_for_ranks_that_have_stopped() -> None:
    status = {"state": "stopped", "attempt": 1}
    said = ["Process 0 exit with status code 75.", "Process 1 exit with status code 75."]
    assert judge([], status, attempt=1, returncode=1, noise=said).text == ""
    assert judge([], status, attempt=1, returncode=1).text.startswith("note: the ranks ended with code 1")


def test_a_killed_launcher_is_the_cause_of_what_ranks_say_of_it() -> None:
    shut = ERROR | {"type": "HorovodInternalError", "message": "Horovod has been shut down"}
    ending = judge([shut], {}, attempt=1, returncode=-9)
    assert (ending.code, ending.rank) == (137, None)
    assert ending.text.startswith("error: the launcher was ended by SIGKILL")
    assert judge([ERROR], {}, attempt=1, returncode=-9).rank == 1, "but not of their own mistakes"
    assert judge([shut], {"state": "finished", "attempt": 1}, attempt=1, returncode=-9).code != 137
