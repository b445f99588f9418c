"""Scripts that are not ours: what changes in Horovod's usual example, and that it then survives what it did not."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import QUIET, ROOT, needs_mpirun, ranks

from harness.checkpoint import latest, open_checkpoint

EXAMPLES = Path(__file__).with_name("examples")
EPOCHS = 8
LAST = EPOCHS * 29
"""Steps of two ranks with batches of 32, of 1797 images."""


def test_the_change_is_small() -> None:
    """Lines that somebody has to write, and lines that go."""
    before, after = ((EXAMPLES / name).read_text().splitlines() for name in ("before.py", "after.py"))
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ") and line[2:].strip()]
    written = [line for line in changed if line[0] == "+" and '"""' not in line]
    gone = [line for line in changed if line[0] == "-" and '"""' not in line]
    assert len(written) <= 12 and len(gone) <= 14, "\n".join(changed)
    for name in ("before.py", "after.py"):
        ast.parse((EXAMPLES / name).read_text())


def final(directory: Path) -> dict[str, bytes]:
    """The model of the newest checkpoint of either script, by bits."""
    if (directory / "checkpoint.pt").exists():
        found: dict[str, Any] = torch.load(directory / "checkpoint.pt", weights_only=True)["model"]
        return {name: tensor.numpy().tobytes() for name, tensor in found.items()}
    path = latest(directory)
    assert path is not None
    with open_checkpoint(path) as checkpoint:
        names = [name for name in checkpoint.names() if name.startswith("model/")]
        return {name.removeprefix("model/"): checkpoint.read(name).tobytes() for name in names}


def step_of(directory: Path) -> int:
    path = latest(directory) if directory.exists() else None
    return 0 if path is None else int(path.name.removeprefix("step-"))


def start(script: str, directory: Path, launcher: str) -> subprocess.Popen[str]:
    python = [sys.executable, str(EXAMPLES / script), "--checkpoints", str(directory), "--epochs", str(EPOCHS)]
    command = {
        "mpirun": ["mpirun", "-np", "2", *python],
        "horovodrun-gloo": [str(Path(sys.executable).with_name("horovodrun")), "-np", "2", "--gloo", *python],
    }[launcher]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, **QUIET, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=200)
    return output


def kill_one_rank(process: subprocess.Popen[str], script: str) -> None:
    """SIGKILL for one of the ranks, which are started below the launcher."""
    ranks_of_it = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name().startswith("python") and any(part.endswith(script) for part in child.cmdline())
    ]
    assert ranks_of_it
    random.choice(ranks_of_it).kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the changed example ends with when nothing happens: the same as the usual one."""
    pytest.importorskip("sklearn")
    found = []
    for script in ("before.py", "after.py"):
        directory = tmp_path_factory.mktemp("undisturbed")
        output = finish(start(script, directory, "mpirun"))
        assert f"epoch {EPOCHS}: loss" in output, output
        found.append(final(directory))
    assert step_of(directory) == LAST
    assert found[0] == found[1], "what is computed has not changed"
    return found[1]


@pytest.mark.mpi
@needs_mpirun
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_killed_and_started_again_it_ends_with_the_same_bits(
    launcher: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Between two ranks a sum is the same whoever adds it, so that both launchers end with the same bits."""
    process = start("after.py", tmp_path, launcher)
    deadline = time.monotonic() + 100
    while step_of(tmp_path) < 40 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    kill_one_rank(process, "after.py")
    output = finish(process)
    assert process.returncode != 0, output
    assert 40 <= step_of(tmp_path) < LAST and final(tmp_path) != undisturbed, output

    output = finish(start("after.py", tmp_path, launcher))
    assert f"epoch {EPOCHS}: loss" in output and "epoch 1:" not in output, output
    assert step_of(tmp_path) == LAST and final(tmp_path) == undisturbed


# The samples of an interrupted epoch


def remaining() -> Any:
    spec = importlib.util.spec_from_file_location("samples_example", EXAMPLES / "samples.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Remaining


@given(
    length=st.integers(5, 100),
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4),
    epoch=st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_no_sample_is_lost_and_none_comes_twice(length: int, worlds: list[tuple[int, int]], epoch: int) -> None:
    """A job that goes on with other numbers of ranks, some steps each time, then to the epoch's end with the last."""
    kind = remaining()
    order = torch.randperm(length, generator=torch.Generator().manual_seed(epoch)).tolist()
    used: list[int] = []
    for number, (world, steps) in enumerate(worlds):
        samplers = [kind(range(length), num_replicas=world, rank=rank) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            sampler.used = len(used)
        rows = [list(sampler) for sampler in samplers]
        assert [len(row) for row in rows] == [len(sampler) for sampler in samplers] and len({*map(len, rows)}) == 1
        turns = [sample for turn in zip(*rows, strict=True) for sample in turn]
        if not used:
            usual = torch.utils.data.DistributedSampler(range(length), world, 0)
            usual.set_epoch(epoch)
            assert [*usual] == rows[0], "torch's own, when nothing has been used"
        used += turns if number == len(worlds) - 1 else turns[: steps * world]
        if len(used) >= length:
            break
    assert used[:length] == order and used[length:] == order[: len(used) - length]


@pytest.mark.mpi
@needs_mpirun
def test_an_interrupted_epoch_goes_on_with_the_next_sample(tmp_path: Path) -> None:
    """Two ranks straight; stopped in the second epoch and continued by two, by bits; and by one, sample by sample."""
    script = str(EXAMPLES / "samples.py")

    def run(name: str, count: int, *more: str) -> None:
        launcher = "mpirun" if count > 1 else "none"
        done = ranks(count, [script, "--directory", str(tmp_path / name), *more], launcher=launcher)
        assert done.returncode == 0, done.stdout + done.stderr

    def samples(name: str) -> list[tuple[int, list[int]]]:
        steps: dict[int, list[int]] = {}
        for path in (tmp_path / name).glob("used-*.json"):
            for step, numbers in map(json.loads, path.read_text().splitlines()):
                steps.setdefault(step, []).extend(numbers)
        return [(step, sorted(numbers)) for step, numbers in sorted(steps.items())]

    (tmp_path / "straight").mkdir()
    (tmp_path / "same").mkdir()
    run("straight", 2)
    run("same", 2, "--stop-after", "13")
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    run("same", 2)
    run("other", 1)
    straight = samples("straight")
    assert [step for step, _ in straight] == [*range(1, 21)]
    for epoch in (straight[:10], straight[10:]):
        assert Counter(number for _, numbers in epoch for number in numbers) == Counter(range(60))
    assert samples("same") == samples("other") == straight
    a, b, c = (torch.load(tmp_path / name / "model-20.pt", weights_only=True) for name in ("straight", "same", "other"))
    assert all(np.array_equal(a[name].numpy(), b[name].numpy()) for name in a)
    assert not all(np.array_equal(a[name].numpy(), c[name].numpy()) for name in a), (
        "one rank draws other random numbers"
    )


@pytest.mark.mpi
@needs_mpirun
def test_a_rank_that_ends_first_does_not_end_hdf5_for_the_others(tmp_path: Path) -> None:
    """Horovod began MPI here, and ends it on all ranks at the end of one; h5py on rank 0 would crash."""
    code = """
import io, sys, time
import horovod.torch as hvd
hvd.init()
import torch
from harness.checkpoint import Manager, State
manager = Manager(sys.argv[1])
manager.save(1, State(x={"a": torch.ones(3)}))
manager.close()
import h5py
end = time.monotonic() + 1
while hvd.rank() == 0 and time.monotonic() < end:
    with h5py.File(io.BytesIO(), "w") as file:
        file["x"] = [1, 2, 3]
"""
    done = ranks(2, ["-c", code, str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
