"""The parts around the training loop, in one process: what they do when something is wrong."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from harness.checkpoint.comm import Single
from harness.clock import Clock
from harness.config import Config
from harness.env import identify
from harness.errors import Stopped, StorageError
from harness.failure import record
from harness.job import Job, build
from harness.log import Tee
from harness.loop import restore, run_evaluation, train
from harness.rundir import RunDir
from harness.sinks.jsonl import JsonLines
from harness.task import Task
from harness.world import World

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


@needs_full
def test_a_full_disk_under_the_log_leaves_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.StringIO()
    with pytest.raises(OSError), open(FULL, "w", buffering=1) as file:  # closing it raises
        monkeypatch.setattr("sys.stdout", Tee(console, file))
        print("told", flush=True)
        assert console.getvalue() == "told\n"


@needs_full
@pytest.mark.parametrize("launched", [False, True])
def test_a_failing_rank_ends_though_it_cannot_say_why(monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    if launched:
        monkeypatch.setenv("HARNESS_RUN_ID", "x")
    with pytest.raises(OSError), open(FULL, "w", buffering=1) as file:  # closing it raises
        monkeypatch.setattr("sys.stderr", Tee(file, file))
        record(ValueError("x"), identify({}), Clock(), None)


@needs_full
def test_metrics_on_a_full_disk_are_told_once_as_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(FULL)
    lines = JsonLines(path, attempt=1)
    with pytest.raises(StorageError, match="no space left"):
        lines.record({"kind": "train", "step": 1, "loss": 1.0})
    lines.close()


class Chosen(Task):
    """Splits its data with numpy's global generator; its metric `given` is what the test wants."""

    given: ClassVar[list[float]] = []
    modes: ClassVar[list[bool]] = []

    def data(self, split: str) -> Any:
        return torch.utils.data.TensorDataset(torch.from_numpy(np.random.permutation(64)[:32]).float()[:, None])

    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).pow(2).mean()

    def summarize(self, model: torch.nn.Module, metrics: Mapping[str, float]) -> Mapping[str, float]:
        self.modes.append(model.training)
        return {"given": self.given.pop(0)} if self.given else {}

    def report(self, model: torch.nn.Module) -> str | None:
        self.modes.append(model.training)
        return None


def job(directory: Path, **sections: Any) -> Job:
    tree = {
        "name": "x",
        "task": {"name": "test_loop_parts:Chosen"},
        "train": {"steps": 4, "global_batch": 8},
        "run_dir": str(directory),
    }
    world = World(0, 1, 0, 1, ("here",), torch.device("cpu"), Single(), "none")
    directory.mkdir(parents=True, exist_ok=True)
    return build(Config.model_validate(tree | sections), RunDir(directory), 1, world, Clock())


def test_deterministic_runs_may_multiply_matrices_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "theirs")
    job(tmp_path)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == "theirs"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    job(tmp_path)
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def test_horovod_writes_its_timeline_into_a_run_directory_that_is_new(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from harness.config import Horovod
from harness.env import identify
from harness.world import bring_up
bring_up(identify({}), Horovod(timeline=True), Path(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, timeout=100)
    assert (tmp_path / "run/timeline.json").exists()


def test_a_start_may_be_told_to_go_back_to_an_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(job(tmp_path, checkpoint={"every": 2, "mode": "wait"}))
    monkeypatch.setenv("HARNESS_ROLL_BACK", "step-00000002")
    again = job(tmp_path)
    assert restore(again) == 2
    assert (tmp_path / "checkpoints/step-00000004/aside.json").exists(), "nothing is deleted"
    again.manager.close()
    monkeypatch.delenv("HARNESS_ROLL_BACK")
    assert restore(job(tmp_path)) == 2, "it stays so"


def test_data_made_at_random_are_the_same_at_every_start(tmp_path: Path) -> None:
    np.random.seed(1)
    one = job(tmp_path / "a")
    np.random.seed(2)
    other = job(tmp_path / "b")
    assert torch.equal(one.train_data.tensors[0], other.train_data.tensors[0])
    assert torch.equal(one.model[0].weight, other.model[0].weight)


def test_a_metric_that_is_not_finite_is_no_improvement_and_no_best_value(tmp_path: Path) -> None:
    it = job(tmp_path, eval={"stop": {"metric": "given", "patience": 2}})
    Chosen.given[:] = [math.nan, 1.0, math.inf, -math.inf]
    ends = [run_evaluation(it, step) for step in range(4)]
    assert ends == [False, False, False, True]
    assert (it.progress.best, it.progress.waited) == (1.0, 2)


def test_early_stopping_where_no_value_is_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    it = job(tmp_path, eval={"stop": {"metric": "given", "patience": 1}})
    Chosen.given[:] = [math.nan]
    assert run_evaluation(it, 1)
    assert "given has not improved on nan for 1 evaluations" in capsys.readouterr().out


class StopAt:
    """Asks for a stop at the given log line, 0: before the first step."""

    reason = "the test"

    def __init__(self, interval: int) -> None:
        self.left = interval + 1

    def wanted(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_early_stopping_is_the_same_with_a_stop_anywhere(tmp_path: Path, stop_at: int) -> None:
    sections: dict[str, Any] = {
        "train": {"steps": 8, "global_batch": 8},
        "log": {"every": 1},
        "eval": {"every": 2, "stop": {"metric": "given", "patience": 1}},
    }
    Chosen.given[:] = [2.0, 1.0, 3.0, 0.0]  # improves at steps 2 and 4, and no more at 6
    stopped = job(tmp_path, **sections)
    object.__setattr__(stopped, "stop", StopAt(stop_at))
    with pytest.raises(Stopped, match=f"step {stop_at} of 8"):
        train(stopped)
    resumed = job(tmp_path, **sections)
    train(resumed)
    assert (resumed.progress.step, resumed.progress.best, Chosen.given) == (6, 1.0, [0.0])


def test_a_run_that_an_evaluation_left_out_ends_stays_ended(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "train": {"steps": 8, "global_batch": 8},
        "log": {"every": 1},
        "eval": {"every": 2, "stop": {"metric": "given", "patience": 1}},
    }
    Chosen.given[:] = [1.0, 2.0, 0.0, 0.0]
    stopped = job(tmp_path, **sections)
    object.__setattr__(stopped, "stop", StopAt(4))
    with pytest.raises(Stopped):
        train(stopped)
    for _ in range(2):
        resumed = job(tmp_path, **sections)
        train(resumed)
        assert (resumed.progress.step, resumed.progress.waited, Chosen.given) == (4, 1, [0.0, 0.0])


def test_what_a_task_says_about_a_model_it_says_in_evaluation_mode(tmp_path: Path) -> None:
    it = job(tmp_path)
    Chosen.modes.clear()
    run_evaluation(it, 1)
    assert Chosen.modes == [False, False]
    assert it.model.training


def start(config: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", str(config)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "HARNESS_"))}
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=100, check=False)


def test_a_stop_file_of_an_earlier_start_stops_no_later_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"{{name: x, run_dir: {tmp_path}/run, task: {{name: linear}},"
        " train: {steps: 4, global_batch: 8}, log: {every: 1}}"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    done = start(tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    assert "finished at step 4" in done.stdout


@pytest.mark.parametrize(("local_rank", "tells"), [("0", True), ("1", False)])
def test_one_rank_of_each_host_tells_what_is_wrong_there(tmp_path: Path, local_rank: str, tells: bool) -> None:
    place = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": local_rank}
    done = start(tmp_path / "only-on-rank-0.yaml", **place)
    assert done.returncode == 66
    assert ("only-on-rank-0.yaml" in done.stderr) == tells
