"""Parts of tensors on several ranks, under real launchers. The checks themselves are in `ranks_shards.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks_shards import globally, parts
from samples import bits, manager
from support import needs_mpirun, ranks

from harness.checkpoint import State

SCRIPT = str(Path(__file__).with_name("ranks_shards.py"))


def run(count: int, directory: Path, launcher: str = "mpirun") -> None:
    world = "gloo" if launcher.endswith("gloo") else "mpi"
    done = ranks(count, [SCRIPT, str(directory), world], launcher=launcher)
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout[-4000:] + done.stderr[-8000:]


def save_whole(directory: Path) -> None:
    with manager(directory / "whole-by-1") as alone:
        alone.save(5, State(tensors=globally(1)))


@pytest.mark.mpi
@needs_mpirun
def test_two_and_four_ranks_under_mpirun(tmp_path: Path) -> None:
    save_whole(tmp_path)
    for count in (4, 2):  # 4 restores what 1 saved; 2 restores what 1 and 4 saved
        run(count, tmp_path)
    found = sorted(tmp_path.glob("*-by-*"))
    assert len(found) == 5
    for path in found:  # and 1 restores what all saved
        whole = globally(99)
        assert manager(path).restore(State(tensors=whole)) == 5
        assert bits(whole) == bits(globally(1)), path.name


@pytest.mark.mpi
@needs_mpirun
def test_two_ranks_without_mpi(tmp_path: Path) -> None:
    save_whole(tmp_path)
    run(2, tmp_path, "horovodrun-gloo")


def test_one_rank_has_all_parts(tmp_path: Path) -> None:
    """A program written for parts runs on one rank, too."""
    alone = manager(tmp_path)
    alone.save(5, State(tensors=parts(1, 0, 1)))
    whole = globally(99)
    assert alone.restore(State(tensors=whole)) == 5
    assert bits(whole) == bits(globally(1))
    state = parts(99, 0, 1, turned=True)
    assert alone.restore(State(tensors=state)) == 5
    assert bits(state["large"].tensor) == bits(globally(1)["large"])
