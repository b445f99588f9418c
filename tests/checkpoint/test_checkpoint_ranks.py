"""Checkpoints of several ranks, under real launchers. The checks themselves are in `ranks_checkpoint.py`."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from ranks_checkpoint import as_bits, big_state, trained_state
from samples import manager
from support import needs_mpirun, ranks

from harness.checkpoint import Manager, Single, State, detect
from harness.checkpoint.engines import EngineName
from harness.checkpoint.engines.mpio import unavailable
from harness.errors import Unavailable

SCRIPT = str(Path(__file__).with_name("ranks_checkpoint.py"))


def run(count: int, directory: Path, launcher: str = "mpirun") -> None:
    world = "gloo" if launcher.endswith("gloo") else "mpi"
    done = ranks(count, [SCRIPT, str(directory), world], launcher=launcher)
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stdout[-4000:] + done.stderr[-8000:]


def save_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
        manager(directory / "saved-by-1-direct").save(5, State(**trained_state()))


@pytest.mark.mpi
@needs_mpirun
def test_one_two_and_four_ranks_under_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_alone(tmp_path, monkeypatch)
    for count in (4, 2):  # 4 restores what 1 saved; 2 restores what 1 and 4 saved
        run(count, tmp_path)
    for path in sorted(tmp_path.glob("saved-by-*")):
        state = big_state(seed=99)
        assert manager(path).restore(State(**state)) == 5
        assert as_bits(state) == as_bits(trained_state()), path.name
    assert len(list(tmp_path.glob("saved-by-*"))) == 7


@pytest.mark.mpi
@needs_mpirun
def test_two_ranks_without_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_alone(tmp_path, monkeypatch)
    run(2, tmp_path, "horovodrun-gloo")


@pytest.mark.skipif(unavailable(Single()) is not None, reason="there is no MPI")
def test_one_process_can_use_mpio(tmp_path: Path) -> None:
    state = big_state(seed=99)
    alone = Manager(tmp_path, Single(), engine="mpio")
    alone.save(5, State(**trained_state()), wait=True)
    assert alone.restore(State(**state)) == 5
    assert as_bits(state) == as_bits(trained_state())


@pytest.mark.parametrize("engine", ["direct", "mpio"])
def test_every_rank_makes_durable_what_it_wrote(
    engine: EngineName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks on other nodes than rank 0's have page caches of their own."""
    if engine == "mpio" and unavailable(Single()) is not None:
        pytest.skip("there is no MPI")
    original = os.fdatasync
    synced: list[str] = []

    def fdatasync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    Manager(tmp_path, Single(), engine=engine).save(5, State(extra={}), wait=True)
    assert [Path(path).name for path in synced] == ["data.h5"]


def test_ranks_that_nothing_connects_are_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(Unavailable, match="started 2 ranks, but neither Horovod nor mpi4py"):
        detect()


def test_unknown_engines(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no checkpoint engine 'fast'"):
        Manager(tmp_path, Single(), engine="fast")  # type: ignore[arg-type]
