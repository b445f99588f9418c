"""Saves behind training, in one process: when they are made, what is skipped, how they end."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import Net, bits, manager, train

from harness.checkpoint import (
    Manager,
    SaveFailed,
    Single,
    State,
    at_end,
    every,
    keep_all,
    keep_last,
    latest,
    on_stop,
    open_checkpoint,
    writing,
)
from harness.checkpoint import asked as asked_module
from harness.checkpoint.engines.direct import Direct
from harness.checkpoint.policy import When
from harness.checkpoint.staging import Staging
from harness.checkpoint.writing import Outcome
from harness.errors import StorageError


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("step-*"))


def behind(directory: Path, **options: Any) -> Manager:
    return manager(directory, **{"background": True, "keep": keep_all(), **options})


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until this is set."""
    event = threading.Event()
    original = Direct.write

    def write(self: Direct, *arguments: Any) -> dict[int, int]:
        assert event.wait(30)
        return original(self, *arguments)

    monkeypatch.setattr(Direct, "write", write)
    return event


def test_a_save_returns_before_it_is_durable_and_holds_the_state_of_the_call(
    tmp_path: Path, gate: threading.Event
) -> None:
    array = np.arange(1000.0)
    saver = behind(tmp_path)
    path = saver.save(1, State(arrays={"a": array}))
    assert path == tmp_path / "step-00000001" and not path.exists()
    array[:] = -1
    gate.set()
    saver.wait()
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.read("arrays/a") == np.arange(1000.0)).all()
    saver.close()


def test_one_is_in_flight_and_the_next_is_skipped_or_waits(tmp_path: Path, gate: threading.Event) -> None:
    state = State(arrays={"a": np.arange(10)})
    saver = behind(tmp_path / "skip")
    assert saver.save(1, state) is not None
    assert saver.save(2, state) is None
    assert saver.lines == ["no checkpoint at step 2: the one before is still being written"]  # type: ignore[attr-defined]
    gate.set()
    saver.close()
    assert steps(tmp_path / "skip") == [1]

    gate.clear()
    saver = behind(tmp_path / "wait", busy="wait")
    saver.save(1, state)
    threading.Timer(0.3, gate.set).start()
    began = time.monotonic()
    assert saver.save(2, state) is not None
    assert time.monotonic() - began >= 0.2
    saver.close()
    assert steps(tmp_path / "wait") == [1, 2]


def test_how_saves_ended_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Outcome] = []
    saver = behind(tmp_path, saved=ended.append)
    state = State(arrays={"a": np.arange(10)})
    saver.save(1, state)
    saver.wait()
    (outcome,) = ended
    assert (outcome.step, outcome.path, outcome.failed) == (1, tmp_path / "step-00000001", None)
    assert 0 <= outcome.waited <= outcome.seconds

    def full(self: Direct, *arguments: Any) -> dict[int, int]:
        raise OSError(28, "No space left on device", "data.h5")

    with monkeypatch.context() as patch:
        patch.setattr(Direct, "write", full)
        assert saver.save(2, state) is not None, "nothing has gone wrong yet"
        with pytest.raises(SaveFailed, match="step 2 was not saved: it failed while it wrote its part: No space"):
            saver.wait()
        saver.wait()
        assert sum("step 2 was not saved" in line for line in saver.lines) == 1  # type: ignore[attr-defined]
        saver.save(3, state)
        while not ended or len(saver.lines) < 2:  # type: ignore[attr-defined]
            saver.poll()
            time.sleep(0.01)
        with pytest.raises(SaveFailed, match="step 3 was not saved"):
            saver.close()
    assert len(ended) == 1 and steps(tmp_path) == [1]


def test_a_later_success_makes_up_for_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(arrays={"a": np.arange(10)})
    saver = behind(tmp_path, save=every(steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(Direct, "write", lambda *_: 1 // 0)
        saver.step(1, state)
        with pytest.raises(SaveFailed, match="ZeroDivisionError"):
            saver.wait()
    saver.step(2, state)
    saver.close()
    assert steps(tmp_path) == [2]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("raised", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("lazy", [False, True])
def test_no_thread_is_left_waiting_where_one_cannot_begin(
    lazy: bool, at: int, raised: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits for the copy, and for HDF5's metadata at a first save: also where these never come."""
    saver = manager(tmp_path, lazy=lazy, timeout=5.0)
    model = Net()
    state = State(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    pool = saver._saver._thread
    submit, calls = pool.submit, itertools.count()

    def refuse(*args: Any) -> Any:
        if next(calls) == at:
            raise raised
        return submit(*args)

    monkeypatch.setattr(pool, "submit", refuse)
    with pytest.raises(type(raised)):
        saver.save(1, state)
    assert saver.save(2, state, wait=True) is not None
    saver.close()
    assert latest(tmp_path) == tmp_path / "step-00000002"


def test_metadata_that_take_too_long_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writing.build_head
    monkeypatch.setattr(writing, "build_head", lambda *a: (time.sleep(2.0), original(*a))[1])
    saver = manager(tmp_path, timeout=0.5)
    with pytest.raises(SaveFailed, match=r"when it made HDF5's metadata: they were not there after 0.5 s"):
        saver.save(1, State(values={"a": np.arange(6.0)}), wait=True)
    monkeypatch.setattr(writing, "build_head", original)
    assert saver.save(2, State(values={"a": np.arange(6.0)}), wait=True) is not None
    saver.close()


def test_lazy_saves_hold_the_state_of_the_call_and_the_optimizer_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net(0)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(2))
    expected = bits({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    original = Staging.fill
    late = threading.Event()

    def fill(self: Staging, buffers: Any, leaves: Any, reached: Any) -> None:
        if reached is not None:  # the copy after the call alone tells how far it is
            assert late.wait(30)
        original(self, buffers, leaves, reached)

    monkeypatch.setattr(Staging, "fill", fill)
    saver = behind(tmp_path, lazy=True)
    path = saver.save(2, State(model=model, optimizer=optimizer))
    threading.Timer(0.3, late.set).start()
    began = time.monotonic()
    train(model, optimizer, range(2, 4))  # its forward pass changes the buffers, its step all else
    assert time.monotonic() - began >= 0.2
    saver.close()
    other = Net(1)
    resumed = torch.optim.Adam(other.parameters())
    assert path is not None and manager(tmp_path).restore(State(model=other, optimizer=resumed)) == 2
    assert bits({"model": other.state_dict(), "optimizer": resumed.state_dict()}) == expected


def test_saving_by_steps_and_at_the_end(tmp_path: Path) -> None:
    state = State(arrays={"a": np.arange(10)})
    with behind(tmp_path, save=every(steps=3) | every(steps=5) | at_end(), busy="wait") as saver:
        for step in range(1, 12):
            assert saver.step(step, state) is False
    assert steps(tmp_path) == [3, 5, 6, 9, 10, 11]
    with behind(tmp_path / "b", save=every(steps=2) | at_end()) as saver:
        saver.step(2, state)
    assert steps(tmp_path / "b") == [2], "the end is not saved twice"


def test_saving_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(asked_module.time, "monotonic", lambda: now[0])
    asked = asked_module.Asked(tmp_path, Single(), every(minutes=1))
    saved = []
    for step in range(1, 2001):
        now[0] += 0.1
        if asked.after(step).save:
            asked.saved()
            saved.append(round(now[0]) - 1000)
    assert saved == pytest.approx([60, 120, 180], abs=3)


def test_the_exchange_is_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Single):
        count = 0

        def all_gather(self, value: Any) -> list[Any]:
            self.count += 1
            return super().all_gather(value)

    now, comm = [0.0], Counting()
    monkeypatch.setattr(asked_module.time, "monotonic", lambda: now[0])
    asked = asked_module.Asked(tmp_path, comm, every(minutes=1))
    for step in range(1, 10_001):
        now[0] += 0.01
        asked.after(step)
    assert 90 <= comm.count <= 120, "about once a second"
    asked = asked_module.Asked(tmp_path, comm, every(steps=1))
    before = comm.count
    assert asked.after(1) == asked_module.Answer() and comm.count == before, "steps need no exchange"


def test_a_signal_stops_with_the_state_saved(tmp_path: Path) -> None:
    state = State(arrays={"a": np.arange(10)})
    before = signal.getsignal(signal.SIGUSR1)
    with behind(tmp_path, save=on_stop(signal.SIGUSR1)) as saver:
        assert saver.step(1, state) is False
        os.kill(os.getpid(), signal.SIGUSR1)
        stopped = next(step for step in range(2, 5000) if saver.step(step, state))
        assert steps(tmp_path) == [stopped], "it is durable by now"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_files_ask_for_a_save_and_for_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_module, "PACE", 1e-9)
    state = State(arrays={"a": np.arange(10)})
    with behind(tmp_path, save=on_stop(signal.SIGUSR2), busy="wait") as saver:
        assert saver.step(1, state) is False
        (tmp_path / "save").touch()
        assert saver.step(2, state) is False and not (tmp_path / "save").exists()
        (tmp_path / "stop").touch()
        assert saver.step(3, state) is True
    assert steps(tmp_path) == [2, 3]


def test_an_error_of_the_program_leaves_the_save_that_was_under_way(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), behind(tmp_path) as saver:
        saver.save(1, State(arrays={"a": np.arange(10)}))
        raise ZeroDivisionError
    assert steps(tmp_path) == [1]


def test_metrics_and_info_are_in_the_manifest(tmp_path: Path) -> None:
    with behind(tmp_path, info={"config": "abc"}) as saver:
        saver.save(1, State(arrays={"a": np.arange(10)}), {"loss": 0.5})
    with open_checkpoint(tmp_path / "step-00000001") as checkpoint:
        assert checkpoint.manifest.metrics == {"loss": 0.5}
        assert checkpoint.manifest.info["config"] == "abc"


@pytest.mark.parametrize("wrong", [{}, {"steps": 1, "minutes": 1}, {"steps": 0}, {"minutes": 0}, {"minutes": -1.0}])
def test_wrong_rules(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"every takes steps or minutes|at least 1|more than 0"):
        every(**wrong)


def test_rules_join() -> None:
    joined = every(steps=2) | every(minutes=3) | on_stop(signal.SIGTERM) | at_end()
    assert joined == When((2,), (180.0,), (signal.SIGTERM,), True)
    assert [step for step in range(1, 7) if (joined | every(steps=3)).at(step)] == [2, 3, 4, 6]


def test_a_job_that_went_back_sets_aside_what_is_newer(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        manager(tmp_path, keep=keep_all()).save(step, State(arrays={"a": np.full(3, step)}))
    array = np.zeros(3, np.int64)
    state = State(arrays={"a": array})
    saver = behind(tmp_path, keep=keep_last(2))
    assert saver.restore(state, 10) == 10
    saver.save(15, state)
    saver.close()
    assert [line for line in saver.lines if "set aside" in line] == [  # type: ignore[attr-defined]
        "set aside step-00000020, step-00000030: newer than step 15, from which this job goes on"
        " (`harness ckpt rollback` takes one back)"
    ]
    assert steps(tmp_path) == [10, 15, 20, 30], "nothing is deleted for it"
    again = manager(tmp_path)
    assert again.restore(state) == 15 and array.tolist() == [10, 10, 10]


def test_metrics_that_come_after_the_save(tmp_path: Path) -> None:
    saver = behind(tmp_path)
    saver.save(1, State(arrays={"a": np.arange(3)}), {"lr": 1.0})
    saver.add_metrics(1, {"loss": 0.5})
    with open_checkpoint(tmp_path / "step-00000001") as checkpoint:
        assert checkpoint.manifest.metrics == {"lr": 1.0, "loss": 0.5} and checkpoint.verify() == []
    assert manager(tmp_path).restore(State(arrays={"a": np.zeros(3, np.int64)}), "best:loss") == 1
    with pytest.raises(StorageError, match=r"the newest checkpoint in .* is not of step 2"):
        saver.add_metrics(2, {"loss": 0.5})
    saver.close()


def test_a_run_directory_has_a_latest_checkpoint_too(tmp_path: Path) -> None:
    path = manager(tmp_path / "checkpoints").save(1, State(arrays={"a": np.arange(3)}))
    assert latest(tmp_path) == latest(tmp_path / "checkpoints") == path
