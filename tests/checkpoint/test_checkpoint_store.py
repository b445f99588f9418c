"""Which checkpoints a directory has: tags, going back, retention beside them, and how one of them is named."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import manager
from support import ROOT

from harness.checkpoint import State, keep_all, keep_last, latest, store
from harness.checkpoint.names import ASIDE, make_name, parse_name
from harness.checkpoint.select import Place, locate, resolve, select
from harness.checkpoint.space import explain, preflight
from harness.checkpoint.store import listing, new_name, prune, roll_back
from harness.checkpoint.tags import add_tag, check_tag, read_tags, remove_tag, tagged
from harness.errors import DataError, Exit, HarnessError, InputMissing, StorageError, UsageError


def fill(directory: Path, steps: list[int], losses: dict[int, float] | None = None) -> Path:
    saver = manager(directory, keep=keep_all())
    for step in steps:
        metrics = {"loss": losses[step]} if losses and step in losses else {}
        saver.save(step, State(arrays={"a": np.full(3, float(step))}), metrics=metrics)
    saver.close()
    return directory


def steps(directory: Path) -> list[int]:
    return [stored.step for stored in listing(directory)]


# Names


@given(st.integers(0, 10**18 - 1), st.integers(1, 10**9 - 1))
def test_names_are_read_as_they_are_written(step: int, number: int) -> None:
    assert parse_name(make_name(step, number)) == (step, number)


@pytest.mark.parametrize(
    "name", ["step-1", "step-00000001.tmp-0", "step-0000000a", "Step-00000001", "step-00000001-", ""]
)
def test_other_names(name: str) -> None:
    assert parse_name(name) is None


# Tags


def test_tags_come_move_and_go(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2])
    assert read_tags(tmp_path) == {} and not (tmp_path / "tags").exists()
    add_tag(tmp_path, "paper", "step-00000001")
    add_tag(tmp_path, "paper", "step-00000001")
    assert (tmp_path / "tags" / "paper").read_text() == "step-00000001\n"
    assert os.listdir(tmp_path / "tags") == ["paper"]
    assert tagged(tmp_path, "paper") == "step-00000001" and select(tmp_path, "paper").name == "step-00000001"
    with pytest.raises(UsageError, match="belongs to step-00000001"):
        add_tag(tmp_path, "paper", "step-00000002")
    add_tag(tmp_path, "paper", "step-00000002", move=True)
    assert read_tags(tmp_path) == {"paper": "step-00000002"}
    assert remove_tag(tmp_path, "paper") == "step-00000002" and read_tags(tmp_path) == {}
    for call in (remove_tag, tagged):
        with pytest.raises(InputMissing, match=r"no tag 'paper' in .*; there are no tags"):
            call(tmp_path, "paper")
    with pytest.raises(InputMissing, match="is no checkpoint"):
        add_tag(tmp_path, "x", "step-00000009")
    with pytest.raises(InputMissing, match="is no checkpoint"):
        add_tag(tmp_path, "x", "../other")


@pytest.mark.parametrize("tag", ["paper", "v1.0", "a_b-c", "x" * 100, "1a", "latest-2", ".a", "..a"])
def test_names_that_a_tag_can_have(tag: str) -> None:
    assert check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag",
    ["", "latest", "Latest", "best", "12", "12-3", "step-x", "a/b", "../a", ".", "..", "x" * 101, "a b", "ä", "a:b",
     "a@b", "a\n", "\0", "a.tmp-1"],
)  # fmt: skip
def test_names_that_no_tag_can_have(tag: str, tmp_path: Path) -> None:
    fill(tmp_path, [1])
    with pytest.raises(UsageError, match="cannot be a tag"):
        add_tag(tmp_path, tag, "step-00000001")
    assert not (tmp_path / "tags").exists()


@given(st.text(max_size=120))
def test_what_may_be_a_tag_is_a_plain_file_name(tag: str) -> None:
    try:
        check_tag(tag)
    except UsageError:
        return
    assert tag.isascii() and "/" not in tag and tag not in ("", ".", "..") and parse_name(tag) is None


def test_what_is_no_tag_is_not_read_as_one(tmp_path: Path) -> None:
    fill(tmp_path, [1])
    add_tag(tmp_path, "good", "step-00000001")
    tags = tmp_path / "tags"
    for name, content in [("up", "../../secret\n"), ("long", "step-" + "0" * 5000), ("two", "step-00000001\nmore\n"),
                          ("none", ""), ("noise", "\0\x1b[31m"), ("12", "step-00000001\n"), ("a b", "step-00000001\n"),
                          ("t.tmp-1", "step-00000001\n")]:  # fmt: skip
        (tags / name).write_text(content)
    (tags / "link").symlink_to(tags / "good")
    (tags / "folder").mkdir()
    os.mkfifo(tags / "pipe")
    assert read_tags(tmp_path) == {"good": "step-00000001"}


def test_a_tag_whose_checkpoint_is_gone_is_told(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2])
    add_tag(tmp_path, "paper", "step-00000001")
    store.shutil.rmtree(tmp_path / "step-00000001")
    assert read_tags(tmp_path) == {"paper": "step-00000001"}
    with pytest.raises(InputMissing, match=r"behind the tag 'paper' is gone: .*step-00000001"):
        select(tmp_path, "paper")
    add_tag(tmp_path, "paper", "step-00000002")
    assert select(tmp_path, "paper").name == "step-00000002"


def test_a_failing_disk_leaves_the_tag_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, [1, 2])
    add_tag(tmp_path, "paper", "step-00000001")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space"):
                add_tag(tmp_path, "paper", "step-00000002", move=True)
        assert read_tags(tmp_path) == {"paper": "step-00000001"} and os.listdir(tmp_path / "tags") == ["paper"]


# Retention beside tags


def test_a_tagged_checkpoint_is_never_pruned(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2, 3, 4])
    add_tag(tmp_path, "paper", "step-00000002")
    lines: list[str] = []
    prune(tmp_path, keep_last(1), {}, lines.append)
    assert steps(tmp_path) == [2, 4]
    saver = manager(tmp_path, keep=keep_last(1))
    for step in (2, 5):  # the tagged one is superseded, and still stays
        saver.save(step, State(arrays={"a": np.zeros(3)}))
    assert [stored.path.name for stored in listing(tmp_path)] == ["step-00000002", "step-00000005"]
    remove_tag(tmp_path, "paper")
    prune(tmp_path, keep_last(1), {}, lines.append)
    assert steps(tmp_path) == [5]


def test_a_tag_that_comes_while_it_is_pruned_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, [1, 2])
    rename = os.rename

    def tag_then_rename(source: Any, target: Any) -> None:
        if Path(source).name == "step-00000001" and not read_tags(tmp_path):
            monkeypatch.setattr(os, "rename", rename)
            add_tag(tmp_path, "paper", "step-00000001")
        rename(source, target)

    monkeypatch.setattr(os, "rename", tag_then_rename)
    prune(tmp_path, keep_last(1), {}, lambda _: None)
    assert steps(tmp_path) == [1, 2] and read_tags(tmp_path)


def test_tags_that_cannot_be_read_stop_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, [1, 2])
    add_tag(tmp_path, "paper", "step-00000001")
    good = os.open

    def fail(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == "paper":
            raise OSError(errno.EIO, "Input/output error")
        return good(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        prune(tmp_path, keep_last(1), {}, lambda _: None)
    assert steps(tmp_path) == [1, 2]


# Going back


def test_going_back_and_forth_deletes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2, 3, 4])
    path = {step: tmp_path / make_name(step) for step in (1, 2, 3, 4)}
    assert roll_back(tmp_path, path[2]) == ([path[3], path[4]], [])
    assert steps(tmp_path) == [1, 2] and latest(tmp_path) == path[2]
    found = State(arrays={"a": np.zeros(3)})
    assert manager(tmp_path).restore(found) == 2 and found.arrays["a"].tolist() == [2, 2, 2]
    assert [stored.step for stored in listing(tmp_path, aside=True)] == [1, 2, 3, 4]
    assert roll_back(tmp_path, path[3]) == ([], [path[3]])
    assert steps(tmp_path) == [1, 2, 3]
    assert roll_back(tmp_path, path[1]) == ([path[2], path[3]], [])
    assert roll_back(tmp_path, path[4]) == ([], [path[2], path[3], path[4]])
    assert steps(tmp_path) == [1, 2, 3, 4] and not list(tmp_path.glob(f"*/{ASIDE}"))
    with pytest.raises(InputMissing, match="no checkpoint of"):
        roll_back(tmp_path, tmp_path / "step-00000009")


def test_training_goes_on_after_going_back(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2, 3])
    roll_back(tmp_path, tmp_path / "step-00000001")
    saver = manager(tmp_path, keep=keep_last(1))
    path = saver.save(2, State(arrays={"a": np.full(3, 20.0)}))
    assert path.name == "step-00000002-2" and latest(tmp_path) == path
    assert [stored.path.name for stored in store.committed(tmp_path)] == ["step-00000002", path.name, "step-00000003"]
    assert select(tmp_path, 2) == path, "the one in use, not the one that was set aside"
    assert new_name(tmp_path, 2) == "step-00000002-3"


def test_an_interrupted_return_leaves_a_newest_one_and_can_be_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, [1, 2, 3, 4])
    calls = []

    def fail_at_second(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "sync_directory", fail_at_second)
        with pytest.raises(OSError, match="Input/output"):
            roll_back(tmp_path, tmp_path / "step-00000001")
    assert steps(tmp_path) == [1, 2], "the newest ones first, so that nothing is left out in between"
    roll_back(tmp_path, tmp_path / "step-00000001")
    assert steps(tmp_path) == [1]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_any_order_of_returns(targets: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        for step in range(1, 6):
            path = Path(name) / make_name(step)
            path.mkdir()
            (path / "manifest.json").write_text("{}")
        for target in targets:
            roll_back(Path(name), Path(name) / make_name(target))
            assert steps(Path(name)) == list(range(1, target + 1))


# Choosing


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 to 50, with losses; 20 saved twice and tagged, 30 found damaged, 50 set aside."""
    run = tmp_path_factory.mktemp("runs") / "me@home"
    directory = run / "checkpoints"
    losses = {10: 0.5, 20: 0.25, 30: 0.1, 40: 0.25}
    fill(directory, [10, 20], losses)
    add_tag(directory, "paper", make_name(20))  # else it would go as soon as there is another one of its step
    fill(directory, [20, 30, 40, 50], losses)
    store.mark_damaged(directory / make_name(30), "for the test")
    roll_back(directory, directory / make_name(40))
    add_tag(directory, "beyond", make_name(50))
    return directory


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("latest", "step-00000040"),
        (10, "step-00000010"),
        ("20", "step-00000020-2"),
        ("0020", "step-00000020-2"),
        ("20-1", "step-00000020"),
        ("step-00000020", "step-00000020"),
        ("paper", "step-00000020"),
        ("best:loss", "step-00000040"),
        ("best:loss:min", "step-00000040"),
        ("best:loss:max", "step-00000010"),
    ],
)
def test_choosing(chosen: Path, which: str | int, name: str) -> None:
    assert select(chosen, which) == chosen / name
    assert resolve(f"{chosen.parent}@{which}") == resolve(f"{chosen}@{which}") == chosen / name


@pytest.mark.parametrize(
    ("which", "kind", "match"),
    [
        ("15", InputMissing, "no checkpoint of step 15 in .*; there are steps 40, 20, 10"),
        ("20-3", InputMissing, "no save 3 of step 20"),
        ("step-00000060", InputMissing, "no save 1 of step 60"),
        ("papier", InputMissing, "no tag 'papier' in .*; there are beyond, paper"),
        ("30", DataError, "step-00000030 was found damaged"),
        ("50", InputMissing, "step-00000050 was set aside"),
        ("beyond", InputMissing, "was set aside"),
        ("best:accuracy", InputMissing, "'accuracy'; there are loss"),
        ("best", UsageError, "`best` needs a metric"),
        ("best:", InputMissing, "no tag"),
        ("../x", InputMissing, "no tag"),
        ("-1", InputMissing, "no tag"),
    ],
)
def test_choosing_what_is_not_there(chosen: Path, which: str, kind: type[HarnessError], match: str) -> None:
    with pytest.raises(kind, match=match):
        select(chosen, which)


def test_what_was_set_aside_can_be_looked_at_by_name(chosen: Path) -> None:
    assert resolve(f"{chosen}@50") == resolve(f"{chosen}@beyond") == chosen / "step-00000050"


def test_the_best_one_that_is_good(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2, 3, 4], {1: 0.3, 2: 0.2, 3: 0.1, 4: float("nan")})
    os.truncate(tmp_path / "step-00000003" / "data.h5", 0)
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    assert select(tmp_path, "best:loss").name == "step-00000001"


def test_places(chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = chosen.parent
    assert "@" in str(run), "a path with an @ is a path"
    assert locate(run) == locate(chosen) == Place(chosen)
    assert locate(f"{run}@10") == Place(chosen, "10") and locate(f"{run}@best:x@y") == Place(chosen, "best:x@y")
    one = chosen / "step-00000010"
    assert locate(one) == Place(chosen, path=one) and resolve(one) == one
    copy = tmp_path / "a copy"
    copy.symlink_to(one)
    assert resolve(copy) == copy
    monkeypatch.chdir(one)
    assert resolve(".") == Path(".") and locate(".").directory == chosen
    monkeypatch.chdir(run)
    assert resolve("checkpoints@10") == Path("checkpoints/step-00000010") and resolve(".@10").name == "step-00000010"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert locate(empty) == Place(empty)
    (empty / "config.yaml").write_text("")
    assert locate(f"{empty}@3") == Place(empty / "checkpoints", "3")


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ("nowhere", InputMissing, "there is no directory nowhere$"),
        ("nowhere@12", InputMissing, "there is no directory nowhere$"),
        ("@12", InputMissing, "there is no directory"),
        ("", InputMissing, "there is no directory"),
        ("run@", UsageError, "ends in an @"),
        ("run", InputMissing, "no checkpoint in run"),
        ("run@5", InputMissing, "no checkpoint of step 5 in run; there is none at all"),
        ("run@best:loss", InputMissing, "no checkpoint in run"),
        ("run/step-00000001", InputMissing, "no manifest.json in it"),
        ("run/step-00000001@5", UsageError, "nothing to choose from by @5"),
        ("fresh", InputMissing, "no checkpoints yet: fresh/checkpoints is not there"),
    ],
)
def test_places_that_are_not_there(
    text: str, kind: type[HarnessError], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/step-00000001").mkdir(parents=True)
    Path("fresh").mkdir()
    Path("fresh/config.yaml").write_text("")
    with pytest.raises(kind, match=match):
        resolve(text)


def test_why_there_is_none_to_choose(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2])
    store.mark_damaged(tmp_path / "step-00000001", "for the test")
    (tmp_path / "step-00000002" / ASIDE).write_text("{}")
    with pytest.raises(InputMissing, match="no good checkpoint") as caught:
        select(tmp_path)
    assert caught.value.hint == "of 2: 1 found damaged, 1 set aside"


def test_selecting_needs_neither_torch_nor_mpi_nor_hdf5(chosen: Path) -> None:
    program = f"""
import sys
from harness.checkpoint.select import resolve
assert resolve({str(chosen)!r}).name == "step-00000040"
print(sorted({{"torch", "h5py", "mpi4py", "horovod", "pydantic"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# Room


def statvfs(**values: int) -> Callable[[Any], Any]:
    given = {"f_bavail": 1 << 30, "f_frsize": 4096, "f_files": 1000, "f_favail": 500, **values}
    return lambda _: SimpleNamespace(**given)


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight(tmp_path / "not" / "yet", 1000)
    with pytest.raises(StorageError, match=r" TB are needed in .*, and 16.8 MB to spare; [\d.]+ .B are free") as caught:
        preflight(tmp_path, 1 << 60)
    assert caught.value.code == Exit.IO and "free some space" in str(caught.value.hint)
    monkeypatch.setattr(os, "statvfs", statvfs(f_favail=1))
    with pytest.raises(StorageError, match=r"2 more files are needed in .*, the file system takes 1 "):
        preflight(tmp_path, 1000, files=2)
    monkeypatch.setattr(os, "statvfs", statvfs(f_favail=0, f_files=0))  # as btrfs and many network file systems say
    preflight(tmp_path, 1000, files=2)


@pytest.mark.parametrize(
    ("number", "match"), [(errno.EDQUOT, "quota is used up for /a"), (errno.ENOSPC, "no space is left for /a")]
)
def test_errors_that_mean_no_room(number: int, match: str) -> None:
    told = explain(OSError(number, os.strerror(number), "/a"))
    assert told is not None and match in told[0]
    assert explain(OSError(errno.EIO, "x")) is None and explain(OSError("x")) is None
