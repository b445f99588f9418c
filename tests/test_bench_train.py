"""`harness bench train`: what is measured on how many ranks, what it prints, what it refuses, what it leaves."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT, needs_mpirun

from harness.batch import plan_of
from harness.bench.tried import tried
from harness.config import Config, Horovod
from launch import cli
from launch.bench import for_ranks, numbers_of_ranks
from launch.bench_show import advice, choose, scaling

BIN = Path(sys.executable).parent
CONFIG = """
name: run
task: {name: digits, args: {width: 128}}
train: {steps: 12, global_batch: 8, micro_batch: 2}
optim: {name: momentum, lr: 0.01}
checkpoint: {every: 1}
log: {every: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "tasks_for_tests.py").write_bytes((ROOT / "tests" / "tasks_for_tests.py").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(BIN / "harness"), "bench", "train", "run.yaml", *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bench(folder: Path, *arguments: str) -> tuple[int, str, str]:
    with start(folder, *arguments) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def nothing_is_left(folder: Path) -> None:
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {"run.yaml", "tasks_for_tests.py"}


def config(**sections: Any) -> Config:
    told: dict[str, Any] = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 24}}
    return Config.model_validate(told | sections)


@needs_mpirun
@pytest.mark.mpi
def test_two_ranks_and_other_settings(folder: Path) -> None:
    code, out, err = bench(folder, "-n", "2", "--rounds", "2", "--steps", "3", "--json")
    assert code == 0, out + err
    told = json.loads(out)
    one, two = told["scaling"]
    assert (one["ranks"], one["samples_per_step"], one["communication"], one["sent_bytes_per_step"]) == (1, 4, None, 0)
    assert (two["ranks"], two["samples_per_step"]) == (2, 8)  # each rank takes what it takes on 2
    assert one["efficiency"] == 1.0
    assert two["efficiency"] == pytest.approx(two["samples_per_s"] / 2 / one["samples_per_s"])
    assert two["samples_per_s"] == pytest.approx(8 / two["step_s"])
    share = two["communication"]
    assert share["least"] <= share["median"] <= share["most"] < 1
    parameters = 128 * 10 + 256 * 128 * 9 + 256 + 256 * 16 * 10 + 10
    # all gradients once, and one more number for each of 6 tensors, to and fro between two ranks
    assert two["sent_bytes_per_step"] == 4 * (parameters + 6)
    settings = {row["name"]: row for row in told["settings"]}
    assert list(settings) == ["as configured", "bucket 1MiB", "compression fp16"]
    assert settings["as configured"]["ratio"] == 1
    assert [row["exact"] for row in settings.values()] == [True, True, False]
    for row in settings.values():
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
    assert told["best"] in ("as configured", "bucket 1MiB")
    assert told["put_into_the_config"] == settings[told["best"]]["changes"]
    assert "1 rank: warming up" in err and "2 ranks: round 2 of 2" in err
    nothing_is_left(folder)


@needs_mpirun
@pytest.mark.mpi
def test_what_a_task_raises_is_told_and_nothing_is_left(folder: Path) -> None:
    raises = CONFIG.replace("digits, args: {width: 128}", '"tasks_for_tests:Raises", args: {rank: 0, at: 9}')
    (folder / "run.yaml").write_text(raises)
    code, out, err = bench(folder, "-n", "1", "--rounds", "2", "--steps", "3")
    assert code == 1
    assert "ValueError: label 17 is out of range" in err
    assert out == ""
    nothing_is_left(folder)


@needs_mpirun
@pytest.mark.mpi
def test_a_signal_ends_it_at_once(folder: Path) -> None:
    with start(folder, "-n", "1", "--rounds", "1000") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 1 of" in line:
                break
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    nothing_is_left(folder)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["horovod.autotune=true"], "horovod.autotune"),
        (["launch.elastic=true"], "launch.elastic"),
        (["parallel.strategy=parameter_server", "-n", "2"], "parameter_server"),
        (["train.global_batch=9", "-n", "2"], "does not divide by 2 ranks"),
        (["-n", "1000000"], "1000000"),
        (["--rounds", "0"], "rounds"),
    ],
)
def test_wrong_input_is_refused_before_ranks_start(
    folder: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.execute(["bench", "train", "run.yaml", *words])
    out, err = capsys.readouterr()
    assert code in (64, 69, 78)
    assert sentence in err and err.startswith("error: ")
    assert out == ""
    nothing_is_left(folder)


def test_a_folder_that_cannot_be_made_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["bench", "train", "run.yaml", "run_dir=run.yaml/here", "-n", "1"]) == 74
    assert "run.yaml" in capsys.readouterr().err


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 8))
def test_numbers_of_ranks_double_up_to_all(replicas: int, each: int) -> None:
    found = numbers_of_ranks(replicas * each, each)
    assert found[0] == each and found[-1] == replicas * each
    assert all(small < large <= 2 * small for small, large in itertools.pairwise(found))
    assert all(count == each << at for at, count in enumerate(found[:-1]))


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 6), st.integers(1, 6), st.data())
def test_a_rank_takes_the_same_micro_batches_on_any_number(
    ranks: int, micro: int, passes: int, data: st.DataObject
) -> None:
    batch = {"steps": 1, "global_batch": ranks * micro * passes, "micro_batch": micro}
    whole = config(train=batch, data={"partition": "parts.h5"}, restart={"min_ranks": ranks})
    count = data.draw(st.sampled_from(numbers_of_ranks(ranks)))
    smaller = for_ranks(whole, count, of=ranks, launch={"threads": 3}, directory=Path("d"))
    mine, its = plan_of(smaller, count), plan_of(whole, ranks)
    assert (mine.passes, mine.micro_batch) == (its.passes, its.micro_batch)
    assert (smaller.launch.ranks, smaller.launch.threads, smaller.directory) == (count, 3, "d")
    assert smaller.data.partition == ("parts.h5" if count == ranks else None)


@settings(deadline=None)
@given(st.integers(1, 2**34), st.integers(1, 2**34), st.booleans())
def test_settings_differ_in_their_effect(own: int, gradients: int, sparse: bool) -> None:
    given_ = Horovod(bucket=own)
    found = [
        Horovod.model_validate(given_.model_dump() | one.changes) for one in tried(given_, gradients, sparse=sparse)
    ]

    def effect(one: Horovod) -> tuple[object, ...]:
        return min(one.bucket, gradients), one.compression, one.sparse_as_dense

    effects = [effect(one) for one in [given_, *found]]
    assert len(set(effects)) == len(effects)
    assert any(one.bucket >= gradients for one in [given_, *found])


def test_adasum_has_no_buckets() -> None:
    assert [one.name for one in tried(Horovod(op="adasum", compression="fp16"), 2**30)] == ["compression none"]


def of(name: str, changes: dict[str, object], median: float, most: float, *, exact: bool = True) -> dict[str, Any]:
    ratio = {"median": median, "least": median, "most": most, "count": 5}
    seconds = {"median": median * 0.1, "least": 0.1, "most": 0.1, "count": 5}
    return {
        "name": name,
        "changes": changes,
        "exact": exact,
        "ratio": ratio,
        "seconds": seconds,
        "share": None,
        "sent": 0,
    }


def test_the_best_setting_is_clearly_faster_and_computes_the_same() -> None:
    own = of("as configured", {}, 1.0, 1.0)
    fp16 = of("compression fp16", {"compression": "fp16"}, 0.5, 0.6, exact=False)
    little, unsteady = of("bucket 1MiB", {"bucket": 2**20}, 0.99, 0.995), of("bucket 4MiB", {"bucket": 2**22}, 0.8, 1.1)
    assert choose([own, fp16, little, unsteady]) is own
    assert "as it is" in advice(own)
    good = of("bucket 16MiB", {"bucket": 2**24}, 0.9, 0.95)
    assert choose([own, fp16, good, of("sparse_as_dense true", {"sparse_as_dense": True}, 0.95, 0.96)]) is good
    assert advice(good).endswith("put this into the config:\nhorovod:\n  bucket: 16MiB")
    dense = of("sparse_as_dense true", {"sparse_as_dense": True}, 0.8, 0.9)
    assert advice(dense).endswith("horovod:\n  sparse_as_dense: true")


def test_efficiency_is_per_rank_and_against_the_fewest() -> None:
    one, four = (
        {"ranks": n, "samples": 8 * n, "settings": [of("as configured", {}, m, m)]} for n, m in ((1, 1), (4, 2))
    )
    assert scaling(four, one)["samples_per_s"] == pytest.approx(160)
    assert scaling(four, one)["efficiency"] == pytest.approx(0.5)


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(600)
def test_our_own_benchmarks_work(tmp_path: Path) -> None:
    """All contenders; what they have computed is compared in there, and how long it takes does not matter."""
    argv = [
        sys.executable,
        str(ROOT / "tests/bench/everything.py"),
        "--quick",
        "--out",
        "page.md",
        "training",
        "restarts",
    ]
    done = subprocess.run(argv, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    plots = {"training.png"} if find_spec("matplotlib") is not None else set()
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "training.md"} | plots
    page = (tmp_path / "page.md").read_text()
    assert ("![Training and starts](training.png)" in page) == bool(plots)
    for row in ("DDP", "Horovod's example", "harness", "background", "lazy", "`harness ckpt ls` of 3 checkpoints"):
        assert f"\n| {row} | " in page, page
    assert "\n# From a death to the first new step\n" in page and "death to first new step" in page
