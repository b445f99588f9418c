"""Runs that fail in known ways under the real mpirun: what is told, that nothing is left, and what a restart makes."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from disturbed import DEADLINE, Run, launch, the_same, undisturbed
from support import needs_mpirun

from harness.errors import Exit

pytestmark = [needs_mpirun, pytest.mark.mpi, pytest.mark.timeout(900)]
Go = Callable[..., Run]


@pytest.fixture
def go(tmp_path: Path) -> Iterator[Go]:
    started: list[Run] = []

    def start(*arguments: str, **options: object) -> Run:
        started.append(launch(tmp_path, *arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for run in started:
        run.end()


@dataclass(frozen=True)
class Calm:
    """A run on so many ranks that nothing happens to, and the tensors with which it ends."""

    ranks: int
    tensors: dict[str, np.ndarray]

    @property
    def last(self) -> int:
        return self.ranks - 1

    @property
    def others(self) -> str:
        """All ranks but one, as a report tells of them."""
        return "1 other waits" if self.last == 1 else f"{self.last} others wait"


on_2 = pytest.param(2, id="2 ranks")
on_4 = pytest.param(4, id="4 ranks")
slow_on_4 = pytest.param(4, id="4 ranks", marks=pytest.mark.slow)
also_on_4 = pytest.mark.parametrize("calm", [on_2, slow_on_4], indirect=True)


@pytest.fixture(scope="module")
def calm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return Calm(request.param, undisturbed(tmp_path_factory.mktemp("calm"), request.param))


@also_on_4
def test_a_rank_is_killed_in_each_section_and_the_run_ends_as_if_it_had_not_been(go: Go, calm: Calm) -> None:
    last = calm.last
    places = [("start", 1, last), ("data", 7, last), ("step", 2, 0), ("save", 2, 0), ("evaluation", 1, last)]
    run = go("--restarts", "5", ranks=calm.ranks, plan=[(place, "kill", at, rank) for place, at, rank in places])
    code, said = run.wait()
    assert code == 0, said
    assert [run.ending(index)["state"] for index in range(1, 7)] == [*["failed"] * 5, "finished"]
    for index, (_, _, rank) in enumerate(places, start=1):
        assert run.took(index) < DEADLINE
        ending = run.ending(index)
        assert (ending["kind"], ending["code"], ending["rank"]) == ("crash", 137, rank), said
        assert re.search(rf"^rank {rank} on \S+ was ended by SIGKILL, last seen in ", ending["summary"]), said
    assert run.ending(1)["summary"].endswith("last seen in start")
    told = f"starting again at once (at most 5 restarts without progress), on {calm.ranks} ranks, from the beginning"
    assert told in said
    assert re.search(rf"^ *6 +{calm.ranks} .* finished: finished$", said, re.MULTILINE), said
    assert the_same(run.tensors(), calm.tensors)


@also_on_4
def test_a_rank_that_hangs_is_found_and_the_run_ends_as_if_it_had_not(go: Go, calm: Calm) -> None:
    last, ranks = calm.last, calm.ranks
    plan = [("data", "sleep", 7, last), ("step", "stop", 2, 0)]
    run = go("--restarts", "2", "watchdog.data=5s", ranks=ranks, plan=plan)
    code, said = run.wait()
    assert code == 0, said
    stuck, stopped = run.ending(1), run.ending(2)
    assert (stuck["kind"], stuck["rank"]) == ("hang", last), said
    assert re.search(
        rf"rank {last} of {ranks} on \S+ hangs: last seen in data at step 7 for .*, longer than watchdog.data \(5.0 s\)"
        rf" allows; {calm.others} in communication",
        stuck["summary"],
    ), said
    assert "troubled.py" in run.attempts[0].log(last).read_text(), "its stack"
    assert all("Thread" in run.attempts[0].log(rank).read_text() for rank in range(last)), "the others' stacks"
    assert (stopped["kind"], stopped["rank"]) == ("hang", 0), said
    told = rf"rank 0 of {ranks} on \S+ is stopped \(SIGSTOP\), last seen in .* ago; {calm.others}"
    assert re.search(told, stopped["summary"])
    assert max(run.took(1), run.took(2)) < 5 + 3 + DEADLINE
    assert the_same(run.tensors(), calm.tensors)


@also_on_4
def test_an_exception_a_killed_launcher_and_a_rank_killed_before_it_has_met_the_others(go: Go, calm: Calm) -> None:
    last = calm.last
    plan = [("step", "raise", 2, last), ("data", "kill launcher", 6, 1), ("start", "sleep", 1, last)]
    run = go("--restarts", "3", ranks=calm.ranks, plan=plan)
    third = run.dir.attempt(3)
    run.until(lambda: last in third.heartbeats())
    os.kill(third.heartbeats()[last].pid, signal.SIGKILL)
    code, said = run.wait()
    assert code == 0, said
    raised, orphaned, early = run.ending(1), run.ending(2), run.ending(3)
    assert (raised["kind"], raised["code"], raised["rank"]) == ("crash", 1, last)
    told = rf"rank {last} of {calm.ranks} on \S+ failed at step 2 in forward/backward\n  ValueError: trouble\n"
    assert re.search(told, said), said
    assert (orphaned["kind"], orphaned["code"], orphaned["rank"]) == ("crash", 137, None)
    assert orphaned["summary"].startswith("the launcher was ended by SIGKILL"), said
    assert (early["kind"], early["code"], early["rank"]) == ("crash", 137, last)
    assert early["summary"].endswith("was ended by SIGKILL, last seen in start"), said
    assert max(run.took(1), run.took(2)) < DEADLINE
    assert the_same(run.tensors(), calm.tensors)


@also_on_4
def test_a_killed_supervisor_a_broken_checkpoint_usr2_in_a_save_and_two_ctrl_c(go: Go, calm: Calm) -> None:
    """Four starts by hand of one run; each goes on from what the one before has left."""
    last, ranks = calm.last, calm.ranks
    plan = [("data", "kill supervisor", 10, last), ("save", "usr2", 1, 0), ("data", "interrupt twice", 1, last)]
    run = go(ranks=ranks, plan=plan)
    code, said = run.wait(lingers=DEADLINE)
    assert code == -signal.SIGKILL, said
    assert not run.dir.attempt(1).ending.exists()
    assert {path.name for path in run.dir.checkpoints.glob("step-*")} == {"step-00000004", "step-00000008"}

    newest = run.dir.checkpoints / "step-00000008/data.h5"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2 :] = bytes(255 - value for value in data[len(data) // 2 :])
    newest.write_bytes(data)
    run = go(ranks=ranks, plan=plan)
    code, said = run.wait()
    assert code == Exit.STOPPED, said
    assert re.search(r"step-00000008.*damaged", said), said
    assert "resumed from the checkpoint at step 4" in said
    stopped = run.ending(2)
    assert (stopped["kind"], stopped["saved"]) == ("stopped", "step-00000010"), said
    assert run.took(2) < DEADLINE

    run = go(ranks=ranks, plan=plan)
    code, said = run.wait()
    assert code == Exit.INTERRUPTED, said
    assert "resumed from the checkpoint at step 10" in said
    assert "saving and stopping, in about 10 s or after this step; Ctrl-C again ends now" in said
    assert "ending now" in said
    assert run.ending(3)["kind"] == "interrupted"
    assert run.took(3) < DEADLINE

    run = go(ranks=ranks, plan=plan)
    code, said = run.wait()
    assert code == 0, said
    assert "resumed from the checkpoint at step 10" in said
    assert the_same(run.tensors(), calm.tensors)


@also_on_4
def test_a_full_disk_ends_the_run_in_a_sentence_and_it_goes_on_once_there_is_room(
    go: Go, calm: Calm, tmp_path: Path
) -> None:
    (runs := tmp_path / "runs").mkdir()
    # only some of the 12 checkpoints fit, of some 30 kB each
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", runs], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = go("checkpoint.keep=100", "checkpoint.every=1", ranks=calm.ranks)
        code, said = run.wait()
        assert code == Exit.IO, said
        assert "space" in said
        assert "Traceback" not in said
        assert run.ending(1)["kind"] == "io"
        kept = sorted(path.parent.name for path in run.dir.checkpoints.glob("step-*/manifest.json"))
        assert 0 < len(kept) < 12
        subprocess.run(["mount", "-o", "remount,size=170m", runs], check=True)
        run = go("checkpoint.keep=100", "checkpoint.every=1", ranks=calm.ranks)
        code, said = run.wait()
        assert code == 0, said
        assert f"resumed from the checkpoint at step {int(kept[-1][5:])}" in said
        assert the_same(run.tensors(), calm.tensors)
    finally:
        subprocess.run(["umount", "-l", runs], check=True)


@pytest.mark.parametrize("calm", [on_4], indirect=True)
def test_four_ranks_one_killed_in_a_save_one_stopped(go: Go, calm: Calm) -> None:
    run = go("--restarts", "2", ranks=4, plan=[("save", "kill", 2, 3), ("data", "stop", 2, 2)])
    code, said = run.wait()
    assert code == 0, said
    killed, stopped = run.ending(1), run.ending(2)
    assert (killed["kind"], killed["code"], killed["rank"]) == ("crash", 137, 3), said
    assert (stopped["kind"], stopped["rank"]) == ("hang", 2), said
    assert re.search(r"rank 2 of 4 on \S+ is stopped \(SIGSTOP\), last seen in \S+.*; 3 others", stopped["summary"])
    assert run.took(1) < DEADLINE
    assert run.took(2) < 3 + DEADLINE
    assert the_same(run.tensors(), calm.tensors)


SSH = """#!/bin/sh
# plays another host: the command runs here, in a session of its own and under that host's name
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec unshare --uts sh -c 'hostname "$0"; exec setsid sh -c "$1"' "$host" "$*"
"""


@also_on_4
def test_a_host_is_lost_and_the_others_go_on(
    go: Go, calm: Calm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subprocess.run(["unshare", "--uts", "hostname", "there"], capture_output=True).returncode:
        pytest.skip("another host name needs root")
    (tools := tmp_path / "tools").mkdir()
    (tools / "ssh").write_text(SSH)
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    half = calm.ranks // 2
    hosts = ["-H", f"{socket.gethostname()}:{half},there:{half}", "launch.interfaces=lo"]
    plan = [("data", "kill host", 6, calm.last)]
    run = go(*hosts, "--restarts", "1", "--min-ranks", str(half), ranks=calm.ranks, plan=plan)
    code, said = run.wait()
    assert code == 0, said
    lost = run.ending(1)
    assert (lost["kind"], lost["host"], lost["rank"]) == ("lost", "there", half), said
    told = rf"^the host there is gone; rank {half} of {calm.ranks} on it was last seen in \S+"
    assert re.search(told, lost["summary"])
    on = f"{half} rank{'s' * (half > 1)}"
    assert f"starting again at once (at most 1 restart without progress), on {on}, from step-00000004" in said
    assert run.took(1) < DEADLINE
    tensors = run.tensors()
    assert all(np.allclose(tensors[name], calm.tensors[name], rtol=1e-5) for name in calm.tensors), (
        "the same mathematics"
    )


DEATHS = 30
LONG = """
name: run
task: {name: "troubled:Troubled", args: {path: there, pause: 0.02}}
train: {steps: 2400, global_batch: 16}
optim: {name: momentum, lr: 0.0005}
eval: {every: 70}
checkpoint: {every: 20, check_replicas: 0}
log: {every: 5}
watchdog: {silence: 3s}
restart: {backoff: 100ms, longest: 1s, most: 100}
"""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_dies_at_random_moments_and_ends_as_if_it_had_not(tmp_path: Path) -> None:
    """A rank, mpirun or `harness run` is killed, or a rank stopped: while it starts, restores, trains or saves."""
    (quiet := tmp_path / "quiet").mkdir()
    (folder := tmp_path / "dies").mkdir()
    chance, start = random.Random(5), 0.0
    run = launch(folder, config=LONG)
    try:
        for number in range(1, DEATHS + 1):
            attempt, began = run.dir.attempt(number), time.monotonic()
            run.until(attempt.command.exists)
            how = chance.choice(["rank", "rank", "rank", "launcher", "supervisor", "stop"])

            def both_are_here(run: Run = run, number: int = number) -> bool:
                return len(run.members(number)[1]) == 2

            def it_trains(run: Run = run, number: int = number) -> bool:
                status = run.dir.read_status()
                return (status.get("attempt"), status.get("state")) == (number, "running")

            if start and how != "stop" and chance.random() < 0.4:
                time.sleep(chance.uniform(0, start))
                run.until(both_are_here)
            else:
                run.until(it_trains)
                start = start or time.monotonic() - began
                time.sleep(chance.uniform(0, 3))
            mpirun, ranks = run.members(number)
            victim = {"launcher": mpirun, "supervisor": run.process.pid}.get(how) or chance.choice(ranks)
            os.kill(victim, signal.SIGSTOP if how == "stop" else signal.SIGKILL)
            died = time.monotonic()
            if how == "supervisor":
                code, said = run.wait(lingers=DEADLINE)
                assert code == -signal.SIGKILL, said
                run = launch(folder, config=LONG)
            else:
                run.until(attempt.ending.exists)
                ending = run.ending(number)
                assert ending["kind"] == ("hang" if how == "stop" else "crash"), (how, ending)
                assert (ending["rank"] is None) == (how == "launcher"), (how, ending)
            print(f"death {number}: {how}, recorded after {time.monotonic() - died:.1f} s, {run.dir.read_status()}")
        code, said = run.wait()
        assert code == 0, said
        assert len(run.attempts) == DEATHS + 1
        assert the_same(run.tensors(2400), undisturbed(quiet, 2, LONG, 2400))
    finally:
        run.end()
