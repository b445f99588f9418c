"""Whether a start has anything left to do. Runs are files; no rank is started."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config
from harness.rundir import RunDir, open_run, write_json
from launch.finished import finished, nothing_left

JOB = {"SLURM_JOB_ID": "17"}
VALUES: dict[str, Any] = {"name": "run", "task": {"name": "linear"}, "train": {"steps": 12, "global_batch": 16}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_run(config: Config, *saved: int, **status: Any) -> RunDir:
    """One that has finished at step 12, but for what is said otherwise."""
    run = open_run(config)
    for step in saved or (8, 12):
        (folder := run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (folder / "manifest.json").touch()
    now = time.time()
    os.utime(run.config, (now - 20, now - 20))
    write_json(run.status, {"state": "finished", "step": 12, "steps": 12, "attempt": 1, "time": now - 10} | status)
    return run


def changed(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({name: VALUES.get(name, {}) for name in VALUES} | sections)


CONFIG = Config.model_validate(VALUES)


def test_a_run_that_has_finished() -> None:
    run = a_run(CONFIG)
    assert finished(run, CONFIG) == 12
    assert finished(run, changed(log={"every": 1}, launch={"ranks": 7})) == 12, "which does not make it longer"
    told = "runs/run is finished: nothing to train after step 12; a higher train.steps goes on"
    for environ in ({}, JOB, JOB | {"SLURM_RESTART_COUNT": "1"}):
        assert nothing_left(run, CONFIG, follow_up=False, environ=environ) == told
        assert nothing_left(run, CONFIG, follow_up=True, environ=environ) == told


def test_epochs() -> None:
    config = changed(train={"epochs": 2.0, "global_batch": 16})
    run = a_run(config)
    assert str(nothing_left(run, config, follow_up=True, environ={})).endswith("; a higher train.epochs goes on")
    assert nothing_left(run, config, follow_up=False, environ={}) is None, "the data set may have grown"
    assert finished(run, changed(train={"epochs": 3.0, "global_batch": 16})) is None


@pytest.mark.parametrize("status", [{"state": "stopped"}, {"state": "failed"}, {"step": None}, {"time": None}])
def test_one_that_has_not(status: dict[str, Any]) -> None:
    assert finished(a_run(CONFIG, **status), CONFIG) is None


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": 24, "global_batch": 16}},
        {"train": {"steps": 6, "global_batch": 16}},
        {"optim": {"lr": 0.5}},  # which is refused later, in its own words
        {"eval": {"every": 5}},
        {"data": {"workers": 1}},
    ],
)
def test_a_config_that_asks_for_something_else(sections: dict[str, Any]) -> None:
    assert finished(a_run(CONFIG), changed(**sections)) is None


def test_ended_early() -> None:
    """Where the evaluation stopped improving; without early stopping it goes on."""
    early = {"eval": {"every": 2, "stop": {"patience": 1}}}
    run = a_run(changed(**early), 4, 8, step=8)
    assert finished(run, changed(**early)) == 8
    assert finished(run, changed(eval={"every": 2})) is None


def test_what_was_asked_for_since_then() -> None:
    """A submission freezes the config, and its job goes on with that."""
    run = a_run(CONFIG)
    longer = changed(train={"steps": 24, "global_batch": 16})
    open_run(longer)
    assert finished(run, longer) is None
    os.utime(run.config, (1, 1))
    assert finished(run, longer) is None, "by a host whose clock is wrong"
    epochs = changed(train={"epochs": 2.0, "global_batch": 16})
    open_run(epochs)
    assert finished(run, epochs) is None


def test_checkpoints_that_are_gone_or_set_aside(here: Path) -> None:
    run = a_run(CONFIG)
    (run.checkpoints / "step-00000012" / "aside.json").touch()
    assert finished(run, CONFIG) is None
    run.checkpoints.rename(here / "elsewhere")
    assert finished(run, CONFIG) is None


def test_no_run_yet() -> None:
    assert finished(RunDir(Path("runs/run")), CONFIG) is None


@pytest.mark.parametrize(("text", "over"), [("asked by me on x\n", True), ("", True), ("signal\n", False)])
def test_a_job_that_comes_by_itself_ends_where_a_person_has_stopped_the_run(text: str, over: bool) -> None:
    run = a_run(CONFIG, state="stopped")
    run.stop.write_text(text)
    assert (nothing_left(run, CONFIG, follow_up=True, environ=JOB) is not None) == over
    again = JOB | {"SLURM_RESTART_COUNT": "1"}
    assert (nothing_left(run, CONFIG, follow_up=False, environ=again) is not None) == over
    assert nothing_left(run, CONFIG, follow_up=False, environ=JOB) is None, "it was asked for again"
