"""A manager's directory over time: names, retention, messages, what earlier programs left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import manager

from harness.checkpoint import (
    Keep,
    Manager,
    SaveFailed,
    Single,
    State,
    keep_all,
    keep_best,
    keep_every,
    keep_last,
    latest,
    open_checkpoint,
)
from harness.errors import DataError, Exit, InputMissing, UsageError


def state(value: float) -> State:
    return State(arrays={"a": np.full(3, value)}, extra={"value": value})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.lstrip(".") != "lease")


def test_save_and_restore_with_nothing_but_numpy(tmp_path: Path) -> None:
    saver = manager(tmp_path / "not" / "yet" / "there")
    assert saver.restore(state(0)) is None and latest(tmp_path / "not") is None
    path = saver.save(7, state(7), metrics={"val/loss": 0.5, "bad": float("nan")})
    assert path.name == "step-00000007" and latest(path.parent) == path
    found = state(0)
    assert saver.restore(found) == 7
    assert found.arrays["a"].tolist() == [7, 7, 7] and found.extra == {"value": 7}
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.manifest.metrics == {"val/loss": 0.5, "bad": {"$float": "nan"}}
    saver.close()


def test_what_is_no_state_is_refused_in_a_sentence(tmp_path: Path) -> None:
    saver = manager(tmp_path)
    wrong: Any = {"a": np.zeros(3)}
    for call in (lambda: saver.save(1, wrong), lambda: saver.step(1, wrong), lambda: saver.restore(wrong)):
        with pytest.raises(UsageError, match="made of a State, not of dict"):
            call()
    saver.close()
    assert names(tmp_path) == []


def test_what_a_script_gets_wrong_is_told_on_all_ranks_before_anything_is_saved(tmp_path: Path) -> None:
    wrong: Any
    for name, wrong in (("keep", 3), ("keep", lambda found: found), ("save", 500), ("save", keep_last(3))):
        with pytest.raises(UsageError, match=f"Manager\\({name}=.*\\): that is no rule\n  for example {name}="):
            Manager(tmp_path, Single(), **{name: wrong})
    saver = manager(tmp_path)
    for wrong in ("1", 1.5, None):
        for call in (saver.save, saver.step):
            with pytest.raises(UsageError, match="is no whole number"):
                call(wrong, state(1))
    assert saver.save(np.int64(1), state(1), wait=True) == tmp_path / "step-00000001"
    saver.close()
    with pytest.raises(UsageError, match="this Manager has been closed"):
        saver.save(2, state(2))
    with pytest.raises(InputMissing, match="there is no checkpoint to open"):
        open_checkpoint(latest(tmp_path / "elsewhere"))
    with open_checkpoint(tmp_path / "step-00000001") as checkpoint:
        row: Any = 5
        with pytest.raises(UsageError, match="has no such rows: 5"):
            checkpoint.read(next(iter(checkpoint.manifest.layout.leaves)).name, rows=row)


def test_a_rule_that_fails_is_told_and_the_checkpoint_stays(tmp_path: Path) -> None:
    def broken(found: Any) -> set[int]:
        raise ZeroDivisionError("a rule of somebody's own")

    saver = manager(tmp_path, keep=Keep((broken,)))
    for step in (1, 2):
        saver.save(step, state(step), wait=True)
    saver.close()
    assert names(tmp_path)[-2:] == ["step-00000001", "step-00000002"]
    told = "old checkpoints could not be removed: ZeroDivisionError: a rule of somebody's own"
    assert told in saver.lines  # type: ignore[attr-defined]


def test_the_same_step_again_is_a_new_checkpoint_and_replaces_the_old_one(tmp_path: Path) -> None:
    saver = manager(tmp_path)
    saver.save(5, state(1))
    path = saver.save(5, state(2))
    assert path.name == "step-00000005-2" and latest(tmp_path) == path
    assert names(tmp_path) == ["step-00000005-2"], "the superseded one goes after the new one is there"
    assert manager(tmp_path).save(5, state(3)).name == "step-00000005-3"
    found = state(0)
    assert saver.restore(found) == 5 and found.extra["value"] == 3


def test_steps_beyond_eight_digits_are_ordered_as_numbers(tmp_path: Path) -> None:
    saver = manager(tmp_path, keep=keep_all())
    for step in (5, 99_999_999, 100_000_000):
        saver.save(step, state(step))
    assert saver.restore(state(0)) == 100_000_000


def test_a_changed_state_gets_a_new_file_layout(tmp_path: Path) -> None:
    saver = manager(tmp_path, keep=keep_all())
    saver.save(1, State(arrays={"a": np.arange(3)}))
    saver.save(2, State(arrays={"a": np.arange(3), "b": np.arange(100_000)}))
    saver.save(3, State(arrays={"a": np.arange(3)}))
    for step, expected in ((1, ["a"]), (2, ["a", "b"]), (3, ["a"])):
        with open_checkpoint(tmp_path / f"step-{step:08d}") as checkpoint:
            assert checkpoint.verify() == []
            assert [name.removeprefix("arrays/") for name in checkpoint.names()] == expected


def test_a_save_that_fails_does_not_spoil_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of a state whose save failed must not be taken for that of another state."""
    import harness.checkpoint.writing as module

    saver = manager(tmp_path)
    small, large = {"a": np.arange(3)}, {"a": np.arange(3), "b": np.arange(9)}
    saver.save(1, State(arrays=small))
    with monkeypatch.context() as patch:
        patch.setattr(module.commit, "publish", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(SaveFailed, match="Input/output error"):
            saver.save(2, State(arrays=large))
    for step, arrays in ((3, small), (4, large)):
        saver.save(step, State(arrays=arrays))
        found = {name: np.zeros_like(array) for name, array in arrays.items()}
        assert saver.restore(State(arrays=found)) == step
        assert all((found[name] == arrays[name]).all() for name in arrays)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (keep_last(1), [8]),
        (keep_last(3), [6, 7, 8]),
        (keep_every(steps=3), [3, 6, 8]),
        (keep_best("loss", 2), [2, 5, 8]),
        (keep_best("loss", 1, mode="max"), [1, 8]),
        (keep_last(2) | keep_every(steps=4) | keep_best("loss"), [4, 5, 7, 8]),
        (keep_best("unknown"), [8]),
        (keep_all(), [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_what_is_kept(keep: Keep, left: list[int], tmp_path: Path) -> None:
    losses = {1: 0.9, 2: 0.2, 3: 0.5, 4: 0.5, 5: 0.1, 6: float("nan"), 7: 0.4, 8: 0.3}
    saver = manager(tmp_path, keep=keep)
    for step, loss in losses.items():
        saver.save(step, state(step), metrics={"loss": loss})
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


@given(st.lists(st.tuples(st.integers(0, 30), st.floats()), max_size=8), st.integers(1, 4))
def test_the_newest_is_always_kept(checkpoints: list[tuple[int, float]], count: int) -> None:
    candidates = [(step, {"loss": loss}) for step, loss in sorted(checkpoints, key=lambda pair: pair[0])]
    for keep in (keep_last(count), keep_best("loss", count), keep_every(steps=count)):
        kept = keep.select(candidates)
        assert kept <= set(range(len(candidates)))
        assert not candidates or len(candidates) - 1 in kept
        assert (keep | keep_all()).select(candidates) == set(range(len(candidates)))


@pytest.mark.parametrize(
    "make", [lambda: keep_last(0), lambda: keep_every(steps=0), lambda: keep_best("x", 1, mode="up")]
)
def test_rules_that_make_no_sense(make: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 1|min or max"):
        make()


def test_damaged_checkpoints_do_not_count_and_are_not_deleted(tmp_path: Path) -> None:
    saver = manager(tmp_path, keep=keep_all())
    for step in (1, 2, 3):
        saver.save(step, state(step))
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    again = manager(tmp_path, keep=keep_last(2))
    again.save(4, state(4))
    assert names(tmp_path) == [f"step-{step:08d}" for step in (2, 3, 4)]
    assert any("step-00000003 does not count" in line for line in again.lines)  # type: ignore[attr-defined]


def test_a_checkpoint_whose_manifest_is_gone_is_told_of(tmp_path: Path) -> None:
    saver = manager(tmp_path, keep=keep_all())
    for step in (1, 2):
        saver.save(step, state(step))
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    again = manager(tmp_path)
    assert again.restore(state(0)) == 1
    told = "warning: the checkpoint step-00000002 is passed over: "
    assert any(line.startswith(told) and "its manifest.json is gone" in line for line in again.lines)  # type: ignore[attr-defined]
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"none of the 2 checkpoints in .* is good"):
        manager(tmp_path).restore(state(0))


def test_what_an_earlier_program_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / "step-00000004.tmp-0123"
    left.mkdir()
    (left / "data.h5").write_bytes(b"half")
    others = ["notes.txt", "step-x", "step-00000009", "other.tmp-1"]
    (tmp_path / "notes.txt").write_text("mine")
    for name in others[1:]:
        (tmp_path / name).mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (tmp_path / "step-00000008.tmp-link").symlink_to(outside)
    saver = manager(tmp_path)
    assert saver.restore(state(0)) is None, "a directory without a manifest is no checkpoint"
    assert left.exists(), "only a save removes anything"
    saver.save(5, state(5))
    assert not left.exists() and outside.exists()
    assert names(tmp_path) == sorted([*others, "step-00000005", "step-00000008.tmp-link"])
    assert "removed step-00000004.tmp-0123" in saver.lines[0]  # type: ignore[attr-defined]


def test_a_linked_checkpoint_is_not_followed(tmp_path: Path) -> None:
    path = manager(tmp_path / "elsewhere").save(9, state(9))
    directory = tmp_path / "c"
    manager(directory).save(1, state(1))
    (directory / "step-00000009").symlink_to(path)
    assert manager(directory).restore(state(0)) == 1


def test_errors_are_sentences_with_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveFailed) as caught:
        manager(tmp_path / "file").save(1, state(1))
    assert caught.value.code == Exit.IO
    assert str(caught.value).startswith("the checkpoint of step 1 was not saved: it failed before anything was written")
    assert str(tmp_path / "file") in str(caught.value)
    with pytest.raises(SaveFailed, match="steps count from 0"):
        manager(tmp_path / "c").save(-1, state(1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SaveFailed, match="Permission denied"):
        manager(tmp_path).save(1, state(1))


def test_messages_go_to_the_log_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "step-00000004.tmp-0123").mkdir()
    Manager(tmp_path, Single()).save(1, state(1))
    assert "removed step-00000004.tmp-0123" in caplog.text


def test_a_step_that_was_saved_again_does_not_count_twice(tmp_path: Path) -> None:
    saver = manager(tmp_path, keep=keep_last(3))
    for step in (1, 2, 3, 3, 3):
        saver.save(step, state(step))
    assert [name for name in names(tmp_path) if name.startswith("step-")] == [
        "step-00000001",
        "step-00000002",
        "step-00000003-3",
    ]
