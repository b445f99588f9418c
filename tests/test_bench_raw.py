"""Plain writes and reads that checkpoints are measured against: the bytes arrive, in both ways, and leave the cache."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from harness.bench import raw
from harness.checkpoint.cached import share_in_cache
from harness.checkpoint.pages import aligned

SIZE = 3 * mmap.PAGESIZE


@pytest.fixture
def data() -> raw.Bytes:
    made = aligned(SIZE - 100)
    made[:] = np.random.default_rng(1).integers(0, 256, len(made), np.uint8)
    return made


def test_buffers_are_whole_pages_at_a_page(data: raw.Bytes) -> None:
    assert len(data) == SIZE and data.ctypes.data % mmap.PAGESIZE == 0
    assert len(aligned(0)) == mmap.PAGESIZE and not aligned(10).any()


def test_what_is_written_is_read(data: raw.Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "PIECE", 2 * mmap.PAGESIZE)  # more than one call
    found = raw.ways(tmp_path)
    assert found[-1] == "buffered" and not list(tmp_path.iterdir())
    for way in found:
        path = tmp_path / way
        raw.write(path, data, way)
        raw.write(path, data, way, offset=SIZE, threads=2)
        assert path.read_bytes() == data.tobytes() * 2
        for how in found:
            back = aligned(SIZE)
            raw.read(path, back, how, offset=SIZE)
            assert np.array_equal(back, data)
    with pytest.raises(OSError, match="ends early") as error:
        raw.read(tmp_path / "buffered", data, "buffered", offset=SIZE + mmap.PAGESIZE)
    assert error.value.errno == errno.EIO


def test_file_and_folder_are_synced(data: raw.Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    raw.write(tmp_path / "x", data, "buffered")
    assert synced == [str(tmp_path / "x"), str(tmp_path)]


def test_a_file_system_without_odirect_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    assert raw.ways(tmp_path) == ["buffered"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        raw.ways(tmp_path / "absent")


def test_dropped_files_are_cold(data: raw.Bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    raw.write(path, np.tile(data, 50), "buffered")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if share_in_cache(descriptor, 0, size) < 1:
            pytest.skip("this file system does not tell what it caches")
        assert raw.drop([path])
        assert share_in_cache(descriptor, 0, size) < 0.5
    finally:
        os.close(descriptor)


def test_warmed_files_are_in_the_cache(data: raw.Bytes, tmp_path: Path) -> None:
    raw.write(tmp_path / "x", data, "buffered")
    raw.drop([tmp_path / "x"])
    raw.warm(tmp_path / "x")
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    assert share_in_cache(descriptor, 0, SIZE) == 1
    os.close(descriptor)
