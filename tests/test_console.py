"""Parting what ranks print from the launcher's noise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.console import Parted

RULE = b"-" * 74 + b"\n"
OPEN_MPI = (
    RULE
    + b"Primary job  terminated normally, but 1 process returned\n"
    + b"a non-zero exit code. Per user-direction, the job has been aborted.\n"
    + RULE
    + RULE
    + b"mpirun detected that one or more processes exited with non-zero status, thus causing\n"
    + b"the job to be terminated. The first process to do so was:\n\n"
    + b"  Process name: [[63363,1],0]\n  Exit code:    3\n"
    + RULE
    + b"[node:123] 1 more process has sent help message help-mpi-api.txt / mpi-abort\n"
)
HYDRA = (
    b"=" * 83
    + b"\n=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 1234 RUNNING AT host\n=   EXIT CODE: 9\n"
    + b"=   CLEANING UP REMAINING PROCESSES\n=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES\n"
    + b"=" * 83
    + b"\nYOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n"
    + b"This typically refers to a problem with your application.\nPlease see the FAQ page for debugging suggestions\n"
)
SRUN = (
    b"srun: error: n01: task 1: Exited with exit code 1\n"
    b"slurmstepd: error: *** STEP 12.0 ON n01 CANCELLED ***\n"
    b"slurmstepd-n01: error: *** STEP 12.0 ON n01 CANCELLED AT 2026-01-01T00:00:00 ***\n"
    b"slurmstepd-n01: error:  mpi/pmix_v4: _errhandler: n01 [0]: Error handler invoked: status = -61\n"
)


def _through(part: Parted, data: bytes, size: int = 10**6) -> bytes:
    shown = b"".join(part.feed(data[start : start + size]) for start in range(0, len(data), size))
    return shown + part.close()


@pytest.mark.parametrize("noise", [OPEN_MPI, SRUN, b"[proxy:0:0@host] HYD_pmcd_pmip_control_cmd_cb (x.c:1): assert\n"])
@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_noise_of_stderr_is_kept_out_and_kept(noise: bytes, size: int) -> None:
    part = Parted(errors=True)
    assert _through(part, b"before\n" + noise + b"after\n", size) == b"before\nafter\n"
    assert len(part.noise) > 0
    assert not any(set(line) <= {"-"} for line in part.noise)


def test_noise_of_hydra_comes_on_stdout() -> None:
    part = Parted(errors=False)
    assert _through(part, b"before\n" + HYDRA + b"after\n") == b"before\nafter\n"
    assert any("EXIT CODE: 9" in line for line in part.noise)


def test_a_table_on_stdout_passes() -> None:
    table = RULE + b"word   count\n" + RULE + b"a  1\n"
    assert _through(Parted(errors=False), table) == table


def test_a_long_text_between_rules_on_stderr_passes() -> None:
    text = RULE + b"".join(b"row %d\n" % number for number in range(100)) + RULE[:-1]
    assert _through(Parted(errors=True), text) == text


def test_an_unclosed_notice_is_not_lost() -> None:
    assert _through(Parted(errors=True), RULE + b"half\n") == RULE + b"half\n"


def test_a_progress_bar_passes_before_its_line_ends() -> None:
    part = Parted(errors=False)
    assert part.feed(b"\r 10 %") == b""
    assert part.idle() == b"\r 10 %"
    assert part.feed(b"\r 20 %") == b""
    assert part.idle() == b"\r 20 %"
    assert part.feed(b" done\nnext\n") == b" done\nnext\n"


def test_what_may_become_noise_waits_for_its_end() -> None:
    part = Parted(errors=True)
    part.feed(b"-----")
    assert part.idle() == b""
    assert part.feed(b"> an arrow\n") == b"-----> an arrow\n"


@pytest.mark.parametrize(
    "data", [b"[1,0]<stdout>:hello from[1,0]<stdout>: [1,0]<stdout>:0[1,0]<stdout>:\n", b"[0]<stdout>:hello from 0\n"]
)
def test_tags_of_horovodrun_are_taken_off(data: bytes) -> None:
    assert _through(Parted(errors=False, tagged=True), data) == b"hello from 0\n"
    assert _through(Parted(errors=False), data) == data


@given(st.binary(max_size=300), st.integers(1, 50), st.booleans())
def test_ordinary_output_passes_unchanged(data: bytes, size: int, errors: bool) -> None:
    lines = b"\n".join(line.replace(b"-", b"").replace(b"=", b"").replace(b"[", b"") for line in data.split(b"\n"))
    if any(word in lines for word in (b"run: ", b"stepd: ", b"mpiexec: ", b"Abort")):
        return
    assert _through(Parted(errors=errors), lines, size) == lines


@given(
    st.lists(st.sampled_from([b"row\n", RULE, b"[n:1] x\n", b"=   a\n", b"\r5 %", b"\n"]), max_size=30),
    st.integers(1, 90),
)
def test_nothing_is_lost(pieces: list[bytes], size: int) -> None:
    """Every line is either shown or kept as noise, in whatever pieces it arrives, with pauses between them."""
    data = b"".join(pieces)
    part = Parted(errors=True)
    shown = b""
    for start in range(0, len(data), size):
        shown += part.feed(data[start : start + size]) + part.idle()
    shown += part.close()
    kept = "".join(part.noise)
    assert shown.count(b"row") + kept.count("row") == data.count(b"row")


def test_what_horovodrun_says_of_ranks_that_have_ended_is_kept_not_shown() -> None:
    said = [
        b"[1]<stderr>:Killed\n",
        b"Process 1 exit with status code 137.\n",
        b"[2026-11-21 16:45:26. 97713: E /src/horovod/common/operations.cc:697] [0]: Horovod background loop\n",
        b"[0]<stderr>:Aborted (core dumped)\n",
        b"ERROR:root:failure count == 2 -> stop running\n",
    ]
    for errors in (True, False):
        parted = Parted(errors=errors, tagged=True)
        shown = b"".join(parted.feed(line) for line in said) + parted.feed(b"[0]<stdout>:Killed 3 bugs\n")
        assert shown + parted.close() == b"Killed 3 bugs\n"
        assert "Process 1 exit with status code 137." in parted.noise and len(parted.noise) == len(said)
    assert Parted(errors=True).feed(b"Killed\n") == b"Killed\n", "another launcher's ranks may say so"


def test_a_traceback_of_horovodrun_is_kept_not_shown_and_one_of_a_rank_is_shown() -> None:
    own = (
        b"Traceback (most recent call last):\n"
        b'  File "/env/bin/horovodrun", line 6, in <module>\n    sys.exit(run_commandline())\n'
        b"RuntimeError: Horovod detected that one or more processes exited with non-zero status. The first was:\n"
        b"Process name: 127.0.0.1[0]\nExit code: 75\n\n"
    )
    of_rank = b"".join(
        b"[0]<stderr>:" + line + b"\n" for line in (b"Traceback (most recent call last):", b'  File "x"', b"", b"E: y")
    )
    thread = b"Exception in thread Thread-1:\n" + own
    for size in (1, 50, 10**6):
        parted = Parted(errors=True, tagged=True)
        shown = _through(parted, own + of_rank + b"horovodrun: wrong\n" + thread, size)
        assert shown == of_rank.replace(b"[0]<stderr>:", b"") + b"horovodrun: wrong\n"
        assert list(parted.noise).count("Exit code: 75") == 2
    assert Parted(errors=True).feed(own) == own, "another launcher has no such thing"


def test_what_horovodrun_says_of_ranks_can_be_taken_at_once() -> None:
    parted = Parted(errors=False, tagged=True)
    parted.feed(b"[1]<stdout>:step 5\nProcess 1 exit with status code 137.\n")
    assert list(parted.ended) == ["Process 1 exit with status code 137."]


def test_which_host_cannot_be_reached_is_shown_and_kept_without_a_traceback() -> None:
    said = [
        b"Launching horovod task function was not successful:\n",
        b"Traceback (most recent call last):\n",
        b'  File "task_fn.py", line 66, in <module>\n',
        b"x.TimeoutException: Timed out waiting for tasks to start. Please check connectivity\n",
        b"\n",
        b"resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 10 leaked semaphore objects\n",
        b"  warnings.warn('resource_tracker: There appear to be %d '\n",
    ]
    why = b"ssh: connect to host n07 port 22: Connection refused\n"
    for errors in (True, False):
        parted = Parted(errors=errors, tagged=True)
        assert b"".join(parted.feed(line) for line in (*said, why)) + parted.close() == why
        assert {"Launching horovod task function was not successful:", why.decode().strip()} <= set(parted.noise)
    assert Parted(errors=True).feed(said[1]) == said[1], "another launcher's ranks may say so"
