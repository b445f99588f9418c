"""What makes a run stop: signals, the stop file, the clock; by itself and on two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import QUIET, ROOT, needs_mpirun

from harness import stop
from harness.config import Stop
from harness.errors import Unavailable
from harness.rundir import RunDir
from harness.stop import StopRequest, deadline
from launch import jobs
from launch.runs import look
from launch.timelimit import time_limit

BIN = Path(sys.executable).parent


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (*stop.SIGNALS, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop._early.clear()


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_a_signal_is_a_wish(name: str, handlers: None) -> None:
    request = StopRequest(None)
    request.install()
    assert not request.wanted()
    os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
    assert request.wanted()
    assert request.reason == f"signal {name}"


def test_signals_that_are_not_listed_keep_their_effect(handlers: None) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    request = StopRequest(None, signals=["USR2"])
    request.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not request.wanted()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert request.wanted()


def test_a_signal_before_training_is_remembered(handlers: None) -> None:
    stop.listen(["TERM", "USR2"])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # nothing to save yet: it ends the process
    os.kill(os.getpid(), signal.SIGUSR2)
    request = StopRequest(None)
    request.install()
    assert request.wanted()
    assert request.reason == "signal USR2"


def test_the_second_interrupt_ends_at_once(handlers: None) -> None:
    request = StopRequest(None)
    request.install()
    os.kill(os.getpid(), signal.SIGINT)
    assert request.wanted()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_file(tmp_path: Path) -> None:
    request = StopRequest(tmp_path / "stop")
    assert not request.wanted()
    (tmp_path / "stop").touch()
    assert request.wanted()
    assert request.reason == "the stop file"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"asked by me on n1\nmore", "the stop file: asked by me on n1"),
        (b"signal USR2\n", "the stop file: signal USR2"),
        (b"\x1b[2J \t \xff\0x" + b"y" * 10**6, "the stop file: [2J \ufffdx" + "y" * 190),
        (b"  \n", "the stop file"),
    ],
)
def test_the_file_says_who_asked(text: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "stop").write_bytes(text)
    request = StopRequest(tmp_path / "stop")
    assert request.wanted()
    assert request.reason == told


class Time:
    """A clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(stop.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(stop.time, "time", lambda: self.now + 1e9)

    def stops_at(self, request: StopRequest, every: float) -> float:
        """Asked every so many seconds: when it says yes."""
        while not request.wanted():
            self.now += every
            assert self.now < 1e6
        return self.now


@pytest.mark.parametrize("every", [0.5, 7.0, 90.0])
@pytest.mark.parametrize("save", [0.0, 20.0])
def test_the_clock_leaves_room_for_an_interval_and_two_saves(
    every: float, save: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Time(monkeypatch)
    request = StopRequest(None, ends=clock.now + 1e9 + 1000, margin=30)
    request.saved(save)
    left = 2000 - clock.stops_at(request, every)
    need = 30 + 1.5 * every + 3 * save
    assert need <= left + 1e-6 or left + every > need  # at the last question at which it was still in time
    assert left - 2 * save >= 30
    assert left <= need + every
    assert "the time is up in" in str(request.reason)


def test_a_slow_interval_counts_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    request = StopRequest(None, ends=clock.now + 1e9 + 1e5, margin=10)
    for gap in (1.0, 200.0, 1.0):
        request.wanted()
        clock.now += gap
    assert request.needs() == 10 + 1.5 * 200
    for _ in range(stop.RECENT):
        request.wanted()
        clock.now += 1
    request.wanted()
    assert request.needs() == 10 + 1.5


def test_without_an_end_it_never_stops_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    request = StopRequest(None)
    for _ in range(100):
        clock.now += 1e6
        assert not request.wanted()


def test_the_end_is_the_earliest_there_is() -> None:
    now = time.time()
    assert deadline(None, {}) is None
    assert deadline(None, {"SLURM_JOB_END_TIME": "1700000000"}) == 1700000000
    assert deadline(60, {"SLURM_JOB_END_TIME": str(now + 9999)}) == pytest.approx(now + 60, abs=5)
    assert deadline(60, {"HARNESS_DEADLINE": "1700000000", "SLURM_JOB_END_TIME": "5"}) == 1700000000
    for nonsense in ("", "soon", "nan", "inf", "-3", "1e300"):
        assert deadline(None, {"SLURM_JOB_END_TIME": nonsense}) is None


def test_the_launcher_asks_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        fake = tmp_path / "scontrol"
        fake.write_text('#!/bin/bash\necho "JobId=$5 EndTime=2100-01-01T00:00:00 Deadline=N/A"\n')
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
        job = {"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "4000000000"}
        assert jobs.end_time(job) == 4102444800
        assert time_limit(Stop(), job) == {"HARNESS_DEADLINE": "4102444800"}
        fake.write_text("#!/bin/bash\nexit 1\n")
        assert jobs.end_time(job) == 4000000000
        assert jobs.end_time({}) is None
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_allocation_that_is_about_to_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": str(int(time.time()) + 20)}
    with pytest.raises(Unavailable, match=r"job 17 ends in (19|20) s, which is not longer than stop.margin \(30 s\)"):
        time_limit(Stop(), job)
    assert time_limit(Stop(), {}) == {}
    assert int(time_limit(Stop(time=3600.0), {})["HARNESS_DEADLINE"]) == pytest.approx(time.time() + 3600, abs=5)


CONFIG = """
name: run
task: {name: "tasks_for_tests:Slow"}
train: {steps: 100000, global_batch: 16, micro_batch: 8}
log: {every: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "tasks_for_tests.py").write_bytes((ROOT / "tests" / "tasks_for_tests.py").read_bytes())
    return tmp_path


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **QUIET, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def until_it_trains(folder: Path, process: subprocess.Popen[str]) -> dict[str, object]:
    end = time.monotonic() + 200
    status: dict[str, object] = {}
    while not (status.get("state") == "running" and status["step"]):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
        status = RunDir(folder / "runs/run").read_status()
    return status


def stopped_and_saved(folder: Path, why: str) -> None:
    status = json.loads((folder / "runs/run/status.json").read_text())
    assert status["state"] == "stopped"
    assert why in status["summary"]
    assert status["last_checkpoint"] == status["step"] > 0
    assert (folder / f"runs/run/checkpoints/step-{status['step']:08d}/manifest.json").exists()


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(400)
def test_a_run_stops_before_its_time_is_up(folder: Path) -> None:
    for seconds in (12, 24, 48, 96):  # a busy machine may take the first of them to start
        words = ("run", "run.yaml", "stop.margin=2", "--time", f"{seconds}s", "-n", "2")
        process = start(folder, str(BIN / "harness"), *words)
        said, _ = process.communicate(timeout=250)
        assert process.returncode == 75, said
        if "before anything was done" not in str(said):
            break
    stopped_and_saved(folder, "the time is up in")


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(400)
def test_harness_stop_waits_until_the_state_is_saved(folder: Path) -> None:
    process = start(folder, str(BIN / "harness"), "run", "run.yaml", "-n", "2")
    try:
        until_it_trains(folder, process)
        asked = start(folder, str(BIN / "harness"), "stop", "run", "--wait")
        told, _ = asked.communicate(timeout=200)
        assert asked.returncode == 0, told
        assert "runs/run is running at step" in told
        assert "stopped at step" in told.splitlines()[-1]
        assert process.wait(timeout=120) == 75
        stopped_and_saved(folder, "the stop file: asked by")
    finally:
        process.kill()
        process.communicate()


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(400)
def test_a_signal_stops_ranks_that_horovodrun_has_started_without_mpi(folder: Path) -> None:
    """horovodrun itself dies of the signal that mpirun and srun hand on; `harness run` does not let it come so far."""
    words = ("--launcher", "horovodrun", "launch.env={HOROVOD_CONTROLLER: gloo}", "-n", "2")
    process = start(folder, str(BIN / "harness"), "run", "run.yaml", *words)
    try:
        until_it_trains(folder, process)
        process.send_signal(signal.SIGUSR2)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 75, said
        stopped_and_saved(folder, "the stop file: signal USR2")
    finally:
        process.kill()
        process.communicate()


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(400)
def test_a_signal_to_one_rank_stops_all(folder: Path) -> None:
    """As from srun, which hands signals on to the ranks that it has started, with no supervisor in between."""
    process = start(folder, "mpirun", "-np", "2", sys.executable, "-m", "harness", "run.yaml")
    try:
        until_it_trains(folder, process)
        # by their working directory: only this test's ranks are in it
        pids = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and is_rank(entry, folder, "1")
        ]
        assert len(pids) == 1
        a_second_start_is_refused(folder)
        os.kill(pids[0], signal.SIGUSR1)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 75, said
        stopped_and_saved(folder, "a signal to another rank")
    finally:
        process.kill()
        process.communicate()


def a_second_start_is_refused(folder: Path) -> None:
    """By hand and with `harness run`, before it has written anything: the live run's directory stays as it is."""
    harness, run = str(BIN / "harness"), folder / "runs/run"
    second = [start(folder, sys.executable, "-m", "harness", "runs/run"), start(folder, harness, "run", "runs/run")]
    submitted = start(folder, harness, "submit", "run.yaml", "slurm.time=1h")
    shown, _ = start(folder, harness, "submit", "--dry-run", "run.yaml", "slurm.time=1h").communicate(timeout=200)
    assert "#SBATCH" in shown and "note: it would be refused now: runs/run is running already" in shown
    for process in (*second, submitted):
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 69, said
        assert "resumed" not in said
        assert ("error: runs/run is running already\n" if process is submitted else "is in use by process") in said
    assert [path.name for path in (run / "attempts").iterdir()] == ["0001"]
    assert not list(run.glob("config.*.yaml"))
    life = look(RunDir(run))
    assert (life.state, life.attempts, life.ended) == ("running", 1, None)


def is_rank(entry: Path, folder: Path, rank: str) -> bool:
    try:
        words = (entry / "environ").read_bytes().split(b"\0")
        return Path(os.readlink(entry / "cwd")) == folder and f"OMPI_COMM_WORLD_RANK={rank}".encode() in words
    except OSError:
        return False
