"""Images are written while the memory is still being copied, in order, and what fails there fails the save."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.checkpoint import Manager, SaveFailed, State, open_checkpoint
from harness.checkpoint import staging as staging_module
from harness.checkpoint.comm import Single
from harness.checkpoint.copying import Copying
from harness.checkpoint.engines.output import Output
from harness.checkpoint.layout import lay_out
from harness.checkpoint.plan import make_plan
from harness.checkpoint.schema import Leaf
from harness.checkpoint.staging import Image, Staging
from harness.checkpoint.tensors import Buffer
from harness.errors import HarnessError


def images(count: int) -> list[Image]:
    return [Image(number, number * 4096, np.zeros(4096, np.uint8)) for number in range(count)]


def test_images_come_as_they_are_filled() -> None:
    copying, taken, changed = Copying(images(4)), [], threading.Condition()

    def take() -> None:
        for image in copying:
            with changed:
                taken.append(image.block)
                changed.notify_all()

    thread = threading.Thread(target=take)
    thread.start()
    for count in (1, 3):
        copying.reach(count)
        with changed:
            assert changed.wait_for(lambda count=count: len(taken) == count, 60)
    assert taken == [0, 1, 2]
    copying.end()
    thread.join(60)
    copying.wait()
    assert taken == [0, 1, 2, 3]


def test_a_failure_ends_the_waiting() -> None:
    copying, seen = Copying(images(2)), []

    def take() -> None:
        try:
            list(copying)
        except MemoryError as error:
            seen.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    with copying.failing():
        raise MemoryError("no room")
    thread.join(60)
    copying.end()
    copying.wait()
    assert [str(error) for error in seen] == ["no room"]


def test_an_interruption_is_raised_and_ends_the_waiting() -> None:
    copying = Copying(images(2))
    with pytest.raises(KeyboardInterrupt), copying.failing():
        raise KeyboardInterrupt
    copying.wait()  # though nobody says `end`
    with pytest.raises(HarnessError, match="it was interrupted"):  # who writes is told, and is not interrupted
        list(copying)


def test_fill_says_which_images_have_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one tensor that lies in all of them, and of small ones at their borders."""
    monkeypatch.setattr(staging_module, "IMAGE", 1 << 16)
    monkeypatch.setattr(staging_module, "GROUP", 1 << 12)
    leaves = [Leaf("large", "uint8", (300_000,)), *(Leaf(f"small {i}", "uint8", (900,)) for i in range(100))]
    layout = lay_out(leaves, block=1 << 14)
    arrays = [np.full(leaf.nbytes, 1 + index % 250, np.uint8) for index, leaf in enumerate(layout.leaves)]
    staging = Staging()
    prepared = staging.prepare(layout, make_plan(layout, rank=0, size=1))
    expected = np.zeros(layout.data_end - layout.data_start, np.uint8)
    for array, start in zip(arrays, layout.starts.tolist(), strict=True):
        expected[start - layout.data_start :][: len(array)] = array
    heard = []

    def reached(count: int) -> None:
        heard.append(count)
        for image in prepared[:count]:
            begin = image.offset - layout.data_start
            assert np.array_equal(image.data, expected[begin : begin + len(image.data)]), (count, image.block)

    staging.fill([Buffer(array) for array in arrays], None, reached)
    assert heard == sorted(heard) and heard[-1] == len(prepared) >= 5 and len(set(heard)) >= len(prepared) - 1


def test_the_disk_works_while_the_memory_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "IMAGE", 1 << 16)
    monkeypatch.setattr(staging_module, "LARGE_IMAGE", 1 << 16)
    written, read = threading.Event(), []
    write, part = Output.write, Buffer.part

    def observed(self: Buffer, lo: int, hi: int) -> Any:
        if lo > 6_000_000 and not read:
            read.append(lo)
            assert written.wait(60), "the first image is written before the last is copied"
        return part(self, lo, hi)

    monkeypatch.setattr(Output, "write", lambda *args: (write(*args), written.set())[0])
    monkeypatch.setattr(Buffer, "part", observed)
    array = (
        np.random.default_rng(0).integers(0, 255, (2500, 4000), np.uint8).T
    )  # not in place: it is read as it is copied
    with Manager(tmp_path, comm=Single(), check_replicas=0) as manager:
        path = manager.save(1, State(tensors={"t": array}))
    assert read and path is not None
    with open_checkpoint(path) as checkpoint:
        assert np.array_equal(checkpoint.read("tensors/t"), array)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_copy_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    monkeypatch.setattr(staging_module, "IMAGE", 1 << 16)
    part, broken = Buffer.part, []

    def failing(self: Buffer, lo: int, hi: int) -> Any:
        if broken and lo > 6_000_000:
            raise MemoryError("no room for it")
        return part(self, lo, hi)

    monkeypatch.setattr(Buffer, "part", failing)
    manager = Manager(tmp_path, comm=Single(), check_replicas=0, lazy=lazy)
    manager.save(1, State(tensors={"t": np.zeros(10_000_000, np.uint8)}))
    manager.wait()
    broken.append(True)
    manager.save(2, State(tensors={"t": np.ones(10_000_000, np.uint8)}))
    with pytest.raises(SaveFailed, match="while it copied its part: MemoryError: no room for it"):
        manager.close()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001"]
