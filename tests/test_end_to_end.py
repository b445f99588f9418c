"""The `harness` command with real ranks: runs, failures and wrong input as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import QUIET, ROOT, needs_mpirun

from harness.rundir import RunDir

pytestmark = [needs_mpirun, pytest.mark.mpi]
BIN = Path(sys.executable).parent
CONFIG = """
name: run
task: {name: "tasks_for_tests:Small"}
train: {steps: 12, global_batch: 16, micro_batch: 8}
optim: {name: momentum, lr: 0.05}
eval: {every: 6}
checkpoint: {every: 4}
log: {every: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "tasks_for_tests.py").write_bytes((ROOT / "tests" / "tasks_for_tests.py").read_bytes())
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [str(BIN / "harness"), "run", *arguments]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **(changes or {})}


def run(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None, program: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program or command(*arguments),
        cwd=folder,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def ranks_left(folder: Path) -> Iterator[int]:
    """Processes that still work in the folder: ranks, loaders, launchers."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if Path(os.readlink(entry / "cwd")) == folder and (entry / "cmdline").read_bytes():
                    yield int(entry.name)
            except OSError:
                continue


def nobody_is_left(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while (left := list(ranks_left(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]


def losses(folder: Path, kind: str = "train") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == kind}


def error(folder: Path) -> dict[str, Any]:
    return RunDir(folder / "runs/run").attempts()[-1].errors()[0]


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "local"])
def test_a_run_leaves_what_the_readme_says(folder: Path, launcher: str) -> None:
    ranks = "1" if launcher == "local" else "2"
    # a save that is due while one is under way would be left out
    done = run(folder, "run.yaml", "checkpoint.mode=wait", "-n", ranks, "--launcher", launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    root = folder / "runs/run"
    status = json.loads((root / "status.json").read_text())
    assert (status["state"], status["step"], status["last_checkpoint"]) == ("finished", 12, 12)
    assert sorted(losses(folder)) == [2, 4, 6, 8, 10, 12]
    assert sorted(losses(folder, "eval")) == [6, 12]
    assert sorted(path.name for path in (root / "checkpoints").glob("step-*")) == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    attempt = RunDir(root).attempts()[0]
    assert "step 12/12" in attempt.log(0).read_text()
    assert attempt.log(1).exists() == (launcher != "local")
    assert json.loads(attempt.command.read_text())
    assert "step 12/12" in done.stdout
    assert "MPI" not in done.stderr
    nobody_is_left(folder)


@pytest.mark.parametrize(
    "program",
    [
        ["mpirun", "-np", "2"],
        ["mpirun", "-np", "1"],
        [str(BIN / "horovodrun"), "-np", "2"],
        [str(BIN / "horovodrun"), "-np", "2", "--gloo"],
        [],
    ],
    ids=["mpirun", "mpirun-one-rank", "horovodrun", "horovodrun-gloo", "alone"],
)
def test_ranks_start_under_any_launcher_by_hand(folder: Path, program: list[str]) -> None:
    """And resume on another number of ranks under `harness run`, with the same losses as one run."""
    module = [sys.executable, "-m", "harness"]
    first = run(folder, program=[*program, *module, "run.yaml", "train.steps=8"], env=QUIET)
    assert first.returncode == 0, first.stdout + first.stderr
    second = run(folder, "run.yaml", "-n", "4")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resumed from the checkpoint at step 8" in second.stdout
    split = losses(folder)
    straight = run(folder, "run.yaml", "run_dir=runs/run2", "-n", "1")
    assert straight.returncode == 0
    (folder / "runs/run/metrics.jsonl").unlink()
    (folder / "runs/run2/metrics.jsonl").rename(folder / "runs/run/metrics.jsonl")
    assert losses(folder) == pytest.approx(split, rel=1e-4)


def test_the_frozen_config_goes_on_with_the_run(folder: Path) -> None:
    assert run(folder, "run.yaml", "train.steps=6", "-n", "2").returncode == 0
    again = run(folder, "runs/run", "-n", "2")
    assert again.returncode == 0
    assert again.stderr == "runs/run is finished: nothing to train after step 6; a higher train.steps goes on\n"
    assert not again.stdout
    more = run(folder, "runs/run/config.yaml", "train.steps=12", "-n", "2")
    assert more.returncode == 0, more.stdout + more.stderr
    assert sorted(losses(folder)) == [2, 4, 6, 8, 10, 12]
    assert [attempt.number for attempt in RunDir(folder / "runs/run").attempts()] == [1, 2], "no rank was started"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_is_the_cause_that_is_told(folder: Path, rank: int) -> None:
    done = run(folder, "run.yaml", "task.name=tasks_for_tests:Raises", f"task.args.rank={rank}", "-n", "2")
    assert done.returncode == 1
    cause = error(folder)
    assert (cause["rank"], cause["step"], cause["section"]) == (rank, 5, "forward/backward")
    assert (cause["type"], cause["message"]) == ("ValueError", "label 17 is out of range")
    told = done.stdout + done.stderr
    assert f"rank {rank}" in told
    assert "step 5" in told
    assert "forward/backward" in told
    assert told.count("label 17 is out of range") <= 3  # the sentence, and the traceback's last two lines
    assert "in trouble" in told
    assert "MPI_ABORT" not in told
    assert "mpirun" not in told.replace(str(folder), "")
    nobody_is_left(folder)
    status = json.loads((folder / "runs/run/status.json").read_text())
    assert status["state"] == "failed"


@pytest.mark.parametrize(("task", "code"), [("Dies", 137), ("Exits", 1)])
def test_a_rank_that_just_goes_away_ends_the_job(folder: Path, task: str, code: int) -> None:
    done = run(folder, "run.yaml", f"task.name=tasks_for_tests:{task}", "-n", "2")
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or task == "Exits"
    nobody_is_left(folder)
    again = run(folder, "run.yaml", "-n", "2", "run_dir=runs/other")
    assert again.returncode == 0


def test_an_error_of_the_data_set_names_its_section(folder: Path) -> None:
    for workers in (0, 1):
        done = run(
            folder, "run.yaml", "task.name=tasks_for_tests:BadData", f"data.workers={workers}", "-n", "2",
            f"run_dir=runs/w{workers}",
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        (cause, *_) = RunDir(folder / f"runs/w{workers}").attempts()[-1].errors()
        assert (cause["section"], cause["type"]) == ("data", "OSError")
        assert "sample-" in done.stdout + done.stderr
        nobody_is_left(folder)


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_result(folder: Path) -> None:
    slow = ["run.yaml", "task.name=tasks_for_tests:Slow", "train.steps=60", "checkpoint.every=1000", "-n", "2"]
    straight = run(folder, *slow, "run_dir=runs/straight")
    assert straight.returncode == 0, straight.stdout + straight.stderr
    process = subprocess.Popen(
        command(*slow), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 75, rest
    assert "state saved" in rest
    nobody_is_left(folder)
    stopped = json.loads((folder / "runs/run/status.json").read_text())
    assert stopped["state"] == "stopped"
    assert 4 < stopped["step"] < 60
    done = run(folder, *slow)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from the checkpoint at step {stopped['step']}" in done.stdout
    resumed = losses(folder)
    (folder / "runs/run/metrics.jsonl").write_bytes((folder / "runs/straight/metrics.jsonl").read_bytes())
    assert resumed == losses(folder)


def test_ctrl_c_twice_ends_at_once(folder: Path) -> None:
    process = subprocess.Popen(
        command("run.yaml", "task.name=tasks_for_tests:Slow", "train.steps=2000", "log.every=1000", "-n", "2",
                "checkpoint.every=6", "train.micro_batch=1"),
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "checkpoint at step 6" in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # the ranks next ask each other after some steps, each of several passes
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(30) == 130, rest
    nobody_is_left(folder)
    assert list((folder / "runs/run/checkpoints").glob("step-????????/manifest.json"))


def test_two_starts_in_one_run_directory(folder: Path) -> None:
    slow = ["run.yaml", "task.name=tasks_for_tests:Slow", "train.steps=200", "-n", "1"]
    first = subprocess.Popen(
        command(*slow), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("step "):
            break
    config = (folder / "runs/run/config.yaml").read_bytes()
    second = run(folder, *slow, "train.steps=300")
    assert second.returncode == 69
    assert f"runs/run is running already: process {first.pid} on {socket.gethostname()}, since 20" in second.stderr
    assert (folder / "runs/run/config.yaml").read_bytes() == config
    assert not (folder / "runs/run/config.1.yaml").exists()
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 75, first.stdout.read()
    assert len(RunDir(folder / "runs/run").attempts()) == 1
    nobody_is_left(folder)


WRONG = {
    "missing file": (["nope.yaml"], 66, "nope.yaml"),
    "unknown key": (["run.yaml", "optim.lrr=1"], 78, "did you mean optim.lr?"),
    "wrong type": (["run.yaml", "train.steps=many"], 78, "'many' is not a whole number"),
    "batch": (["run.yaml", "train.global_batch=15", "-n", "2"], 78, "train.global_batch=14 or 16"),
    "slots": (["run.yaml", "-n", "4", "-H", "localhost:2"], 64, "4 ranks are more than the 2 slots"),
    "task module": (["run.yaml", "task.name=no_such_module:X"], 78, "there is no module 'no_such_module'"),
    "task class": (["run.yaml", "task.name=tasks_for_tests:Nope"], 78, "has no Nope"),
    "task methods": (["run.yaml", "task.name=tasks_for_tests:Incomplete"], 78, "no data and no loss"),
    "task arguments": (["run.yaml", "task.name=tasks_for_tests:WrongConstructor"], 78, "needed"),
    "empty data": (["run.yaml", "task.name=tasks_for_tests:Nothing"], 78, "empty"),
    "too small data": (["run.yaml", "train.global_batch=2048"], 78, "1440"),
    "precision": (["run.yaml", "train.precision=fp16"], 78, "needs a GPU"),
    "optimizer": (["run.yaml", "optim.name=torch.optim:LBFGS", "optim.momentum=null"], 78, "closure"),
    "read-only": (["run.yaml", "run_dir=/sys/harness"], 74, "/sys/harness"),
    "run_dir is a file": (["run.yaml", "run_dir=run.yaml/x"], 74, "run.yaml"),
    "usage": (["run.yaml", "--colour"], 64, "--colour"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_sentence_with_its_exit_code(folder: Path, name: str) -> None:
    arguments, code, sentence = WRONG[name]
    done = run(folder, *arguments)
    told = done.stdout + done.stderr
    assert done.returncode == code, told
    assert sentence in " ".join(told.split()), told
    assert "Traceback" not in told
    nobody_is_left(folder)


def test_unreadable_yaml(folder: Path) -> None:
    (folder / "run.yaml").write_text("name: [x\ntask: 1\n")
    done = run(folder, "run.yaml")
    assert done.returncode == 78
    assert "run.yaml:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_directory_of_another_config_is_left_alone(folder: Path) -> None:
    assert run(folder, "run.yaml", "-n", "1").returncode == 0
    before = (folder / "runs/run/config.yaml").read_bytes()
    done = run(folder, "run.yaml", "optim.lr=0.5", "-n", "1")
    assert done.returncode == 78
    assert "optim.lr" in done.stderr
    assert "0.05" in done.stderr
    assert (folder / "runs/run/config.yaml").read_bytes() == before
    assert len(RunDir(folder / "runs/run").attempts()) == 1


def test_without_mpirun(folder: Path) -> None:
    done = run(folder, "run.yaml", "-n", "2", env={"PATH": f"{BIN}"})
    assert done.returncode == 69
    assert "mpirun" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_different_mpis_are_told_with_all_three_views(folder: Path) -> None:
    """What a MPICH launcher looks like to ranks whose mpi4py is built with Open MPI."""
    done = run(
        folder,
        program=[sys.executable, "-m", "harness", "run.yaml"],
        env={**QUIET, "PMI_RANK": "0", "PMI_SIZE": "2"},
    )
    assert done.returncode == 69, done.stdout + done.stderr
    for view in ("the environment says rank 0 of 2", "COMM_WORLD says rank 0 of 1", "Horovod says rank 0 of 1"):
        assert view in done.stderr
