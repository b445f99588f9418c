"""Whatever fails, and wherever a program is killed: the newest good checkpoint is the previous or the new one, by bits.

A layer around the file-system calls counts those that a save makes and does something at one of them; every test goes
through all of them. HDF5's own calls count as one: creating the metadata.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import manager

import harness.checkpoint.file as file_module
from harness.checkpoint import Manager, SaveFailed, State, keep_last

CALLS = ("open", "close", "ftruncate", "pwrite", "fsync", "fdatasync", "rename", "mkdir", "rmdir", "unlink", "stat")
KILLED = 57


def arrays(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    made: dict[str, Any] = {f"t{i}": generator.standard_normal(1000 + i) for i in range(5)}
    return {**made, "large": generator.integers(0, 255, 200_000, np.uint8)}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name].tobytes() == b[name].tobytes() for name in a)


def restored(directory: Path) -> tuple[int | None, dict[str, Any]]:
    found = {name: np.zeros_like(array) for name, array in arrays(0).items()}
    return manager(directory).restore(State(arrays=found)), found


class Layer:
    """Counts a save's calls and acts at number `at`. A lease's heartbeat comes when it comes, and does not count."""

    def __init__(self, act: Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self.act = act
        self.at = -1
        self.count = 0
        self.log: list[str] = []

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name == "checkpoint lease":
                return original(*args, **kwargs)
            number, self.count = self.count, self.count + 1
            self.log.append(name)
            if number == self.at:
                return self.act(name, original, args, kwargs)
            return original(*args, **kwargs)

        return call

    @contextmanager
    def installed(self, at: int) -> Iterator[None]:
        self.at, self.count, self.log = at, 0, []
        places = [(os, name) for name in CALLS] + [(file_module, "metadata"), (shutil, "disk_usage")]
        originals = [(place, name, getattr(place, name)) for place, name in places]
        for place, name, original in originals:
            setattr(place, name, self.wrap(name, original))
        try:
            yield
        finally:
            for place, name, original in originals:
                setattr(place, name, original)


def failing(number: int) -> Callable[..., Any]:
    def act(name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "close":
            original(*args)  # an error of close leaves no descriptor behind
        raise OSError(number, os.strerror(number), str(args[0]))

    return act


def how_many_calls(directory: Path, keep: int) -> int:
    layer = Layer(failing(errno.EIO))
    saver = first_save(directory, keep)
    with layer.installed(-1):
        saver.save(2, State(arrays=arrays(2)))
    assert {"metadata", "pwrite", "fsync", "fdatasync", "rename"} <= set(layer.log), layer.log
    return layer.count


def first_save(directory: Path, keep: int) -> Manager:
    """One checkpoint of an earlier program, and the manager of a new one."""
    shutil.rmtree(directory, ignore_errors=True)
    manager(directory).save(1, State(arrays=arrays(1)))
    return manager(directory, keep=keep_last(keep))


@pytest.mark.parametrize(("number", "keep"), [(errno.EIO, 3), (errno.ENOSPC, 1)])
def test_any_call_that_fails(number: int, keep: int, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    calls = how_many_calls(directory, keep)
    assert calls > 30
    outcomes = set()
    for at in range(calls):
        saver = first_save(directory, keep)
        layer = Layer(failing(number))
        with layer.installed(at):
            try:
                saver.save(2, State(arrays=arrays(2)))
                saved = True
            except SaveFailed as error:
                saved = False
                assert "the checkpoint of step 2 was not saved" in str(error)
                assert os.strerror(number) in str(error) or re.search("cannot be read", str(error)), error
        step, found = restored(directory)
        assert step in (1, 2) and same(found, arrays(int(step))), f"call {at}: {layer.log[at]}"
        assert step == 2 or not saved, f"call {at}: {layer.log[at]}: a save that returned is there"
        outcomes.add((saved, step))
        saver.save(3, State(arrays=arrays(3)))
        step, found = restored(directory)
        assert step == 3 and same(found, arrays(3)), f"the save after call {at}: {layer.log[at]}"
        saver.save(4, State(arrays=arrays(4)))
        left = [path.name for path in directory.iterdir() if ".tmp-" in path.name]
        assert len(left) <= 1, left
        manager(directory).save(5, State(arrays=arrays(5)))
        assert not [path.name for path in directory.iterdir() if ".tmp-" in path.name], "a new program tidies up"
    assert {(False, 1), (True, 2)} <= outcomes


def test_killed_at_any_call(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    keep = 1  # so that the earlier checkpoint is deleted, too
    calls = how_many_calls(directory, keep)

    def kill(*_: Any) -> Any:
        os._exit(KILLED)

    steps = []
    for at in range(calls):
        saver = first_save(directory, keep)
        child = os.fork()
        if child == 0:
            try:
                with Layer(kill).installed(at):
                    saver.save(2, State(arrays=arrays(2)))
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
        step, found = restored(directory)
        assert step in (1, 2) and same(found, arrays(int(step))), at
        steps.append(step)
        again = manager(directory)
        again.save(3, State(arrays=arrays(3)))
        assert restored(directory)[0] == 3
        assert not [path.name for path in directory.iterdir() if ".tmp-" in path.name]
    assert steps == sorted(steps) and set(steps) == {1, 2}, "once it is there it stays"


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, reading = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: original(d, memoryview(data)[: max(1, len(data) // 3)], at))
    monkeypatch.setattr(
        os, "preadv", lambda d, views, at, *how: reading(d, [views[0][: max(1, len(views[0]) // 2)]], at, *how)
    )
    manager(tmp_path).save(1, State(arrays=arrays(1)))
    step, found = restored(tmp_path)
    assert step == 1 and same(found, arrays(1))


class PowerLoss:
    """A log of what a save does to files, from which the state after a power failure is rebuilt.

    What was not synced may be lost: here all of it is. File data live from `fsync`/`fdatasync` on, names of files and
    directories from an `fsync` of the directory that holds them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[tuple[str, Any]] = []
        self.paths: dict[int, str] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        originals = {
            name: getattr(os, name) for name in ("open", "pwrite", "ftruncate", "fsync", "fdatasync", "rename", "mkdir")
        }

        def note(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if name == "pwrite":
                    written = originals[name](*args)
                    self.events.append(("write", (self.paths[args[0]], args[2], bytes(memoryview(args[1])[:written]))))
                    return written
                result = originals[name](*args, **kwargs)
                if name == "open":
                    self.paths[result] = str(args[0])
                    if args[1] & os.O_CREAT:
                        self.events.append(("create", str(args[0])))
                elif name == "ftruncate":
                    self.events.append(("size", (self.paths[args[0]], args[1])))
                elif name in ("fsync", "fdatasync"):
                    self.events.append(("sync", self.paths[args[0]]))
                elif name == "rename":
                    self.events.append(("rename", (str(args[0]), str(args[1]))))
                else:
                    self.events.append(("mkdir", str(args[0])))
                return result

            return call

        for name in originals:
            setattr(os, name, note(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(os, name, original)

    def after(self, count: int, target: Path) -> None:
        """Rebuild in `target` what is on disk when the power fails after `count` events."""
        live: dict[str, int] = {str(self.root): 0}  # path -> inode
        memory: dict[int, bytearray | None] = {0: None}  # inode -> content, None of a directory
        disk: dict[int, Any] = {0: {}}  # inode -> content, or names of what is in the directory, as of its last sync
        for kind, what in self.events[:count]:
            if kind in ("create", "mkdir"):
                live[what] = len(memory)
                memory[live[what]] = None if kind == "mkdir" else bytearray()
            elif kind in ("write", "size"):
                path, at, data = what if kind == "write" else (*what, b"")
                content = memory[live[path]]
                assert content is not None
                content.extend(bytes(max(0, at + len(data) - len(content))))
                content[at : at + len(data)] = data
            elif kind == "rename":
                old, new = what
                for path in [path for path in live if path == old or path.startswith(old + "/")]:
                    live[new + path[len(old) :]] = live.pop(path)
            elif what in live and memory[live[what]] is not None:
                disk[live[what]] = bytes(memory[live[what]] or b"")
            elif what in live:
                inside = {path: inode for path, inode in live.items() if os.path.dirname(path) == what}
                disk[live[what]] = {os.path.basename(path): inode for path, inode in inside.items()}

        def rebuild(inode: int, place: Path) -> None:
            if memory[inode] is not None:
                place.write_bytes(disk.get(inode, b""))
                return
            place.mkdir(exist_ok=True)
            for name, inner in disk.get(inode, {}).items():
                rebuild(inner, place / name)

        rebuild(0, target)


def test_power_loss_after_any_call(tmp_path: Path) -> None:
    """Only what was synced survives: the new checkpoint counts once `save` has returned, and never in parts."""
    root = tmp_path / "run"
    root.mkdir()
    loss = PowerLoss(root)
    saver = manager(root / "checkpoints")  # its own directory must become durable, too
    with loss.recorded():
        saver.save(1, State(arrays=arrays(1)))
        first = len(loss.events)
        saver.save(2, State(arrays=arrays(2)))
    steps = []
    for count in range(len(loss.events) + 1):
        target = tmp_path / f"after-{count}"
        target.mkdir()
        loss.after(count, target)
        step, found = restored(target / "checkpoints")
        assert step is None or same(found, arrays(step)), (count, loss.events[count - 1][0])
        steps.append(step or 0)
        shutil.rmtree(target)
    assert steps == sorted(steps) and set(steps) == {0, 1, 2}
    assert steps[first] == 1 and steps[-1] == 2, "what save has returned is durable"


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small file system needs root"
)
def test_a_full_file_system(tmp_path: Path) -> None:
    import subprocess

    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(directory)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        saver = manager(directory / "c")
        small = {"a": np.arange(1000.0)}
        saver.save(1, State(arrays=small))  # the room that is left for others follows what is needed
        with pytest.raises(SaveFailed, match=r"8\.1 MB are needed in .*, and 1.0 MB to spare; [\d.]+ MB are free"):
            saver.save(2, State(arrays={"a": np.zeros(1_000_000)}))
        from harness.checkpoint import space as module

        preflight, module.preflight = module.preflight, lambda *_: None
        try:  # somebody else takes the space meanwhile
            with pytest.raises(SaveFailed, match="No space left on device"):
                saver.save(2, State(arrays={"a": np.ones(1_000_000)}))
        finally:
            module.preflight = preflight
        assert [path.name for path in (directory / "c").glob("step-*")] == ["step-00000001"]
        saver.save(3, State(arrays=small))
    finally:
        subprocess.run(["umount", str(directory)], check=True)
