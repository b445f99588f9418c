"""Runs that are disturbed on purpose: one folder, one `harness run` after the other, and what must be true after each.

run = launch(tmp_path, "--restarts", "2", plan=[("data", "kill", 7, 1)])
code, said = run.wait()                                  # nothing of it is left
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support import ROOT

from harness.checkpoint import open_checkpoint
from harness.rundir import Attempt, RunDir
from launch import processes

BIN = Path(sys.executable).parent
STEPS = 12
CONFIG = f"""
name: run
task: {{name: "troubled:Troubled", args: {{path: there}}}}
train: {{steps: {STEPS}, global_batch: 16}}
optim: {{name: momentum, lr: 0.05}}
eval: {{every: 5}}
checkpoint: {{every: 4, check_replicas: 0, mode: wait}}
log: {{every: 2}}
watchdog: {{silence: 3s}}
restart: {{backoff: 100ms}}
"""
Plan = Sequence[tuple[str, str, int, int]]
"""What `troubled:Troubled` does in each attempt."""
DEADLINE = 90.0
"""Seconds from a trouble to the record of its end: 10 on a quiet machine, and no wait for limits of minutes."""


@dataclass
class Run:
    """A `harness run` under way in a folder."""

    folder: Path
    process: subprocess.Popen[bytes]
    output: Path

    def wait(self, *, lingers: float = 0.0) -> tuple[int, str]:
        """Exit code and all that was printed; no process of the run is left, `lingers` seconds after its end."""
        self.process.wait(timeout=900)
        said = self.output.read_text()
        end = time.monotonic() + lingers
        while left := [*self._by_id(), *self._here()]:
            commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left if Path(f"/proc/{pid}").exists()]
            assert time.monotonic() < end, (said, commands)
            time.sleep(0.05)
        return self.process.returncode, said

    def _by_id(self) -> Iterator[int]:
        for attempt in self.attempts:
            yield from processes.members(-1, str(json.loads(attempt.command.read_text())["run_id"]))

    def _here(self) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            try:
                mine = entry.name.isdecimal() and Path(os.readlink(entry / "cwd")) == self.folder
                if mine and (entry / "cmdline").read_bytes():  # not one that is about to be gone
                    yield int(entry.name)
            except OSError:
                continue

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    @property
    def dir(self) -> RunDir:
        return RunDir(self.folder / "runs/run")

    @property
    def attempts(self) -> list[Attempt]:
        return self.dir.attempts()

    def ending(self, number: int) -> dict[str, Any]:
        """How an attempt ended, the first is 1."""
        return dict(json.loads(self.dir.attempt(number).ending.read_text()))

    def took(self, number: int) -> float:
        """Seconds from an attempt's trouble until its end was recorded."""
        return float(self.ending(number)["time"]) - float((self.folder / f"there.{number}").read_text())

    def members(self, number: int) -> tuple[int, list[int]]:
        """The launcher's process and the ranks' of an attempt, 0 and none as long as they are not there."""
        run_id = str(json.loads(self.dir.attempt(number).command.read_text())["run_id"])
        parents = {pid: parent(pid) for pid in processes.members(-1, run_id)}
        mpirun = next((pid for pid, above in parents.items() if above == self.process.pid), 0)
        return mpirun, sorted(pid for pid, above in parents.items() if mpirun and above == mpirun)

    def tensors(self, steps: int = STEPS) -> dict[str, np.ndarray]:
        """The tensors of the final checkpoint."""
        (last,) = self.dir.checkpoints.glob(f"step-{steps:08d}*")
        checkpoint = open_checkpoint(last)
        return {name: np.asarray(checkpoint.read(name)) for name in checkpoint.names()}

    def end(self) -> None:
        """Whatever is left, at the end of a test."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for attempt in self.attempts:
            if attempt.command.exists():
                processes.end(-1, str(json.loads(attempt.command.read_text())["run_id"]), grace=0)


def launch(folder: Path, *arguments: str, ranks: int = 2, plan: Plan = (), config: str = CONFIG) -> Run:
    """Start `harness run` in a folder, anew or to go on with the run there."""
    (folder / "run.yaml").write_text(config)
    (folder / "troubled.py").write_bytes((ROOT / "tests" / "troubled.py").read_bytes())
    words = ["run", "run.yaml", "-n", str(ranks), f"task.args.plan={json.dumps(list(plan))}", *arguments]
    output = folder / f"output.{time.time_ns()}"
    with open(output, "wb") as file:  # not a pipe, which would hold the run up once it is full
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *words],
            cwd=folder,
            env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return Run(folder, process, output)


def undisturbed(folder: Path, ranks: int, config: str = CONFIG, steps: int = STEPS) -> dict[str, np.ndarray]:
    """The tensors with which a run ends that nothing happens to."""
    run = launch(folder, ranks=ranks, config=config)
    code, said = run.wait()
    assert code == 0, said
    tensors = run.tensors(steps)
    assert len(tensors) >= 4, "weight and bias, each with its momentum"
    return tensors


def the_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def parent(pid: int) -> int:
    """A process's parent, -1 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1
