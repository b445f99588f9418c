"""Elastic runs under the real horovodrun: ranks are killed, come back and are taken away, and nobody starts anew."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from training import train
from troubled import Troubled

from harness.batch import plan_batch
from harness.data import train_batches
from harness.job import seed_generators
from harness.order import Order
from harness.resolve import resolve
from harness.rundir import Attempt, RunDir
from launch import processes

STEPS, LOG = 800, 5
CONFIG = f"""
name: run
task: {{name: "troubled:ComesAndGoes", args: {{trouble: kill}}}}
train: {{steps: {STEPS}, global_batch: 15, ema: 0.9}}
optim: {{name: momentum, lr: 0.002}}
checkpoint: {{check_replicas: 1, strict: true}}
log: {{every: {LOG}}}
restart: {{backoff: 100ms, longest: 2s}}
launch: {{hosts: "localhost:1,127.0.0.1:1"}}
"""


@dataclass
class Run:
    """A `harness run --elastic` under way in a folder; what it prints goes to a file."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    @property
    def dir(self) -> RunDir:
        return RunDir(self.folder / "runs/run")

    def attempt(self, number: int = 1) -> Attempt:
        return self.dir.attempt(number)

    def ending(self, number: int = 1) -> dict[str, Any]:
        return dict(json.loads(self.attempt(number).ending.read_text()))

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.said
            time.sleep(0.05)

    def wait(self) -> int:
        code = self.process.wait(timeout=200)
        for attempt in self.dir.attempts():
            assert processes.members(-1, str(json.loads(attempt.command.read_text())["run_id"])) == []
        return code


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started: list[Run] = []

    def go(*arguments: str) -> Run:
        (tmp_path / "run.yaml").write_text(CONFIG)
        (tmp_path / "troubled.py").write_bytes((ROOT / "tests" / "troubled.py").read_bytes())
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", "run", "run.yaml", "-n", "2", "--elastic", *arguments],
                cwd=tmp_path,
                env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        started.append(Run(tmp_path, process))
        return started[-1]

    yield go
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        for attempt in run.dir.attempts():
            processes.end(-1, str(json.loads(attempt.command.read_text())["run_id"]), grace=0)


class AsInARun(Troubled):
    """With the initial parameters of a run."""

    def model(self) -> torch.nn.Module:
        seed_generators(0)
        return super().model()


@pytest.mark.mpi
@pytest.mark.timeout(600)
def test_a_rank_is_killed_and_comes_back_and_is_taken_away(launch: Callable[..., Run]) -> None:
    run = launch()
    run.until(lambda: run.said.count("2 ranks on 2 hosts") == 2)
    assert run.said.count("1 rank on 1 host") == 1, "in between the other went on alone"
    assert "resumed from step 20 in the memory of rank 0" in run.said
    assert re.search(r"\nrank 0 of 2 on \S+ was ended by SIGKILL, .*; the other goes on from memory\n", run.said)
    assert not list(run.dir.checkpoints.glob("step-*")), "nothing has ever been written to a disk"

    stays = run.attempt().heartbeats()[0].host
    run.dir.hosts.write_text(f"{stays}:1\n")
    run.until(lambda: run.said.count("1 rank on 1 host") == 2)
    (run.folder / "go").touch()
    assert run.wait() == 0, run.said

    said = (run.attempt().root / "launcher.log").read_text()
    assert "exit with status code 137" in said and "exit with status code 75" in said, "killed, and taken away"
    for word in ("error", "SIGABRT", "status code", "terminate", "Traceback", "uncaught"):
        assert word not in run.said, run.said
    ending = run.ending()
    assert (ending["kind"], ending["code"], len(run.dir.attempts())) == ("finished", 0, 1)
    assert json.loads(run.dir.status.read_text())["state"] == "finished"
    assert set(run.attempt().heartbeats()) == {0}
    assert [path.name for path in run.dir.checkpoints.glob("step-*")] == [f"step-{STEPS:08d}"]

    # every step was done once in the end, with the same samples as on one rank that nobody has disturbed
    lines = [json.loads(line) for line in run.dir.metrics.read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert list(losses) == list(range(LOG, STEPS + 1, LOG))
    model, expected = train(AsInARun(), resolve(run.folder / "run.yaml").config)
    np.testing.assert_allclose(list(losses.values()), np.reshape(expected, (-1, LOG)).mean(1), rtol=1e-4)
    from harness.checkpoint import open_checkpoint

    weight = open_checkpoint(run.dir.checkpoints / f"step-{STEPS:08d}").read("model/weight")
    np.testing.assert_allclose(np.asarray(weight), model.weight.detach().numpy(), rtol=1e-4)


@pytest.mark.mpi
@pytest.mark.timeout(600)
def test_when_all_ranks_fail_the_newest_checkpoint_counts_and_a_stop_stops(launch: Callable[..., Run]) -> None:
    run = launch("--restarts", "1", "task.args.trouble=raise", "checkpoint.every=5", "checkpoint.mode=wait")
    run.until(lambda: "resumed from the checkpoint at step 10" in run.said)
    run.until(lambda: json.loads(run.dir.status.read_text())["step"] > 10)
    run.dir.stop.touch()
    assert run.wait() == 75, run.said
    failed, stopped = run.ending(1), run.ending(2)
    assert (failed["kind"], failed["code"], failed["saved"]) == ("crash", 1, "step-00000010"), run.said
    assert "ValueError: label 17 is out of range" in run.said
    assert "at most 1 restart without progress" in run.said
    assert stopped["kind"] == "stopped" and "go on with: harness run" in run.said
    assert "Horovod detected" not in run.said, "that is not for a person"
    assert "Horovod detected" in (run.attempt(2).root / "launcher.log").read_text()


@pytest.mark.mpi
@pytest.mark.timeout(600)
def test_a_run_that_waits_for_more_ranks_can_be_stopped(launch: Callable[..., Run]) -> None:
    run = launch("--min-ranks", "2", "checkpoint.every=5", "checkpoint.mode=wait", "restart.backoff=300")
    run.until(lambda: "the other waits until there are 2 ranks again" in run.said)
    run.dir.stop.touch()
    assert run.wait() == 75, run.said
    assert "stopped while it waited for ranks" in run.said
    assert "the state of step 20 is saved; go on with: harness run" in run.said
    assert (run.ending()["kind"], run.ending()["state"]) == ("stopped", "stopped")
    assert json.loads(run.dir.status.read_text())["state"] == "stopped"


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_newcomer_is_killed_before_it_has_joined_and_the_next_one_joins(launch: Callable[..., Run]) -> None:
    def ranks() -> set[int]:
        run_id = str(json.loads(run.attempt().command.read_text())["run_id"])
        return processes.ranks([sys.executable, "-m", "harness"], run_id)

    run = launch()
    run.until((run.folder / "killed").exists)
    before = ranks()
    run.until(lambda: bool(ranks() - before))
    (newcomer,) = ranks() - before
    os.kill(newcomer, signal.SIGKILL)
    run.until(lambda: "what began as rank 1 was ended by SIGKILL; the other goes on from memory" in run.said)
    run.until(lambda: run.said.count("2 ranks on 2 hosts") == 2)
    (run.folder / "go").touch()
    assert run.wait() == 0, run.said
    assert re.search(r"horovodrun to say who goes on\n\nwhat began.*\nresumed from step \d+ in the memory", run.said), (
        run.said
    )
    assert run.ending()["kind"] == "finished" and len(run.dir.attempts()) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [None, 2])
def test_the_gradient_of_an_uneven_batch_is_that_of_the_whole(ranks: int, micro: int | None) -> None:
    task = Troubled()
    data, order = task.data("train"), Order(64, 0)
    plan = plan_batch(global_batch=15, ranks=ranks, micro_batch=micro, uneven=True)
    torch.manual_seed(0)
    model = task.model().double()

    def loss(batch: Any) -> torch.Tensor:
        return task.loss(model, [tensor.double() for tensor in batch.data])

    for replica in range(ranks):
        for batch in train_batches(data, order, plan, replica=replica, start_step=3, stop_step=4, seed=0):
            (loss(batch) * plan.weight(batch.samples) / plan.passes / ranks).backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    whole = plan_batch(global_batch=15, ranks=1, micro_batch=None)
    loss(next(train_batches(data, order, whole, replica=0, start_step=3, stop_step=4, seed=0))).backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
