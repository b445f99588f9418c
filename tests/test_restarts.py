"""Runs that fail in known ways under the real mpirun: what is told, that nothing is left, and what a restart makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, needs_mpirun

from harness.checkpoint import open_checkpoint
from harness.rundir import Attempt, RunDir
from launch import processes

pytestmark = [needs_mpirun, pytest.mark.mpi, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
CONFIG = """
name: run
task: {name: "tasks_for_tests:Troubled", args: {path: there}}
train: {steps: 12, global_batch: 16}
optim: {name: momentum, lr: 0.05}
eval: {every: 5}
checkpoint: {every: 4, check_replicas: 0, mode: wait}
log: {every: 2}
watchdog: {silence: 3s}
restart: {backoff: 100ms}
"""


@dataclass
class Run:
    """A `harness run` under way in a folder."""

    folder: Path
    process: subprocess.Popen[str]

    def wait(self) -> tuple[int, str]:
        """Exit code and all that was printed; no process of the run is left."""
        said, _ = self.process.communicate(timeout=500)
        for attempt in self.attempts:
            assert processes.members(-1, str(json.loads(attempt.command.read_text())["run_id"])) == []
        assert list(self._here()) == []
        return self.process.returncode, said

    def _here(self) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and Path(os.readlink(entry / "cwd")) == self.folder:
                    yield int(entry.name)
            except OSError:
                continue

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate(timeout=60)
            time.sleep(0.05)

    @property
    def dir(self) -> RunDir:
        return RunDir(self.folder / "runs/run")

    @property
    def attempts(self) -> list[Attempt]:
        return self.dir.attempts()

    def ending(self, index: int = -1) -> dict[str, Any]:
        return dict(json.loads(self.attempts[index].ending.read_text()))

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the final checkpoint."""
        (last,) = (self.dir.checkpoints).glob("step-00000012*")
        checkpoint = open_checkpoint(last)
        return {name: np.asarray(checkpoint.read(name)) for name in checkpoint.names()}


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def go(*arguments: str) -> Run:
        return launch_in(tmp_path, *arguments, started=started)

    yield go
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()
        for attempt in run.attempts:
            processes.end(-1, str(json.loads(attempt.command.read_text())["run_id"]), grace=0)


def launch_in(folder: Path, *arguments: str, started: list[Run] | None = None) -> Run:
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "tasks_for_tests.py").write_bytes((ROOT / "tests" / "tasks_for_tests.py").read_bytes())
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "run.yaml", "-n", "2", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = Run(folder, process)
    if started is not None:
        started.append(run)
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    run = launch_in(tmp_path_factory.mktemp("undisturbed"))
    code, said = run.wait()
    assert code == 0, said
    tensors = run.tensors()
    assert len(tensors) >= 4, "weight and bias, each with its momentum"
    return tensors


def the_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_a_rank_is_killed_in_each_section_and_the_run_ends_as_if_it_had_not_been(
    launch: Callable[..., Run], undisturbed: dict[str, np.ndarray]
) -> None:
    plan = [("start", 1, 1), ("data", 7, 1), ("step", 2, 0), ("save", 2, 0), ("evaluation", 1, 1)]
    told = [[place, "kill", at, rank] for place, at, rank in plan]
    run = launch("--restarts", "5", f"task.args.plan={json.dumps(told)}")
    code, said = run.wait()
    assert code == 0, said
    assert [run.ending(index)["state"] for index in range(6)] == [*["failed"] * 5, "finished"]
    for index, (_, _, rank) in enumerate(plan):
        assert (run.folder / f"there.{index + 1}").exists(), "the trouble has come"
        ending = run.ending(index)
        assert (ending["kind"], ending["code"], ending["rank"]) == ("crash", 137, rank), said
        assert re.search(rf"^rank {rank} on \S+ was ended by SIGKILL, last seen in ", ending["summary"]), said
    assert run.ending(0)["summary"].endswith("last seen in start")
    assert "restart 1 of 5 without progress at once, with 2 ranks, from the beginning" in said
    assert re.search(r"^ *6 +2 .* finished: finished$", said, re.MULTILINE), said
    assert the_same(run.tensors(), undisturbed)


def test_a_rank_that_hangs_is_found_and_the_run_ends_as_if_it_had_not(
    launch: Callable[..., Run], undisturbed: dict[str, np.ndarray]
) -> None:
    told = [["data", "sleep", 7, 1], ["step", "stop", 2, 0]]
    run = launch("--restarts", "2", "watchdog.data=5s", f"task.args.plan={json.dumps(told)}")
    code, said = run.wait()
    assert code == 0, said
    stuck, stopped = run.ending(0), run.ending(1)
    assert (stuck["kind"], stuck["rank"]) == ("hang", 1), said
    assert re.search(
        r"rank 1 of 2 on \S+ hangs: last seen in data at step 6 for .*, longer than watchdog.data \(5.0 s\) allows;"
        r" 1 other waits in communication",
        stuck["summary"],
    ), said
    assert "tasks_for_tests.py" in run.attempts[0].log(1).read_text(), "its stack"
    assert "Thread" in run.attempts[0].log(0).read_text(), "the other's stacks"
    assert (stopped["kind"], stopped["rank"]) == ("hang", 0), said
    assert re.search(
        r"rank 0 of 2 on \S+ is stopped \(SIGSTOP\), last seen in .* ago; 1 other waits", stopped["summary"]
    )
    assert the_same(run.tensors(), undisturbed)
