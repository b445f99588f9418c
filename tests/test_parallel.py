"""Runs the contract tests of `ranks/parallel/` on 4, 2 and 1 ranks, and whole runs whose ranks share a model."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from support import needs_mpirun, ranks

CONFIG = """
name: shared
task: {name: charlm, args: {text: TEXT, block: 16, layers: 1, width: 16, heads: 2}}
train: {steps: 4, global_batch: 8}
parallel: {FORM: 2}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@functools.cache
def contract(count: int, folder: Path) -> str | None:
    """Run the contract tests once; None when they pass, else what was printed. Fewer ranks go on from what 4 left."""
    if count < 4 and (failure := contract(2 * count, folder)) is not None:
        return failure
    done = ranks(
        count,
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=200", "tests/ranks/parallel"],
        env={
            "HARNESS_RANKS": str(count),
            "HARNESS_CONTROLLER": "mpi",
            "HARNESS_OUT": str(folder),
            "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
        },
        timeout=600,
    )
    complete = all(f"rank {rank} of {count}: " in done.stdout for rank in range(count))
    return None if done.returncode == 0 and complete else done.stdout[-6000:] + done.stderr[-6000:]


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [4, 2, 1])
def test_contract(count: int, folder: Path) -> None:
    failure = contract(count, folder)
    assert failure is None, failure


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(1800)
def test_loss_curves_depend_neither_on_the_form_nor_on_the_number_of_ranks(folder: Path) -> None:
    assert contract(1, folder) is None
    one, two, four = (json.loads((folder / f"curve-{count}.json").read_text()) for count in (1, 2, 4))
    assert len(one) == 8 + 2 + 8
    np.testing.assert_allclose([two, four], [one, one], rtol=1e-4)


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("replicas", [1, 2])
def test_dropout_does_not_depend_on_how_many_ranks_share_a_model(replicas: int, folder: Path) -> None:
    assert contract(1, folder) is None
    curves = [json.loads(path.read_text()) for path in folder.glob(f"dropout-{replicas}-*.json")]
    assert len(curves) == {1: 5, 2: 3}[replicas]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4)


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("launcher", "count", "form"),
    [("mpirun", 4, "model"), ("horovodrun-gloo", 2, "model"), ("mpirun", 2, "pipeline")],
)
def test_a_run_whose_ranks_share_a_model(launcher: str, count: int, form: str, tmp_path: Path) -> None:
    text = str(Path(__file__).resolve().parent.parent / "harness" / "loop.py")
    (tmp_path / "shared.yaml").write_text(CONFIG.replace("TEXT", text).replace("FORM", form))
    done = ranks(count, ["-m", "harness", "shared.yaml"], launcher=launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    log = done.stdout + done.stderr
    assert f"in {count // 2} replica{'s' * (count > 2)} of 2" in log
    assert "finished at step 4" in log
    assert "sample: " in log, "what the task says about the model takes all ranks of a replica"


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.timeout(300)
def test_a_pipeline_without_mpi_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "shared.yaml").write_text(CONFIG.replace("TEXT", "null").replace("FORM", "pipeline"))
    done = ranks(2, ["-m", "harness", "shared.yaml"], launcher="horovodrun-gloo", cwd=tmp_path)
    assert done.returncode != 0
    errors = [path.read_text() for path in (tmp_path / "runs").rglob("*.json")]  # who fails first ends the others
    assert any("parallel.pipeline needs MPI" in told and "start it with mpirun or srun" in told for told in errors)
