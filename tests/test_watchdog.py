"""A rank's watchdog: heartbeats, limits, stacks; and what a supervisor makes of heartbeats. Without MPI and torch."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from harness import watchdog
from harness.clock import Clock
from harness.config import Watchdog
from harness.env import identify
from harness.heartbeat import Heartbeat, limit, others, parse
from harness.rundir import Attempt, RunDir
from launch import processes
from launch.watch import Pulse, Watch

HERE = Heartbeat(
    rank=5, size=8, host="n07", pid=77, section="data", step=811, seconds=40.0, waits=False, beat=9
)  # fmt: skip
PROGRAM = """
import ctypes, sys, time
from dataclasses import replace
from pathlib import Path
from harness import watchdog
from harness.clock import Clock
from harness.config import Watchdog as Settings
from harness.env import identify
from harness.log import redirect
from harness.rundir import Attempt
attempt, clock, me = Attempt(Path(sys.argv[1])), Clock(), replace(identify({}), size=2)
log = redirect(attempt.log(0), console=False)
watchdog.LATE = 1.0

def watch(**limits):
    watchdog.Watchdog(clock, attempt, me, Settings(**limits), log).start()
    clock.begin(810)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], Attempt]]]:
    """rank(script) starts a process as rank 0 of 2, whose other rank is played by the test."""
    started: list[subprocess.Popen[str]] = []
    attempt = RunDir(tmp_path).new_attempt()

    def go(script: str, **environ: str) -> tuple[subprocess.Popen[str], Attempt]:
        file = tmp_path / "rank.py"
        file.write_text(PROGRAM + textwrap.dedent(script))
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environ
        started.append(subprocess.Popen([sys.executable, str(file), str(attempt.root)], env=env, text=True))
        return started[-1], attempt

    yield go
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_rank_that_is_stuck_says_where_and_ends(rank: Any) -> None:
    process, attempt = rank("""
        watch(data=1.0)
        def read_a_sample():
            time.sleep(600)
        with clock("data"):
            read_a_sample()
    """)
    assert process.wait(60) == 1
    (error,) = attempt.errors()
    assert (error["kind"], error["rank"], error["section"], error["step"]) == ("hang", 0, "data", 811)
    assert "longer than watchdog.data (1.0 s) allows" in error["message"]
    assert "read_a_sample" in attempt.log(0).read_text()
    assert attempt.stacks.exists(), "the others write theirs"
    beat = attempt.heartbeats()[0]
    assert (beat.section, beat.step, beat.waits, beat.size) == ("data", 811, False, 2)


def test_a_rank_that_holds_pythons_lock_is_ended_by_the_timer(rank: Any) -> None:
    process, attempt = rank("""
        watch(data=1.0)
        def stuck_in_c():
            ctypes.PyDLL(None).sleep(600)
        with clock("data"):
            while not (attempt.heartbeat(0).exists() and '"data"' in attempt.heartbeat(0).read_text()):
                time.sleep(0.05)
            stuck_in_c()
    """)
    assert process.wait(60) == 1
    assert attempt.errors() == []
    assert "stuck_in_c" in attempt.log(0).read_text()


def test_a_rank_that_was_stopped_for_longer_than_any_limit_goes_on(rank: Any) -> None:
    """As on a machine that was suspended; `harness run` ends a rank that is stopped, where that is wanted."""
    process, attempt = rank(
        """
        watch(data=1.0)
        with clock("data"):
            while not (attempt.root / "go").exists():
                time.sleep(0.05)
                clock.section = "data"
    """,
        HARNESS_RUN_ID="x",
    )
    until(lambda: 0 in attempt.heartbeats() and attempt.heartbeats()[0].section == "data")
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)  # the timer is set to 1 + 1 + 8 * 0.25 s
    process.send_signal(signal.SIGCONT)
    beat = attempt.heartbeats()[0].beat
    until(lambda: attempt.heartbeats()[0].beat > beat + 2)
    (attempt.root / "go").touch()
    assert process.wait(60) == 0


def test_within_its_limits_nothing_happens_and_stacks_can_be_asked_for(rank: Any) -> None:
    process, attempt = rank("""
        watch(data=30.0, silence=1.0, step=0)
        def a_long_step():
            while not (attempt.root / "go").exists():
                time.sleep(0.05)
        for _ in range(30):
            with clock("data"):
                time.sleep(0.05)
        a_long_step()
    """)
    until(lambda: 0 in attempt.heartbeats() and attempt.heartbeats()[0].section == "step")
    process.send_signal(signal.SIGQUIT)
    until(lambda: attempt.log(0).read_text().count("a_long_step") == 1)
    attempt.stacks.touch()
    until(lambda: attempt.log(0).read_text().count("a_long_step") == 2)
    (attempt.root / "go").touch()
    assert process.wait(60) == 0
    assert attempt.errors() == []


WAITING = """
    watch(step=3.0, data=3.0, silence=4.0)
    with clock("communication"):
        time.sleep(600)
"""


def test_a_rank_that_waits_names_the_one_that_is_silent(rank: Any) -> None:
    process, attempt = rank(WAITING)
    attempt.heartbeat(1).write_text(json.dumps(asdict(replace(HERE, rank=1, size=2))))
    assert process.wait(60) == 1
    (error,) = attempt.errors()
    assert (error["kind"], error["rank"], error["host"], error["told_by"]) == ("hang", 1, "n07", 0)
    assert error["message"].startswith("last seen in data at step 811 for ")
    assert "silent" in error["message"]
    assert "1 other waits in communication" in error["message"]


def test_ranks_that_wait_for_each_other_are_a_hang(rank: Any) -> None:
    process, attempt = rank(WAITING)
    beat = 0
    while process.poll() is None and beat < 4000:
        beat += 1
        other = replace(HERE, rank=1, size=2, section="metrics", waits=True, beat=beat)
        temporary = attempt.root / "next"
        temporary.write_text(json.dumps(asdict(other)))
        temporary.replace(attempt.heartbeat(1))
        time.sleep(0.03)
    assert process.wait(60) == 1
    (error,) = attempt.errors()
    assert "all ranks wait for each other; 1 other waits in metrics" in error["message"]


def test_a_rank_that_waits_has_patience_with_one_at_work(rank: Any) -> None:
    process, attempt = rank("""
        watch(step=3.0, silence=1.0)
        with clock("communication"):
            while not (attempt.root / "go").exists():
                time.sleep(0.05)
    """)
    for beat in range(200):
        temporary = attempt.root / "next"
        temporary.write_text(json.dumps(asdict(replace(HERE, rank=1, size=2, beat=beat))))
        temporary.replace(attempt.heartbeat(1))
        time.sleep(0.03)
    (attempt.root / "go").touch()
    assert process.wait(60) == 0
    assert attempt.errors() == []


def test_where_nothing_new_can_be_written_the_heartbeat_is_replaced_in_its_place(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path).new_attempt()
    file = attempt.heartbeat(0)
    rank = watchdog.Watchdog(Clock(), attempt, identify({}), Watchdog(), io.StringIO())
    rank._write(replace(HERE, rank=0, beat=1))
    (file.parent / f".{file.name}").mkdir()  # as on a full disk
    rank._write(replace(HERE, rank=0, step=9, beat=2))
    assert attempt.heartbeats()[0].beat == 2


def test_limits_belong_to_sections() -> None:
    settings = Watchdog(start=1.0, data=2.0, step=3.0, evaluation=4.0, save=0.0)
    assert [limit(settings, name) for name in ("start", "data", "update", "evaluation", "exit")] == [1, 2, 3, 4, 4]
    assert limit(settings, "checkpoint") == limit(settings, "restore") == float("inf")


def test_what_the_others_do() -> None:
    waiting = [replace(HERE, rank=rank, waits=True, section="update") for rank in range(4)]
    assert others([HERE, *waiting], 5) == "; 4 others wait in update"
    assert others([HERE, *waiting[:1]], 5) == "; 1 other waits in update"
    assert others([HERE, *waiting, replace(HERE, rank=6)], 5) == "; 4 others wait in update, 1 is in data"
    assert others([HERE], 5) == ""


@pytest.mark.parametrize("name", ["rank", "size", "host", "pid", "section", "step", "seconds", "waits", "beat"])
def test_what_is_no_heartbeat_is_none(name: str) -> None:
    good = asdict(HERE)
    assert parse(good | {"time": 5.0}) == HERE
    assert parse({key: value for key, value in good.items() if key != name}) is None
    assert parse(good | {name: [1]}) is None


class World:
    """Heartbeats of some ranks, written by hand, and a clock that a test moves."""

    def __init__(self, root: Path, **settings: float) -> None:
        self.attempt = RunDir(root).new_attempt()
        self.pulse = Pulse(self.attempt, Watchdog(**settings))
        self.now, self.beat = 1000.0, 0

    def go_on(self, seconds: float, *beating: Heartbeat) -> str | None:
        """Some time passes in which these ranks' hearts beat; what hangs then."""
        end = self.now + seconds
        while self.now < end:
            self.now, self.beat = min(end, self.now + 2), self.beat + 1
            for one in beating:
                self.attempt.heartbeat(one.rank).write_text(json.dumps(asdict(replace(one, beat=self.beat))))
            self.pulse.look(self.now)
        hang = self.pulse.hang(self.now)
        return None if hang is None else f"{'lost: ' if hang.lost else ''}{hang.text}"


def test_a_stopped_rank_is_found_after_the_silence(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        world = World(tmp_path, silence=30.0)
        stopped = replace(HERE, host=socket.gethostname(), pid=process.pid)
        waits = [replace(HERE, rank=rank, waits=True, section="communication") for rank in (0, 1)]
        assert world.go_on(10, stopped, *waits) is None
        process.send_signal(signal.SIGSTOP)
        until(lambda: "T" in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0])
        assert world.go_on(30, *waits) is None
        told = world.go_on(10, *waits)
        assert told is not None
        assert "is stopped (SIGSTOP), last seen in data at step 811, 40 s ago; 2 others wait in communication" in told
        process.send_signal(signal.SIGCONT)
        until(lambda: "T" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0])
        assert world.go_on(1, stopped, *waits) is None
    finally:
        process.kill()
        process.wait()


def test_a_silent_rank_has_the_time_of_its_section(tmp_path: Path) -> None:
    """Code that holds Python's lock for long, as HDF5 does in a collective write, silences a rank that is well."""
    world = World(tmp_path, silence=30.0, save=600.0)
    saving = replace(HERE, host=socket.gethostname(), section="checkpoint", seconds=0.0)
    waits = replace(HERE, rank=0, waits=True)
    world.go_on(2, saving, waits)
    assert world.go_on(600, waits) is None
    told = world.go_on(100, waits)
    assert told is not None and "is silent, last seen in checkpoint" in told


def test_a_host_of_which_nothing_is_heard_is_lost(tmp_path: Path) -> None:
    world = World(tmp_path, silence=30.0)
    gone = [replace(HERE, rank=rank, host="n08", seconds=0.0) for rank in (2, 3)]
    left = [replace(HERE, rank=rank, host="n07", waits=True) for rank in (0, 1)]
    world.go_on(2, *gone, *left)
    assert world.go_on(20, *left) is None
    told = world.go_on(20, *left)
    assert told is not None and told.startswith("lost: rank 2 of 8 on n08 is silent, as is all of its host")
    world = World(tmp_path / "other", silence=30.0)
    world.go_on(2, *gone, *left)
    assert world.go_on(50, gone[1], *left) is None, "a rank of it is alive"
    world = World(tmp_path / "all", silence=30.0)
    world.go_on(2, *gone, *left)
    assert world.go_on(50) is None, "nobody is heard of: it is the file system, or this machine"


def test_a_supervisor_that_slept_itself_blames_nobody(tmp_path: Path) -> None:
    world = World(tmp_path, silence=30.0)
    ranks = [replace(HERE, rank=rank, host=host) for rank, host in ((0, "n07"), (1, "n08"))]
    world.go_on(2, *ranks)
    world.now += 3600
    assert world.go_on(2, ranks[0]) is None


def test_ranks_that_an_elastic_run_has_dropped_are_not_missed(tmp_path: Path) -> None:
    world = World(tmp_path, silence=30.0, step=50.0)
    stays, gone = replace(HERE, rank=0, section="step"), replace(HERE, rank=1, section="step")
    assert world.go_on(10, stays, gone) is None
    (tmp_path / "attempts/0001/errors/rank-1.json").write_text('{"type": "ValueError", "rank": 1}')
    assert [error["type"] for error in world.attempt.forget(1)] == ["ValueError"]
    assert world.attempt.errors() == [] and set(world.attempt.heartbeats()) == {0}
    assert len(list((tmp_path / "attempts/0001/errors").glob("survived-*-rank-1.json"))) == 1
    assert world.go_on(500, stays) is None
    assert world.go_on(10, stays, gone) is None, "another one with its number"


def test_what_becomes_of_an_elastic_run_without_a_rank_is_not_for_us_to_decide(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    attempt = run.new_attempt()
    attempt.error(1).write_text('{"type": "ValueError", "rank": 1}')
    rank = subprocess.Popen(["sleep", "600"], env=os.environ | {"HARNESS_RUN_ID": "a-run"})
    try:
        while rank.pid not in processes.ranks(
            ["sleep"], "a-run"
        ):  # for a moment it has neither arguments nor variables
            time.sleep(0.01)
        plain, elastic = (Watch(run, attempt, ["sleep"], "a-run", Watchdog(), elastic=one) for one in (False, True))
        for watch in (plain, elastic):
            watch.overdue()
    finally:
        rank.kill()
        rank.wait()
    assert elastic.seen == {rank.pid}
    for watch in (plain, elastic):
        watch._next = 0.0
        watch.overdue()
    assert plain.until < float("inf") and elastic.until == float("inf")


def test_a_rank_that_gets_another_number_writes_another_log(tmp_path: Path) -> None:
    program = """
    import os
    from pathlib import Path
    from harness.log import redirect
    redirect(Path("rank-1"), console=False)
    print("alone", flush=True)
    os.system("echo in C")
    redirect(Path("rank-0"), console=True)
    print("first", flush=True)
    os.system("echo to all")
    redirect(Path("rank-2"), console=False)
    print("again", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    logs = [(tmp_path / f"rank-{number}").read_text() for number in (0, 1, 2)]
    assert logs == ["first\n", "alone\nin C\n", "again\n"] and done.stdout == "first\nto all\n" and not done.stderr
