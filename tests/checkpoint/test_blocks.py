"""Reading the blocks of a file: around the page cache or through it, some ahead, with every trouble that may come."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import fcntl_flags, patched
from samples import manager

from harness.bench import raw
from harness.checkpoint import State
from harness.checkpoint.blocks import THREADS, Blocks, Segment
from harness.checkpoint.cached import spare_cache
from harness.checkpoint.commit import DATA
from harness.checkpoint.layout import PAGE
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.store import check

SIZE = 12 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A checkpoint whose data end within a page."""
    saver = manager(tmp_path_factory.mktemp("blocks"))
    large = torch.arange(SIZE // 4 + 333, dtype=torch.float32)
    path = saver.save(1, State(tensors={"large": large, "small": torch.ones(7)}), wait=True)
    saver.close()
    assert path is not None
    return path, check(path)


@pytest.fixture
def blocks(saved: tuple[Path, Manifest]) -> Iterator[Blocks]:
    opened = Blocks(*saved)
    yield opened
    opened.close()


def segments(blocks: Blocks, most: int) -> list[Segment]:
    return [(first, min(first + most, blocks.layout.blocks)) for first in range(0, blocks.layout.blocks, most)]


def check_all(blocks: Blocks, most: int = 5, threads: int = THREADS) -> None:
    """What `ahead` yields is the file."""
    whole = np.fromfile(blocks.path / DATA, np.uint8)
    seen = 0
    for found, segment in zip(blocks.ahead(segments(blocks, most), threads), segments(blocks, most), strict=True):
        lo = blocks.layout.block_range(found.first)[0]
        assert (found.first, found.last) == segment and not found.damaged
        assert np.array_equal(found.data, whole[lo : lo + len(found.data)])
        seen += len(found.data)
    assert seen == blocks.layout.data_end - blocks.layout.data_start and blocks.layout.data_end % PAGE


def goes_around(blocks: Blocks) -> bool:
    """Whether reads of whole pages go around the page cache."""
    around: list[bool] = []

    def look(call: int, original: Any, descriptor: int, *rest: Any) -> Any:
        around.append(bool(fcntl_flags(descriptor) & os.O_DIRECT))
        return original(descriptor, *rest)

    with patched("preadv", look):
        check_all(blocks)
    return any(around)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("most", [1, 5, 10_000])
@pytest.mark.parametrize("around", [False, True])
def test_segments_come_in_order(around: bool, most: int, threads: int, blocks: Blocks) -> None:
    if around:
        blocks.source.go_around()
    check_all(blocks, most, threads)
    assert list(blocks.ahead([])) == []


def test_the_cache_is_gone_around_where_the_file_is_not_in_it(blocks: Blocks, tmp_path: Path) -> None:
    if "odirect" not in raw.ways(blocks.path.parent):
        pytest.skip("this file system has no O_DIRECT")
    np.fromfile(blocks.path / DATA, np.uint8)
    spare_cache(blocks.source, blocks.layout)
    assert not goes_around(blocks)
    if not raw.drop([blocks.path / DATA]):
        pytest.skip("the page cache cannot be dropped here")
    spare_cache(blocks.source, blocks.layout)
    assert goes_around(blocks)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_go_around_says_so_when_opening(number: int, blocks: Blocks) -> None:
    def refuse(call: int, original: Any, path: Any, flags: int, *rest: Any) -> Any:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number), str(path))
        return original(path, flags, *rest)

    with patched("open", refuse):
        blocks.source.go_around()
    assert not goes_around(blocks)


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_refusal_at_any_read_is_made_up_for(at: int, blocks: Blocks) -> None:
    def refuse(call: int, original: Any, descriptor: int, *rest: Any) -> Any:
        if call >= at and fcntl_flags(descriptor) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(descriptor, *rest)

    blocks.source.go_around()
    with patched("preadv", refuse):
        check_all(blocks)
    assert not goes_around(blocks)


@pytest.mark.parametrize("most", [PAGE, 3 * PAGE + 100])
@pytest.mark.parametrize("around", [False, True])
def test_short_reads_are_continued(around: bool, most: int, blocks: Blocks) -> None:
    def short(call: int, original: Any, descriptor: int, buffers: Any, offset: int) -> int:
        view = memoryview(buffers[0])
        if not fcntl_flags(descriptor) & os.O_DIRECT:
            return int(original(descriptor, [view[:most]], offset))
        return min(int(original(descriptor, [view], offset)), most)  # of which the rest counts for nothing

    if around:
        blocks.source.go_around()
    with patched("preadv", short):
        check_all(blocks)


@pytest.mark.parametrize("around", [False, True])
def test_an_error_of_the_disk_is_told_and_ends_the_reading(around: bool, blocks: Blocks) -> None:
    def fail(call: int, original: Any, *rest: Any) -> Any:
        if call >= 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*rest)

    if around:
        blocks.source.go_around()
    with patched("preadv", fail), pytest.raises(OSError, match="Input/output error"):
        check_all(blocks)


def test_damage_is_told_block_by_block(blocks: Blocks) -> None:
    wanted = {3, blocks.layout.blocks - 1}

    def spoil(call: int, original: Any, descriptor: int, buffers: Any, offset: int) -> int:
        count = int(original(descriptor, buffers, offset))
        first = (offset - blocks.layout.data_start) // blocks.layout.block
        if first in wanted:
            memoryview(buffers[0]).cast("B")[0] ^= 1
        return count

    with patched("preadv", spoil):
        damaged = [block for found in blocks.ahead(segments(blocks, 1)) for block in found.damaged]
    assert damaged == sorted(wanted)


def test_who_stops_asking_leaves_nothing_behind(blocks: Blocks) -> None:
    for found in blocks.ahead(segments(blocks, 2)):
        assert found.first == 0
        break
    check_all(blocks)
