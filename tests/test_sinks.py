"""Where metrics go: JSON lines, the status file, TensorBoard, a person."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from pathlib import Path

import pytest

from harness.config import Config
from harness.errors import StorageError
from harness.log import Tee
from harness.rundir import RunDir
from harness.sinks import Sinks, open_sinks
from harness.sinks.console import Console, describe, number
from harness.sinks.jsonl import JsonLines

CONFIG = {
    "name": "x",
    "task": {"name": "linear"},
    "train": {"steps": 20, "global_batch": 8},
    "log": {"tensorboard": True},
}
TRAIN = {"loss": 2.5, "lr": 0.1, "samples_per_s": 1234.5, "rate": 2.0, "eta_s": 5.0}


def test_every_sink_gets_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path)
    sinks = open_sinks(Config.model_validate(CONFIG), run, attempt=3, world_size=2, steps=20)
    assert run.read_status()["state"] == "starting"
    sinks.record("train", 10, **TRAIN, grad_norm=math.nan)
    assert run.read_status()["state"] == "running"
    sinks.record("eval", 10, loss=2.25, accuracy=0.5)
    sinks.record("checkpoint", 10, path="runs/x/checkpoints/step-00000010", seconds=0.5)
    sinks.say("hello")
    sinks.record("state", 20, state="finished", summary="20 steps")
    sinks.close()

    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "eval", "checkpoint", "state"]
    assert lines[0]["loss"] == 2.5
    assert lines[0]["grad_norm"] is None  # JSON has no nan
    assert {line["attempt"] for line in lines} == {3}
    status = run.read_status()
    assert (status["state"], status["step"], status["steps"], status["world"]) == ("finished", 20, 20, 2)
    assert (status["rate"], status["eta_s"], status["last_checkpoint"]) == (2.0, 5.0, 10)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(10, 2.25)]
    assert events.Scalars("train/loss")[0].value == 2.5
    printed = capsys.readouterr().out
    assert "step 10/20  loss 2.5  lr 0.1  1,234 samples/s  eta 5.0 s" in printed
    assert "evaluation at step 10: loss 2.25, accuracy 0.5" in printed
    assert "hello" in printed


def test_metrics_are_appended_over_attempts(tmp_path: Path) -> None:
    config = Config.model_validate(CONFIG | {"log": {}})
    for attempt in (1, 2):
        sinks = open_sinks(config, RunDir(tmp_path), attempt=attempt, world_size=1, steps=20)
        sinks.record("train", attempt, **TRAIN)
        sinks.close()
    lines = RunDir(tmp_path).metrics.read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2]


def test_a_directory_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises((StorageError, Exception), match="not there") as told:
        open_sinks(Config.model_validate(CONFIG), RunDir(tmp_path / "no"), attempt=1, world_size=1, steps=2)
    assert "Traceback" not in str(told.value)


def test_a_full_disk_is_told_of_once_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, good = JsonLines(Path("/dev/full"), attempt=1), JsonLines(tmp_path / "metrics.jsonl", attempt=1)
    sinks = Sinks([full, Console(steps=9), good])
    for step in (1, 2):
        sinks.record("train", step, loss=1.0)
    told = "warning: no space left for /dev/full; training goes on without it"
    assert capsys.readouterr().out.splitlines().count(told) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    sinks.close()


def test_a_terminal_gets_a_bar_and_the_log_file_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", Tee(terminal, file))
    monkeypatch.setenv("HARNESS_TTY", "100")
    monkeypatch.setenv("TERM", "xterm")
    console = Console(steps=20)
    console.record({"kind": "train", "step": 10, **TRAIN})
    console.say("a [bold] word")
    console.close()
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "10/20" in drawn
    assert "a [bold] word" in drawn
    assert "\x1b[" in terminal.getvalue()
    assert file.getvalue() == "step 10/20  loss 2.5  lr 0.1  1,234 samples/s  eta 5.0 s\na [bold] word\n"


def test_slow_ranks_and_communication_are_named() -> None:
    slow = {"slowdown": 2.0, "slowest_rank": 3, "slowest_host": "node07", "share/communication": 0.25}
    slow["seconds/forward/backward"] = 0.5
    told = describe({**TRAIN, **slow})
    assert "rank 3 (node07) 2.0x slower" in told
    assert "25% communication" in told
    assert "slower" not in describe({**TRAIN, **slow, "slowdown": 1.1})
    assert "slower" not in describe({**TRAIN, **slow, "seconds/forward/backward": 0.001}), "noise"


def test_numbers() -> None:
    assert [number(value) for value in (0.000123456, math.nan, None, 7, "x")] == ["0.0001235", "nan", "-", "7", "x"]


def test_a_console_that_nobody_reads_any_more_does_not_end_a_rank(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(tmp_path / "log", "w+") as file, os.fdopen(writer, "w", buffering=1) as console:
        tee = Tee(console, file)
        os.close(reader)
        print("step 1", file=tee, flush=True)
        print("step 2", file=tee, flush=True)
        assert (tmp_path / "log").read_text() == "step 1\nstep 2\n"
        with contextlib.suppress(BrokenPipeError):
            console.close()
