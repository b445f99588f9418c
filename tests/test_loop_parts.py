"""The parts around the training loop, in one process: what they do when something is wrong."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from harness.clock import Clock
from harness.env import identify
from harness.errors import StorageError
from harness.failure import record
from harness.log import Tee
from harness.sinks.jsonl import JsonLines

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
