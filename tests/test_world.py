"""What decides about a rank without starting one: Horovod's environment, the three views, threads, devices, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.clock import Clock
from harness.config import Horovod
from harness.device import choose_device, set_threads
from harness.env import identify
from harness.errors import ConfigError, StorageError, Unavailable
from harness.failure import code_of, record
from harness.rundir import Attempt, RunDir, write_json
from harness.world import check_views, horovod_environment


def test_horovods_settings_are_its_environment(tmp_path: Path) -> None:
    packing = {"HOROVOD_FUSION_THRESHOLD": "0"}  # buckets are packed already
    assert horovod_environment(Horovod(), tmp_path) == {"HOROVOD_STALL_CHECK_TIME_SECONDS": "60", **packing}
    settings = Horovod.model_validate(
        {
            "fusion": "64MB",
            "cycle_time": "2.5ms",
            "cache_capacity": 0,
            "autotune": True,
            "timeline": True,
            "stall_warn": "30s",
            "stall_stop": "2m",
        }
    )
    assert horovod_environment(settings, tmp_path) == {
        "HOROVOD_FUSION_THRESHOLD": "64000000",
        "HOROVOD_CYCLE_TIME": "2.5",
        "HOROVOD_CACHE_CAPACITY": "0",
        "HOROVOD_AUTOTUNE": "1",
        "HOROVOD_AUTOTUNE_LOG": str(tmp_path / "autotune.csv"),
        "HOROVOD_TIMELINE": str(tmp_path / "timeline.json"),
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "30",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "120",
    }
    assert "HOROVOD_FUSION_THRESHOLD" not in horovod_environment(Horovod(autotune=True), tmp_path)  # it is tried out
    off = horovod_environment(Horovod.model_validate({"stall_warn": 0}), tmp_path)
    assert off == {"HOROVOD_STALL_CHECK_DISABLE": "1", **packing}


@pytest.mark.parametrize(
    ("fields", "limit", "warn"),
    [
        ({}, 600.0, "60"),
        ({}, 40.0, "10"),
        ({}, 2.0, "1"),
        ({"stall_stop": 20.0}, 600.0, "20"),
        ({"stall_warn": 90.0, "stall_stop": 90.5}, 40.0, "90"),
        ({"stall_warn": 90.0, "stall_stop": 30.0}, 600.0, "30"),
        ({"stall_warn": 0.2}, 600.0, "1"),
    ],
)
def test_horovod_tells_of_a_stall_before_the_watchdog_ends_it(
    fields: dict[str, float], limit: float, warn: str, tmp_path: Path
) -> None:
    variables = horovod_environment(Horovod.model_validate(fields), tmp_path, limit=limit)
    assert variables["HOROVOD_STALL_CHECK_TIME_SECONDS"] == warn
    assert int(variables.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "999")) >= int(warn), "Horovod ignores less"


def test_views_that_differ_are_all_told() -> None:
    check_views({"the environment": (1, 4), "Horovod": (1, 4)}, "openmpi")
    with pytest.raises(Unavailable) as told:
        check_views({"the environment": (1, 4), "MPI's COMM_WORLD": (0, 1), "Horovod": (0, 1)}, "hydra")
    for part in ("(hydra)", "the environment says rank 1 of 4", "COMM_WORLD says rank 0 of 1", "harness check"):
        assert part in str(told.value)


def test_threads_follow_config_environment_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert set_threads(5, 1) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert set_threads(None, 1) == 3
    for text in ("", "many", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert set_threads(None, 2) == max(1, cores // 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set_threads(None, 10 * cores) == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int, uuid: str) -> list[int]:
    """A node whose ranks see `count` GPUs, the first with this identity; returns what is made current."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuid))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("count", "local_rank", "local_size", "others", "expected"),
    [
        (4, 2, 4, ["", "", "", ""], 2),
        (1, 3, 4, ["a", "b", "c", "d"], 0),  # one GPU each
        (1, 0, 1, ["d"], 0),
    ],
)
def test_gpus_by_local_rank(
    count: int, local_rank: int, local_size: int, others: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = fake_gpus(monkeypatch, count, "d")
    assert choose_device(local_rank, local_size, lambda mine: others) == torch.device("cuda", expected)
    assert chosen == [expected]


@pytest.mark.parametrize(("count", "others"), [(2, ["", "", "", ""]), (1, ["d", "d", "d", "d"])])
def test_more_ranks_than_gpus_is_a_sentence(count: int, others: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, count, "d")
    with pytest.raises(Unavailable, match=f"{count} GPUs? for 4 ranks"):
        choose_device(2, 4, lambda mine: others)


def test_an_error_file_says_who_when_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt, clock = RunDir(tmp_path).new_attempt(), Clock()
    clock.done, clock.section = 810, "data"
    place = identify({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"})
    try:
        raise ValueError("label 17")
    except ValueError as error:
        record(error, place, clock, attempt)
    record(ConfigError("no", hint="do"), identify({}), clock, attempt)
    entry = json.loads(attempt.error(5).read_text())
    wanted = {"rank": 5, "size": 8, "step": 811, "section": "data", "type": "ValueError", "sentence": False, "code": 1}
    assert {key: entry[key] for key in wanted} == wanted
    assert "raise ValueError" in entry["traceback"]
    user = json.loads(attempt.error(0).read_text())
    assert (user["sentence"], user["code"], user["message"], user["hint"]) == (True, 78, "no", "do")
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "error: no\n  do" in told


def test_the_cause_comes_before_its_consequences(tmp_path: Path) -> None:
    attempt: Attempt = RunDir(tmp_path).new_attempt()
    write_json(attempt.error(0), {"rank": 0, "type": "HorovodInternalError", "time": 1.0})
    write_json(attempt.error(1), {"rank": 1, "type": "ValueError", "time": 2.0})
    write_json(attempt.error(2), {"rank": 2, "type": "KeyError", "time": 3.0})
    attempt.error(3).write_text("{not json")
    assert [error["rank"] for error in attempt.errors()] == [1, 2, 0]


def test_codes() -> None:
    assert [code_of(e) for e in (ValueError(), KeyboardInterrupt(), StorageError("x"))] == [1, 130, 74]


def test_other_ranks_print_into_their_log_only(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from harness.log import redirect\n"
        "redirect(Path('log'), console=sys.argv[1] == '0')\n"
        "print('from python'); os.system('echo from a child')"
    )
    for rank, console in (("0", "from a child\nfrom python\n"), ("1", "")):
        (tmp_path / "log").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code, rank], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert sorted(done.stdout.splitlines()) == sorted(console.splitlines())
        assert "from python" in (tmp_path / "log").read_text()
    assert "from a child" in (tmp_path / "log").read_text()
