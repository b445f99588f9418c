"""Supervision with the real mpirun: how a run ends, what is told, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import processes

HERE = Path(__file__).parent / "launcher"
NOISE = ("MPI_ABORT was invoked", "Primary job", "mpirun has exited", "mpirun detected", "mpirun noticed", "-----")
pytestmark = [pytest.mark.mpi, pytest.mark.timeout(120)]


@dataclass
class Run:
    """A run that is under way: the driver's process and its directory."""

    process: subprocess.Popen[str]
    root: Path

    def wait(self, seconds: float = 60.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    @property
    def attempt(self) -> Path:
        return self.root / "attempts" / "0001"

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            assert self.process.poll() is None or condition(), self.wait()
            time.sleep(0.02)

    def started(self, ranks: int) -> list[int]:
        """The ranks' process ids, once all have written theirs."""

        def pids() -> list[str]:
            return [text for file in self.attempt.glob("pid-*") if (text := file.read_text())]

        self.until(lambda: len(pids()) == ranks)
        return [int(text) for text in pids()]

    def run_id(self) -> str:
        return str(json.loads((self.attempt / "command.json").read_text())["run_id"])

    def left(self) -> list[int]:
        """Processes of the start that still run."""
        return processes.members(-1, self.run_id())


@pytest.fixture
def launch(tmp_path: Path):
    """launch(script, ranks=2) starts a script as ranks; whatever it leaves is ended with the test."""
    started: list[Run] = []

    def go(script: str, ranks: int = 2, **environ: str) -> Run:
        file = tmp_path / "script.py"
        file.write_text("from rank import *\n" + textwrap.dedent(script))
        root = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, str(HERE / "drive.py"), str(root), str(ranks), str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"} | environ,
            start_new_session=True,
        )
        started.append(Run(process, root))
        return started[-1]

    yield go
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        if (run.attempt / "command.json").exists():
            assert processes.end(-1, run.run_id(), grace=0) == []


def test_a_run_that_finishes(launch) -> None:
    run = launch('say(f"hello from {me.rank}"); status("finished") if me.rank == 0 else None')
    code, out, err = run.wait()
    assert code == 0, err
    assert sorted(out.splitlines()) == ["hello from 0", "hello from 1"]
    assert err == ""
    command = json.loads((run.attempt / "command.json").read_text())
    assert command["ranks"] == 2
    assert command["env"]["HARNESS_ATTEMPT"] == "1"
    assert "HARNESS_TTY" not in command["env"], "the output is a pipe"
    assert (run.attempt / "launcher.log").read_text().splitlines() != []


def test_a_sentence_is_told_without_traceback_or_noise(launch) -> None:
    run = launch("""
        from mpi4py import MPI
        if me.rank == 1:
            fail("ConfigError", "task.args.depth is 0", code=78, sentence=True, hint="use 1 or more")
            MPI.COMM_WORLD.Abort(78)
        time.sleep(60)
    """)
    code, out, err = run.wait()
    assert code == 78
    assert err.startswith("error: task.args.depth is 0\n  use 1 or more\n")
    assert "Traceback" not in err
    assert not any(noise in out + err for noise in NOISE), err
    assert (run.attempt / "launcher.log").read_text() != "", "mpirun's own words are kept"
    assert "harness run" not in err, "the same config again would fail again"


def test_a_crash_names_rank_step_and_section(launch) -> None:
    run = launch(
        """
        everybody_is_here()
        if me.rank == 0:   # reports first, but only because rank 1 is gone
            fail("HorovodInternalError", "Horovod has been shut down", late=-5)
            time.sleep(60)
        fail("ValueError", "bad image 17")
        while not attempt.error(0).exists():  # mpirun kills the others at once
            time.sleep(0.02)
        os._exit(1)
    """.replace("os._exit", "__import__('os')._exit")
    )
    code, _, err = run.wait()
    assert code == 1
    first = err.splitlines()[0]
    assert first == "error: rank 1 of 2 on node failed at step 120 in data"
    assert "ValueError: bad image 17" in err
    assert 'File "x.py", line 3, in f' in err
    assert "1 other rank failed after it" in err
    assert not any(noise in err for noise in NOISE)


def test_ranks_that_hang_after_an_error_are_gone_within_10_s(launch) -> None:
    run = launch("""
        everybody_is_here()
        if me.rank == 1:
            fail("RuntimeError", "broken")
        sleep_stubbornly()
    """)
    run.until(lambda: (run.attempt / "errors" / "rank-1.json").exists())
    began = time.monotonic()
    code, _, err = run.wait(30)
    assert time.monotonic() - began < 10.5
    assert code == 1
    assert "RuntimeError: broken" in err
    assert run.left() == []


def test_a_rank_that_is_killed(launch) -> None:
    run = launch("everybody_is_here(); status('running'); sleep_stubbornly()")
    pids = run.started(2)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = run.wait(30)
    assert time.monotonic() - began < 10.5
    assert code == 137
    assert re.search(r"^error: .* ended by SIGKILL, last seen at step 7$", err, re.MULTILINE)
    assert run.left() == []


def test_a_rank_that_leaves_without_a_word(launch) -> None:
    run = launch("everybody_is_here(); sleep_stubbornly() if me.rank else time.sleep(1.5)")
    run.started(2)
    began = time.monotonic()
    code, _, err = run.wait(40)
    assert time.monotonic() - began < 14
    assert code == 1
    assert "a rank ended without a word" in err
    assert run.left() == []


def test_the_launcher_itself_is_killed(launch) -> None:
    run = launch("everybody_is_here(); sleep_stubbornly()")
    run.started(2)
    mpirun = next(
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdecimal() and _parent(int(pid)) == run.process.pid and int(pid) != run.process.pid
    )
    os.kill(mpirun, signal.SIGKILL)
    code, _, err = run.wait(30)
    assert code == 137
    assert "the launcher was ended by SIGKILL" in err
    assert "logs: " in err
    assert run.left() == []


def test_the_supervisor_is_killed(launch) -> None:
    """The ranks end with it, and the next start ends what has hidden from mpirun."""
    run = launch("""
        import subprocess, sys
        if attempt.number == 2:
            status("finished")
            sys.exit()
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
        hidden = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        (attempt.root / f"hidden-{me.rank}").write_text(str(hidden.pid))
        everybody_is_here()
        (attempt.root / f"here-{me.rank}").touch()
        sleep_stubbornly()
    """)
    run.until(lambda: len(list(run.attempt.glob("here-*"))) == 2)
    began = time.monotonic()
    run.process.kill()
    run.process.communicate()
    hidden = {int(file.read_text()) for file in run.attempt.glob("hidden-*")}
    while not set(run.left()) <= hidden:
        assert time.monotonic() - began < 30, "the ranks go on without a supervisor"
        time.sleep(0.05)
    assert set(run.left()) == hidden
    assert not (run.attempt / "ending.json").exists()
    again = launch((run.root.parent / "script.py").read_text().removeprefix("from rank import *\n"))
    code, _, err = again.wait()
    assert code == 0, err
    assert "the `harness run` of attempt 1 was killed; what it has left is ended first" in err
    assert run.left() == []


def test_processes_that_hide_are_found(launch) -> None:
    """A loader that made a session of its own and outlives its rank is an orphan; it is known by its environment."""
    run = launch("""
        import subprocess, sys
        everybody_is_here()
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        time.sleep(0.5)
        status("finished")
    """)
    code, _, err = run.wait(40)
    assert code == 0, err
    assert run.left() == []


def test_ctrl_c_once_saves_and_stops(launch) -> None:
    run = launch(
        """
        everybody_is_here()
        while not run.stop.exists():
            time.sleep(0.05)
        if me.rank == 0:
            saved = run.checkpoints / "step-00000007"
            saved.mkdir(parents=True)
            (saved / "manifest.json").touch()
            status("stopped", last_checkpoint=7)
            (run.root / "told").touch()
        while not (run.root / "told").exists():  # ranks leave together: mpirun ends the others of one that is gone
            time.sleep(0.05)
        sys.exit(75)
    """.replace("sys.exit", "__import__('sys').exit")
    )
    run.started(2)
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.wait()
    assert code == 75
    assert "saving and stopping, in about 10 s or after this step; Ctrl-C again ends now" in err
    assert f"the state of step 7 is saved; go on with: harness run {run.root}" in err
    assert "error" not in err
    assert not any(noise in err for noise in NOISE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_other_signals_stop_too_and_twice_is_still_once(launch, number: signal.Signals) -> None:
    run = launch("""
        everybody_is_here()
        while not run.stop.exists():
            time.sleep(0.05)
        time.sleep(1)
        status("stopped") if me.rank == 0 else None
        time.sleep(0.2)
    """)
    run.started(2)
    run.process.send_signal(number)
    time.sleep(0.5)
    run.process.send_signal(number)
    code, _, err = run.wait()
    assert code == 75, err
    assert err.count("saving and stopping") == 1


def test_ctrl_c_twice_ends_now(launch) -> None:
    run = launch("everybody_is_here(); sleep_stubbornly()")
    run.started(2)
    run.process.send_signal(signal.SIGINT)
    run.until((run.root / "stop").exists)
    time.sleep(0.3)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.wait(30)
    assert code == 130
    assert time.monotonic() - began < 8
    assert "ending now" in err
    assert run.left() == []


def test_an_old_stop_file_does_not_stop_the_next_start(launch) -> None:
    first = launch("everybody_is_here(); status('finished' if not run.stop.exists() else 'failed'); time.sleep(.3)")
    assert first.wait()[0] == 0
    (first.root / "stop").touch()
    second = launch("everybody_is_here(); status('finished' if not run.stop.exists() else 'failed'); time.sleep(.3)")
    assert second.wait()[0] == 0
    assert (second.root / "attempts" / "0002" / "command.json").exists()


def test_a_status_of_an_earlier_attempt_does_not_count(launch) -> None:
    assert launch("status('finished')").wait()[0] == 0
    code, _, err = launch("pass").wait()
    assert code == 70
    assert "the ranks ended without an error, but the run did not finish" in err


def test_the_code_of_a_lost_end_is_the_launchers(launch) -> None:
    code, _, err = launch("__import__('os')._exit(41)").wait()
    assert code == 41
    assert "the ranks ended with code 41" in err
    assert "none of them left an error report" in err


def test_a_program_that_cannot_start_shows_what_the_launcher_said(launch, tmp_path: Path) -> None:
    tool = tmp_path / "bin"
    tool.mkdir()
    real = subprocess.run(["which", "mpirun"], capture_output=True, text=True, check=True).stdout.strip()
    (tool / "mpirun").write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\nexec {real} --no-such-flag\n'
    )
    (tool / "mpirun").chmod(0o755)
    code, _, err = launch("pass", PATH=f"{tool}:{os.environ['PATH']}").wait()
    assert code not in (0, 75)
    assert "no-such-flag" in err


def test_output_without_newline_arrives_at_once(launch) -> None:
    """A progress bar: its line never ends, and must not wait for the end of the run."""
    run = launch("""
        import sys
        if me.rank == 0:
            sys.stdout.write("\\r 10 %"); sys.stdout.flush()
        while not (attempt.root / "go").exists():
            time.sleep(0.05)
        status("finished")
    """)
    assert run.process.stdout is not None
    os.set_blocking(run.process.stdout.fileno(), False)
    seen = b""
    end = time.monotonic() + 20
    while b"10 %" not in seen and time.monotonic() < end:
        try:
            seen += os.read(run.process.stdout.fileno(), 1000)
        except BlockingIOError:
            time.sleep(0.05)
    assert b"\r 10 %" in seen
    (run.attempt / "go").touch()
    os.set_blocking(run.process.stdout.fileno(), True)
    assert run.wait()[0] == 0


def test_a_reader_that_goes_away_does_not_end_the_run(launch) -> None:
    run = launch("""
        everybody_is_here()
        for number in range(40):
            print("line", number)
            time.sleep(0.02)
        status("finished")
    """)
    assert run.process.stdout is not None
    run.process.stdout.close()
    run.process.stdout = None
    assert run.process.wait(40) == 0


@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_horovodrun_without_its_tags(launch, controller: str) -> None:
    run = launch(
        'say(f"hello from {me.rank}"); status("finished") if me.rank == 0 else None',
        DRIVE_LAUNCHER="horovodrun",
        HOROVOD_CONTROLLER=controller,
    )
    code, out, err = run.wait(90)
    assert code == 0, err
    assert sorted(line for line in out.splitlines() if "hello" in line) == ["hello from 0", "hello from 1"]


def test_local_is_a_plain_process(launch) -> None:
    run = launch('print(me.launcher, me.size); status("finished")', ranks=1, DRIVE_LAUNCHER="local")
    assert run.wait()[:2] == (0, "none 1\n")


FAILS = """
    everybody_is_here()
    if me.rank == 1:
        fail("ValueError", "bad image 17")
        __import__("os")._exit(1)
    time.sleep(60)
"""


def test_restarts_without_progress_end_and_all_attempts_are_told(launch) -> None:
    run = launch(FAILS, DRIVE_RESTARTS="2")
    code, _, err = run.wait(120)
    assert code == 1, err
    assert [path.name for path in sorted((run.root / "attempts").iterdir())] == ["0001", "0002", "0003"]
    endings = [json.loads((run.root / f"attempts/000{n}/ending.json").read_text()) for n in (1, 2, 3)]
    assert [ending["restart"] for ending in endings] == [True, True, False]
    assert {(ending["kind"], ending["rank"], ending["step"]) for ending in endings} == {("crash", 1, 120)}
    assert "starting again at once (at most 2 restarts without progress), on 2 ranks, from the beginning" in err
    assert "starting again in 0.05 s (restart 2 of at most 2 without progress)" in err
    table = err[err.index("attempt  ranks") :].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["attempt", "1", "2", "3"]
    assert err.count("go on with: harness run") + err.count("start again with: harness run") == 1


def test_two_failures_from_one_checkpoint_go_back_to_the_one_before(launch, tmp_path: Path) -> None:
    for step in (4, 8):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    told = "say('from ' + __import__('os').environ.get('HARNESS_ROLL_BACK', 'the newest')) if me.rank == 0 else None"
    run = launch(FAILS.replace("everybody_is_here()", f"{told}\n    everybody_is_here()"), DRIVE_RESTARTS="2")
    code, out, err = run.wait(120)
    assert code == 1, err
    assert out.splitlines() == ["from the newest", "from the newest", "from step-00000004"]


def test_a_mistake_of_the_user_is_not_tried_again(launch) -> None:
    run = launch(FAILS.replace('"bad image 17"', '"bad image 17", code=78, sentence=True'), DRIVE_RESTARTS="3")
    assert run.wait()[0] == 78
    assert len(list((run.root / "attempts").iterdir())) == 1


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGUSR2, 75)])
def test_the_wait_for_a_restart_ends_at_once(launch, number: signal.Signals, expected: int) -> None:
    run = launch(FAILS, DRIVE_RESTARTS="2", DRIVE_BACKOFF="1h")
    run.until((run.root / "attempts/0002/ending.json").exists, 60)
    run.process.send_signal(number)
    began = time.monotonic()
    code, _, err = run.wait(30)
    assert code == expected, err
    assert time.monotonic() - began < 20
    assert "bad image 17" in err
    assert "while it waited for a restart" in err
    assert run.left() == []


def test_a_run_directory_that_cannot_be_written(launch, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "attempts").write_text("a file in the way")
    code, _, err = launch("pass").wait()
    assert code == 74
    assert err.startswith("error: ")
    assert "Traceback" not in err


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return -1
