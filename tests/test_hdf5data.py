"""HDF5 data sets: many files as one, read in runs, safe with loader processes, told in sentences."""

from __future__ import annotations

import fcntl
import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import hdf5data
from harness.batch import plan_batch
from harness.data import start_forkserver, train_batches
from harness.errors import ConfigError, DataError, Exit, HarnessError, InputMissing
from harness.hdf5data import Hdf5Dataset, Run, runs
from harness.order import Order

LENGTHS = (5, 0, 7, 1)


def write(path: Path, first: int, count: int, **options: Any) -> None:
    numbers = np.arange(first, first + count)
    with h5py.File(path, "w") as file:
        file.create_dataset("x/images", data=numbers[:, None, None] * np.ones((2, 3)), dtype="f4", **options)
        file.create_dataset("labels", data=numbers, dtype=">i8")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number, (first, count) in enumerate(zip(np.cumsum((0, *LENGTHS)), LENGTHS, strict=False)):
        write(tmp_path / f"part-{number}.h5", int(first), count)
    return tmp_path


def seeds(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64)


def test_many_files_are_one(files: Path) -> None:
    data = Hdf5Dataset(str(files / "part-*.h5"), ["x/images", "labels"])
    assert len(data) == 13
    ids = np.array([12, 0, 4, 5, 5, 6, 11])
    images, labels = data.batch(ids, seeds(7))
    assert labels.tolist() == ids.tolist()
    assert labels.dtype == torch.int64, "big-endian on disk"
    assert images.shape == (7, 2, 3)
    assert torch.equal(images[:, 0, 0], labels.float())
    image, label = data[7]
    assert (image.shape, int(label)) == ((2, 3), 7)


def test_fields_by_name_and_a_transform(files: Path) -> None:
    def scale(batch: dict[str, torch.Tensor], draws: np.ndarray) -> dict[str, torch.Tensor]:
        return batch | {"y": batch["y"] * int(draws.sum())}

    data = Hdf5Dataset([files / "part-0.h5"], {"x": "x/images", "y": "labels"}, transform=scale)
    assert data.batch(np.array([1, 2]), seeds(3))["y"].tolist() == [3, 6]
    assert set(data[0]) == {"x", "y"}


@given(st.data())
def test_runs_cover_exactly_the_ids(data: st.DataObject) -> None:
    ends = np.cumsum(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5)))
    ids = np.array(sorted(data.draw(st.sets(st.integers(0, int(ends[-1]) - 1)))) if ends[-1] else [], np.int64)
    found = list(runs(ids, ends))
    begins = [0, *ends.tolist()]
    back = [(run.at + n, begins[run.file] + run.start + n) for run in found for n in range(len(run))]
    assert back == list(enumerate(ids.tolist()))
    for run in found:
        assert 0 <= run.start < run.stop <= int(np.diff(ends, prepend=0)[run.file])
    for one, two in pairwise(found):
        assert one.file != two.file or one.stop < two.start, "neighbours are one read"


def test_a_run_is_one_read(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Hdf5Dataset(files / "part-2.h5", ["labels"])
    reads = []
    real = h5py.Dataset.read_direct

    def counted(self: Any, into: Any, source: Any, to: Any) -> None:
        reads.append((source.start, source.stop))
        real(self, into, source, to)

    monkeypatch.setattr(h5py.Dataset, "read_direct", counted)
    assert data.batch(np.array([6, 1, 0, 2, 4]), seeds(5))[0].tolist() == [11, 6, 5, 7, 9]
    assert reads == [(0, 3), (4, 5), (6, 7)]
    assert list(runs(np.array([4, 5, 6]), np.array([5, 5, 12]))) == [Run(0, 4, 5, 0), Run(2, 0, 2, 1)]


def test_only_paths_travel(files: Path) -> None:
    data = Hdf5Dataset(files / "*.h5", ["labels"])
    data.batch(np.arange(13), seeds(13))
    assert data._files
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    assert pickle.loads(sent).batch(np.arange(13), seeds(13))[0].tolist() == list(range(13))
    data.close()
    assert not data._files
    assert int(data[3][0]) == 3, "reading opens again"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_forked_process_opens_its_own(files: Path) -> None:
    data = Hdf5Dataset(files / "part-0.h5", ["labels"])
    handle = data._files[0]
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if int(data[2][0]) == 2 and data._files[0] is not handle else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_few_files_stay_open(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5data, "OPEN_FILES", 2)
    data = Hdf5Dataset(files / "*.h5", ["labels"])
    for _ in range(2):
        assert data.batch(np.arange(13), seeds(13))[0].tolist() == list(range(13))
        assert len(data._files) == 2


def test_loader_processes_read_the_same(files: Path) -> None:
    start_forkserver()
    data = Hdf5Dataset(files / "*.h5", ["x/images", "labels"])
    plan = plan_batch(global_batch=4, ranks=1, micro_batch=2)
    order = Order(13, seed=0, block=4)
    read = [
        [
            (batch.ids.tolist(), batch.data[1].tolist(), batch.data[0].sum().item())
            for batch in train_batches(data, order, plan, replica=0, start_step=0, stop_step=5, seed=0, workers=workers)
        ]
        for workers in (0, 2)
    ]
    assert read[0] == read[1]
    assert all(ids == labels for ids, labels, _ in read[0])


def test_a_locked_file_can_be_read(files: Path) -> None:
    """As beside a program that has it open for writing; and on file systems without locks nothing fails."""
    with open(files / "part-0.h5", "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OSError, match="unable to lock file"):
            h5py.File(files / "part-0.h5", "r", locking=True)
        assert len(Hdf5Dataset(files / "part-0.h5", ["labels"])) == 5


def told(error: type[HarnessError], code: Exit, *texts: str, paths: Any, fields: Any = ("labels",)) -> None:
    with pytest.raises(error) as raised:
        Hdf5Dataset(paths, fields)
    assert raised.value.code == code
    for text in texts:
        assert text in str(raised.value)


def test_mistakes_are_told(files: Path) -> None:
    told(InputMissing, Exit.NO_INPUT, "none-*.h5: no such file", paths=files / "none-*.h5")
    told(InputMissing, Exit.NO_INPUT, "gone.h5: no such file", paths=[files / "part-0.h5", files / "gone.h5"])
    told(ConfigError, Exit.CONFIG, "at least one file", paths=[])
    told(ConfigError, Exit.CONFIG, "names of its fields", paths=files / "part-0.h5", fields="labels")
    for wrong in ("lables", "x"):
        hint = "it has labels, x/images"
        told(ConfigError, Exit.CONFIG, f"no data set {wrong!r}", hint, paths=files / "part-0.h5", fields=[wrong])


def test_bad_files_are_told(files: Path) -> None:
    (files / "text.h5").write_text("not HDF5")
    told(DataError, Exit.DATA, "text.h5 is no HDF5 file", paths=files / "text.h5")
    whole = (files / "part-2.h5").read_bytes()
    (files / "short.h5").write_bytes(whole[: len(whole) // 2])
    told(DataError, Exit.DATA, "short.h5 is no HDF5 file, or is damaged", "truncated", paths=files / "short.h5")
    with h5py.File(files / "uneven.h5", "w") as file:
        file["x/images"], file["labels"] = np.zeros((3, 2, 3), "f4"), np.zeros(4, "i8")
    fields = ["x/images", "labels"]
    told(DataError, Exit.DATA, "x/images 3, labels 4", paths=files / "uneven.h5", fields=fields)
    with h5py.File(files / "other.h5", "w") as file:
        file["labels"], file["names"], file["one"] = np.zeros(4, "f8"), np.array([b"a", b"b"]), 1.0
    told(DataError, Exit.DATA, "float64", "int64", "part-0.h5", paths=[files / "other.h5", files / "part-0.h5"])
    told(DataError, Exit.DATA, "not rows of numbers", paths=files / "other.h5", fields=["names"])
    told(DataError, Exit.DATA, "not rows of numbers", paths=files / "other.h5", fields=["one"])


def test_a_damaged_part_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "checked.h5"
    write(path, 0, 8, chunks=(4, 2, 3), fletcher32=True)
    with h5py.File(path) as file:
        offset = file["x/images"].id.get_chunk_info(1).byte_offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    data = Hdf5Dataset(path, ["x/images"])
    assert data.batch(np.arange(4), seeds(4))[0][3, 0, 0] == 3
    with pytest.raises(DataError, match=r"checked.h5: x/images\[4:8\] cannot be read"):
        data.batch(np.arange(8)[4:], seeds(4))


def test_samples_out_of_range(files: Path) -> None:
    data = Hdf5Dataset(files / "*.h5", ["labels"])
    for wrong in (-1, 13):
        with pytest.raises(IndexError, match="of 13"):
            data[wrong]
