"""`harness ckpt bench`: a job of two ranks for real, what it leaves behind, and wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import QUIET, ROOT, needs_mpirun

from harness.errors import Exit
from launch import ckpt_bench, cli

COMMAND = [sys.executable, "-m", "launch.cli", "ckpt", "bench"]


def environment() -> dict[str, str]:
    return {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}


@needs_mpirun
@pytest.mark.mpi
def test_two_ranks_measure_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("untouched")
    options = ["--size", "8MiB", "-n", "2", "--tensors", "30", "--rounds", "1", "--json", "--launcher", "mpirun"]
    done = subprocess.run(
        [*COMMAND, str(tmp_path), *options], capture_output=True, text=True, env=environment(), timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"mine"} and (tmp_path / "mine").read_text() == "untouched"
    assert (found["ranks"], found["tensors"], found["engines"]) == (2, 40, {"direct": None, "mpio": None})
    assert 8_300_000 < found["bytes"] <= 8 << 20
    measured = {row["what"]: row for row in found["rows"]}
    assert {
        "plain writes through the page cache",
        "engine direct: until durable",
        "engine direct: training held up",
        "engine direct: digests",
        "engine mpio: until durable",
        "mode lazy: training held up",
        "plain reads, cold",
        "plain reads of all bytes by each rank, warm",
        "restore, cold",
        "restore, warm",
    } <= set(measured)
    for row in measured.values():
        assert row["seconds"]["count"] == 1 and 0 < row["seconds"]["median"] < 120
        assert row["ratio"] is None or row["ratio"]["median"] > 0
    assert len(found["rounds"]) == 2 and found["advice"]
    # restored bytes were compared with what was saved; all of it came out of the file, by one or both ranks
    assert found["bytes"] <= found["read"]["called"] <= 2.2 * found["bytes"]


def test_the_table_of_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    from test_bench_advice import result

    ckpt_bench._show(Path("scratch"), result(), as_json=False)
    shown = capsys.readouterr().out
    assert "scratch on ext4: 1.0 kB in 4 tensors, 2 ranks on 1 node" in shown
    line = next(line for line in shown.splitlines() if line.startswith("engine direct: until durable"))
    assert " ".join(line.split()).endswith("1.0000 1.0000 1.0000 1.0 kB/s 80 % 80 to 80 the best plain writes")
    assert shown.rstrip().endswith("put into the config:\ncheckpoint:\n  mode: lazy")


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    options = ["--size", "4MiB", "--rounds", "1000", "--launcher", "local", "--engine", "direct"]
    with subprocess.Popen(
        [*COMMAND, str(tmp_path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as command:
        assert command.stderr is not None
        while "round 1 of 1000" not in (line := command.stderr.readline()):
            assert line.startswith(("round 0", "note:")), line
        assert [path.name.startswith(".harness-bench-") for path in tmp_path.iterdir()] == [True]
        command.send_signal(signal.SIGINT)
        _, told = command.communicate(timeout=120)
    assert command.returncode == Exit.INTERRUPTED and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where it fills up meanwhile: here the folder is gone when the rank comes."""
    real = ckpt_bench._measure

    def measure(plan: Any, folder: Path, *rest: Any) -> Any:
        folder.rmdir()
        return real(plan, folder, *rest)

    monkeypatch.setattr(ckpt_bench, "_measure", measure)
    code = cli.execute(["ckpt", "bench", str(tmp_path), "--size", "1MiB", "--launcher", "local", "--rounds", "1"])
    told = capfd.readouterr().err
    assert code == Exit.IO and "No such file or directory" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--size", "1PB"], Exit.IO, "has not room enough"),
        (["--size", "5kB", "--tensors", "450"], Exit.USAGE, "too small for 450 tensors"),
        (["--size", "much"], Exit.USAGE, "--size: 'much' is not a size"),
        (["--engine", "direct,fast"], Exit.USAGE, "'fast' is not one of direct, mpio"),
        (["--launcher", "ssh"], Exit.USAGE, "--launcher"),
        (["-H", "a:0"], Exit.USAGE, "-H a:0"),
        (["-H", "a:1", "--hostfile", "b"], Exit.USAGE, "-H or --hostfile, not both"),
        (["-n", "5000"], None, "too many"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(
    options: list[str], code: Exit | None, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = cli.execute(["ckpt", "bench", str(tmp_path), *options])
    said = capfd.readouterr().err
    assert found == code or (code is None and found)
    assert told in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_used_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for place, code, told in (
        (tmp_path / "absent", Exit.NO_INPUT, "is not there"),
        (file, Exit.USAGE, "is not a folder"),
        (Path("/proc"), Exit.IO, "/proc"),
    ):
        assert cli.execute(["ckpt", "bench", str(place), "--size", "1MB"]) == code
        assert told in capfd.readouterr().err
    locked = tmp_path / "locked"
    with pytest.MonkeyPatch.context() as patch:  # root may write everywhere, so permissions would refuse nothing
        locked.mkdir()
        patch.setattr("tempfile.mkdtemp", _refuse)
        assert cli.execute(["ckpt", "bench", str(locked), "--size", "1MB", "--launcher", "local"]) == Exit.IO
    assert "cannot be written: Read-only file system" in capfd.readouterr().err


def _refuse(*given: Any, **options: Any) -> str:
    raise OSError(30, os.strerror(30))
