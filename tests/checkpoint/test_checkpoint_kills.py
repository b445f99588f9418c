"""Real jobs, killed without warning: what is restored afterwards is what that step must have, and never an older step
than the last that was reported to be durable. The next job goes on from there, at once. The job is in `ranks_kills.py`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks_kills import EVERY, make
from samples import manager
from support import QUIET, ROOT, needs_mpirun, ranks

from harness.checkpoint.comm import Single
from harness.checkpoint.engines.mpio import unavailable

SCRIPT = str(Path(__file__).with_name("ranks_kills.py"))
PATIENCE = 120


class Round:
    """One job, from its start to its violent end."""

    def __init__(self, directory: Path, mode: str, size: int) -> None:
        self.directory, self.size = directory, size
        self.pids = directory / "pids"
        self.pids.mkdir(exist_ok=True)
        for left in self.pids.iterdir():
            left.unlink()
        self.output = open(directory / "output", "w+")  # noqa: SIM115
        self.job = subprocess.Popen(
            ["mpirun", "-np", str(size), sys.executable, SCRIPT, str(directory), mode],
            env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def until(self, happened: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.job.poll() is None and time.monotonic() < deadline, self.told()
            time.sleep(0.001)

    def trains(self) -> bool:
        return len([path for path in self.pids.iterdir() if path.read_text()]) == self.size

    def kill(self, victims: list[int]) -> None:
        for rank in victims:
            os.kill(int((self.pids / str(rank)).read_text()), signal.SIGKILL)
        self.job.wait(PATIENCE)

    def told(self) -> str:
        self.output.seek(0)
        return self.output.read()[-6000:]

    def end(self) -> None:
        if self.job.poll() is None:
            os.killpg(self.job.pid, signal.SIGKILL)
            self.job.wait()
        self.output.close()


def durable(directory: Path) -> list[int]:
    path = directory / "durable"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def being_written(checkpoints: Path) -> bool:
    try:
        return any(".tmp-" in name for name in os.listdir(checkpoints))
    except FileNotFoundError:
        return False


def kill_and_restore(directory: Path, mode: str, rounds: int, seed: int) -> None:
    """So many jobs, each of which goes on where the one before was killed."""
    chance = random.Random(seed)
    checkpoints = directory / "checkpoints"
    expected, last, unfinished = make(mode), 0, 0
    for number in range(rounds):
        size = (2, 4)[number % 2] if rounds > 2 else 2
        before = len(durable(directory))
        job = Round(directory, mode, size)
        try:
            job.until(job.trains)
            assert float((directory / "claimed").read_text()) < 3.0, "the lease of a dead job is taken over at once"
            victims = list(range(size)) if chance.random() < 0.4 else [chance.randrange(size)]
            aimed = chance.random() < 0.6
            if chance.random() < 0.8:
                job.until(lambda: len(durable(directory)) > before)  # noqa: B023
            time.sleep(chance.random() * 0.5)
            if aimed:
                job.until(lambda: being_written(checkpoints))
                time.sleep(chance.random() * 0.02)
            job.kill(victims)
            where = f"round {number}, {size} ranks, {victims} killed\n{job.told()}"
        finally:
            job.end()
        unfinished += being_written(checkpoints)
        reported = max(durable(directory), default=0)
        found = make(mode)
        reader = manager(checkpoints)
        step = reader.restore(found.state) or 0
        assert reader.lines == [], where  # type: ignore[attr-defined]
        assert step >= max(reported, last) and step % EVERY == 0, (step, reported, last, where)
        if step:
            expected.to(step)
            assert found.bits() == expected.bits(), where
        print(f"round {number}: {size} ranks, {victims} killed, step {step}, reported {reported}", flush=True)
        last = step
    assert rounds < 10 or unfinished > 0, "none was hit in the middle of a save"
    done = ranks(2, [SCRIPT, str(directory), mode, "6"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert durable(directory)[-1] == max(durable(directory)) > last
    assert sorted(path.name.partition("-")[0] for path in checkpoints.iterdir()) == ["lease", "step", "step"]


@pytest.mark.mpi
@needs_mpirun
def test_a_second_job_is_refused_before_it_trains(tmp_path: Path) -> None:
    """And where the first one has crashed, the next one takes over at once."""
    first = Round(tmp_path, "direct", 2)
    try:
        first.until(first.trains)
        second = tmp_path / "second"
        (second / "pids").mkdir(parents=True)
        (second / "checkpoints").symlink_to(tmp_path / "checkpoints")  # however it is called
        done = ranks(2, [SCRIPT, str(second), "direct", "6"])
        assert done.returncode != 0 and "is in use by process" in done.stderr, done.stdout + done.stderr
        assert not durable(second) and not any((second / "pids").iterdir())
        before = len(durable(tmp_path))
        first.until(lambda: len(durable(tmp_path)) > before)  # it does not mind
        first.kill([0])
    finally:
        first.end()
    done = ranks(2, [SCRIPT, str(second), "direct", "6"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert float((second / "claimed").read_text()) < 3.0
    assert durable(second)[-1] > durable(tmp_path)[-1]


MODES = [("direct", 5, 50), ("lazy", 2, 25), ("mpio", 3, 25)]


def skip_without(mode: str) -> None:
    if mode == "mpio" and unavailable(Single()) is not None:
        pytest.skip("there is no MPI")


@pytest.mark.mpi
@needs_mpirun
@pytest.mark.parametrize(("mode", "rounds"), [(mode, few) for mode, few, _ in MODES])
def test_killed_at_any_moment(mode: str, rounds: int, tmp_path: Path) -> None:
    skip_without(mode)
    kill_and_restore(tmp_path, mode, rounds, seed=1)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(3600)
@needs_mpirun
@pytest.mark.parametrize(("mode", "rounds"), [(mode, many) for mode, _, many in MODES])
def test_killed_at_any_moment_a_hundred_times(mode: str, rounds: int, tmp_path: Path) -> None:
    skip_without(mode)
    kill_and_restore(tmp_path, mode, rounds, seed=2)
