"""`harness status`, `logs` and `stop`: what they find out, what they say, and how they are wrong in a sentence."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from harness.rundir import RunDir, write_json
from launch import jobs
from launch.cli import execute
from launch.runs import Life, find_runs, look
from launch.status import facts


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in its own directory, without any Slurm command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def make(name: str, *, state: str = "running", attempt: dict[str, Any] | None = None, **fields: Any) -> RunDir:
    run = RunDir(Path(name))
    run.root.mkdir(parents=True)
    run.config.write_text("name: x\n")
    started = run.new_attempt()
    write_json(started.command, {"host": socket.gethostname(), "ranks": 2, "slurm": None} | (attempt or {}))
    write_json(
        run.status,
        {"state": state, "step": 8, "steps": 12, "attempt": started.number, "time": time.time()} | fields,
    )
    return run


@pytest.fixture
def running() -> Iterator[RunDir]:
    run = make("runs/a", rate=2.0, eta_s=90.0, loss=0.25)
    with open(run.root / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield run


def saved(run: RunDir, *steps: int) -> None:
    for step in steps:
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (run.checkpoints / f"step-{step:08d}" / "manifest.json").write_text("{}")
    (run.checkpoints / "step-00000099.tmp-1").mkdir(parents=True)


def test_a_running_run_in_full(running: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    saved(running, 4, 8)
    assert execute(["status", "runs/a"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["state"] == "running"
    assert said["step"] == "8/12"
    assert said["rate"] == "2 steps/s"
    assert said["left"] == "1 min 30 s"
    assert said["checkpoint"] == "step 8"
    assert said["attempts"].startswith("1, the last with 2 ranks from ")


def test_the_checkpoint_is_the_one_that_a_restart_goes_on_from(running: RunDir) -> None:
    assert look(running).last_checkpoint is None
    saved(running, 4, 8, 12, 16)
    assert look(running).last_checkpoint == 16
    (running.checkpoints / "step-00000016" / "aside.json").write_text("{}")
    (running.checkpoints / "step-00000012" / "damaged.json").write_text("{}")
    (running.checkpoints / "step-00000008").rename(running.checkpoints / "step-00000008-2")
    assert look(running).last_checkpoint == 8


def test_the_same_as_json(running: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["status", "runs/a", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["step"], told["steps"], told["rate"]) == ("running", 8, 12, 2.0)


@pytest.mark.parametrize("state", ["running", "starting"])
def test_a_run_that_nobody_runs_is_lost(state: str) -> None:
    life = look(make("runs/a", state=state))
    assert (life.state, life.alive, life.rate) == ("lost", False, None)
    assert life.ended == "it ended without a word"


@pytest.mark.parametrize(
    ("state", "job", "command"),
    [
        ("stopped", None, "harness run 'runs/a b'"),
        ("failed", None, "harness run 'runs/a b'"),
        ("lost", "17", "harness submit 'runs/a b'"),
        ("running", None, None),
        ("queued", "17", None),
        ("finished", None, None),
    ],
)
def test_how_a_run_goes_on_is_told(state: str, job: str | None, command: str | None) -> None:
    assert dict(facts(Life("runs/a b", state, job=job))).get("go on with") == command


def test_a_run_on_another_host_is_believed_as_long_as_it_gives_signs_of_life() -> None:
    assert look(make("a", attempt={"host": "elsewhere"})).state == "running"
    assert look(make("b", attempt={"host": "elsewhere"}, time=time.time() - 3600)).state == "lost"


def test_the_cause_of_the_last_end_is_the_first_error() -> None:
    run = make("runs/a", state="failed", summary="something after it")
    error = {"rank": 1, "host": "n7", "step": 5, "type": "ValueError", "message": "label 17\nmore", "time": 1.0}
    write_json(run.attempts()[0].error(1), error)
    write_json(run.attempts()[0].error(0), error | {"rank": 0, "type": "HorovodInternalError", "time": 0.5})
    assert look(run).ended == "rank 1 on n7 at step 5: ValueError: label 17"


def test_what_no_rank_could_see_is_told_as_harness_run_has_judged_it() -> None:
    run = make("runs/a", state="failed", summary="something else")
    ending = {"kind": "lost", "summary": "the host n2 is gone", "restart": False}
    write_json(run.attempts()[0].ending, ending)
    assert look(run).ended == "lost: the host n2 is gone"
    consequence = {"rank": 0, "host": "n1", "step": 5, "type": "HorovodInternalError", "message": "a peer is gone"}
    write_json(run.attempts()[0].error(0), consequence)
    assert look(run).ended == "lost: the host n2 is gone"


def test_a_run_that_waits_for_its_restart_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    run = make("runs/a", state="failed", summary="rank 1 hangs")
    write_json(run.attempts()[0].ending, {"kind": "hang", "summary": "rank 1 is silent", "restart": True})
    with open(run.root / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert execute(["status"]) == 0
        line = capsys.readouterr().out.splitlines()[1].split()
    assert line[:2] == ["a", "restarting"]
    assert line[-5:] == ["hang:", "rank", "1", "is", "silent"]
    assert look(run).state == "failed"


def test_a_status_of_an_earlier_attempt_says_nothing_about_this_one() -> None:
    run = make("runs/a", state="finished", summary="12 steps")
    write_json(run.new_attempt().command, {"host": socket.gethostname()})
    assert look(run).state == "lost"


def test_all_runs_below_a_directory_as_a_table(running: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    make("runs/deep/b", state="finished", step=12)
    make("runs/deep/c", state="failed", summary="no space left")
    make("runs/.hidden/d")
    make("runs/e", state="stopped", summary="stopped at step 8 of 12 (signal USR2), state saved")
    (running.root / "checkpoints" / "config.yaml").mkdir(parents=True)
    assert execute(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["a", "running", "8/12"],
        ["deep/b", "finished", "12/12"],
        ["deep/c", "failed", "8/12"],
        ["e", "stopped", "8/12"],
    ]
    assert "no space left" in lines[3]
    assert "(signal USR2)" in lines[4]


def test_a_status_that_is_no_status_is_survived() -> None:
    run = make("runs/a")
    for text in ("", "[]", '{"state": 5, "step": "many", "time": null}', "\0"):
        run.status.write_text(text)
        assert look(run).attempts == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["status", "nope"], "there is no run nope"),
        (["status", "empty"], "there is no run below empty"),
        (["status", "empty/runs"], "there is no run empty/runs"),
        (["logs", "nope"], "there is no run nope"),
        (["logs", "empty"], "empty is not a run directory"),
        (["logs", "file"], "file is not a run directory"),
        (["stop", "empty"], "empty is not a run directory"),
        (["logs", "runs/a", "--attempt", "7"], "runs/a has no attempt 7\n  it has attempts 1 to 1"),
        (["logs", "runs/a", "--rank", "9"], "attempt 1 has no log of rank 9\n  it has logs of ranks 0 to 2"),
    ],
)
def test_what_is_not_there_is_said(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("runs/a")
    Path("empty").mkdir()
    Path("file").write_text("")
    for rank in range(3):
        run.attempts()[0].log(rank).write_text("")
    assert execute(arguments) == 66
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_where_nobody_has_run_anything_the_first_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["status"]) == 66
    told = "error: there is no directory runs\n  `harness run CONFIG` starts a run; or give a directory with runs\n"
    assert capsys.readouterr().err == told


def test_a_run_is_found_by_its_name(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run = make("runs/a")
    run.attempts()[0].log(1).write_bytes(b"from rank 1 \xff\n")
    assert execute(["logs", "a", "--rank", "1"]) == 0
    assert capfdbinary.readouterr().out == b"from rank 1 \xff\n"


def test_logs_are_followed_until_the_end_and_into_the_next_attempt(tmp_path: Path) -> None:
    run = make("runs/a")
    first = run.attempts()[0].log(0)
    first.write_text("one\n")
    lock = open(run.root / "lock", "w")  # noqa: SIM115 - closed below
    fcntl.flock(lock, fcntl.LOCK_EX)
    command = [sys.executable, "-m", "launch.cli", "logs", "runs/a", "--follow"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        with first.open("a") as file:
            file.write("two\n")
        assert process.stdout.readline() == "two\n"
        second = run.new_attempt()
        write_json(second.command, {"host": socket.gethostname()})
        second.log(0).write_text("three\n")
        assert process.stdout.readline() == "three\n"
        lock.close()
        assert process.stdout.read() == ""
        assert process.wait() == 0
    finally:
        lock.close()
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_stop_asks_a_run_that_runs(running: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["stop", "runs/a"]) == 0
    assert "runs/a is running at step 8; it saves its state and stops" in capsys.readouterr().out
    assert running.stop.read_text().startswith("asked by ")
    assert look(running).state == "stopping"


def test_stop_makes_no_file_where_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run = make("runs/a", state="finished", summary="12 steps")
    saved(run, 12)
    assert execute(["stop", "runs/a"]) == 0
    assert "runs/a is not running: finished, 12 steps; the state of step 12 is saved" in capsys.readouterr().out
    assert not run.stop.exists()


def test_stop_waits_no_longer_than_told(running: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["stop", "runs/a", "--timeout", "0.2"]) == 69
    assert "runs/a is still running after 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize(("state", "code"), [("stopped", 0), ("failed", 1)])
def test_stop_waits_for_the_end(state: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("runs/a")
    lock = open(run.root / "lock", "w")  # noqa: SIM115 - closed below
    fcntl.flock(lock, fcntl.LOCK_EX)

    def end() -> None:
        while not run.stop.exists():
            time.sleep(0.01)
        write_json(run.status, run.read_status() | {"state": state, "summary": "the end"})
        lock.close()

    thread = threading.Thread(target=end)
    thread.start()
    try:
        assert execute(["stop", "runs/a", "--wait"]) == code
    finally:
        thread.join()
    assert f"runs/a: {state}, the end" in capsys.readouterr().out


def fake(here: Path, name: str, text: str) -> None:
    (here / "bin").mkdir(exist_ok=True)
    (here / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (here / "bin" / name).chmod(0o755)


def test_what_slurm_says_is_part_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{here / 'bin'}:/usr/bin:/bin")
    job = {"id": "17", "restarts": 2}
    fake(here, "squeue", "echo '17|17|RUNNING|None'; echo '18|18|PENDING|Priority'")
    life = look(make("a", attempt={"host": "n1", "slurm": job}))
    assert (life.state, life.job, life.job_state, life.restarts) == ("running", "17", "RUNNING", 2)
    run = make("b", state="stopped", summary="saved", attempt={"host": "n1", "slurm": job | {"id": "16"}})
    write_json(run.root / "submitted.json", {"jobs": ["16", "18"]})
    life = look(run)
    assert (life.state, life.job, life.job_state) == ("queued", "18", "PENDING (Priority)")
    fake(here, "squeue", "exit 0")
    fake(here, "sacct", "echo '17|TIMEOUT'")
    life = look(RunDir(Path("a")))
    assert (life.state, life.ended) == ("lost", "it ended without a word; Slurm says TIMEOUT")
    fake(here, "sacct", "exit 1")
    fake(here, "scontrol", 'echo "JobId=17 JobState=CANCELLED Reason=None"')
    assert look(RunDir(Path("a"))).job_state == "CANCELLED"


def test_a_slurm_that_does_not_answer_is_no_slurm(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{here / 'bin'}:/usr/bin:/bin")
    fake(here, "squeue", "exec sleep 30")
    monkeypatch.setattr(jobs, "PATIENCE", 0.2)
    assert jobs.states(["17"]) == {}
    assert jobs.states(["17; rm -rf /", "-j"]) == {}


def test_only_this_job_counts() -> None:
    assert jobs.job_of({}) is None
    assert jobs.job_of({"SLURM_JOB_ID": "x y"}) is None
    assert jobs.job_of({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}) == {
        "id": "17",
        "restarts": 2,
        "partition": None,
    }
    array = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
    assert (jobs.job_of(array) or {})["id"] == "17_1"


def test_runs_are_looked_for_only_so_deep(tmp_path: Path) -> None:
    make("a/b/c/d/e/f")
    make("b/b/c/d/e/f/g")
    assert [str(run.root) for run in find_runs(Path("."))] == ["a/b/c/d/e/f"]


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_quick(command: str) -> None:
    code = f"import sys, launch.{command}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "numpy", "h5py", "mpi4py"} & set(done.stdout.split())
