"""Runs the contract tests of `ranks/` on 1, 2 and 4 ranks under each launcher that a user may have."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from support import needs_mpirun, ranks

ALL, ONE_TASK = "test", "not training or digits"  # pytest's -k: whole training runs of every task, or of one
CASES = [
    ("none", 1, "none", ONE_TASK),
    ("mpirun", 1, "mpi", ALL),
    ("mpirun", 2, "mpi", ALL),
    ("mpirun", 4, "mpi", ALL),
    ("horovodrun-mpi", 2, "mpi", ONE_TASK),
    ("horovodrun-gloo", 2, "gloo", ONE_TASK),
    ("horovodrun-gloo", 4, "gloo", ONE_TASK),
]
TRAINED = ("linear", "digits", "charlm", "rnn", "word2vec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@functools.cache
def contract(launcher: str, count: int, controller: str, which: str, folder: Path) -> str | None:
    """Run all contract tests once; None when they pass, else what was printed."""
    out = Path(tempfile.mkdtemp(dir=folder))
    done = ranks(
        count,
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=200", "-k", which, "tests/ranks"],
        launcher=launcher,
        env={"HARNESS_RANKS": str(count), "HARNESS_CONTROLLER": controller, "HARNESS_OUT": str(out)},
        timeout=600,
    )
    complete = all(f"rank {rank} of {count}: " in done.stdout for rank in range(count))
    for curve in out.glob("curve-*.json"):
        curve.replace(folder / f"{launcher}-{curve.name}")
    return None if done.returncode == 0 and complete else done.stdout[-6000:] + done.stderr[-6000:]


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("launcher", "count", "controller", "which"), CASES, ids=lambda value: str(value).split()[0])
def test_contract(launcher: str, count: int, controller: str, which: str, folder: Path) -> None:
    failure = contract(launcher, count, controller, which, folder)
    assert failure is None, failure


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", TRAINED)
def test_loss_curves_do_not_depend_on_the_number_of_ranks(task: str, folder: Path) -> None:
    """Losses of all steps and evaluations; what differs is the order of float additions."""
    for count in (1, 2, 4):
        assert contract("mpirun", count, "mpi", ALL, folder) is None
    one, two, four = (json.loads((folder / f"mpirun-curve-{task}-{count}.json").read_text()) for count in (1, 2, 4))
    assert len(one) == 10
    np.testing.assert_allclose(two, one, rtol=1e-4)
    np.testing.assert_allclose(four, one, rtol=1e-4)
    assert len(set(one)) == 10  # every step has its own loss; that tasks learn is tested with each of them
