"""Partitions of a data set: no sample lost or doubled, sizes as asked for, files whole or not there, exact orders."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from harness.batch import plan_batch
from harness.data import train_batches
from harness.errors import ConfigError, DataError, InputMissing, Unavailable, UsageError
from harness.hdf5data import Hdf5Dataset
from harness.partition import clusters, methods
from harness.partition import split as splitting
from harness.partition.balance import balance
from harness.partition.file import Partition, read, write
from harness.partition.order import PartOrder, check_partition
from harness.partition.split import split
from launch import cli

SHARES = st.lists(st.integers(1, 9), min_size=1, max_size=6)
CENTRES = np.array([[0, 0], [10, 0], [0, 10]], np.float32)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hdf5Dataset:
    """90 samples in two files: x near three centres in turn, a user (0 to 8), a time; in the working directory."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    number = np.arange(90)
    x = CENTRES[number % 3] + random.uniform(-1, 1, (90, 2)).astype(np.float32)
    for name, part in (("train-0.h5", slice(0, 50)), ("train-1.h5", slice(50, None))):
        with h5py.File(name, "w") as file:
            file["x"] = x[part]
            file["user"] = (number % 9)[part]
            file["log/time"] = (1000.0 - number)[part]
    return Hdf5Dataset("train-*.h5", ["x", "user", "log/time"])


def ask(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = cli.execute(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


# --- the methods


@given(st.integers(1, 200), SHARES, st.integers(0, 2**63 - 1))
def test_sizes_are_as_asked_for(samples: int, shares: list[int], seed: int) -> None:
    try:
        parts = methods.contiguous(samples, shares)
    except ConfigError:
        assert any(samples * share / sum(shares) < 1.5 for share in shares)
        return
    sizes = np.bincount(parts, minlength=len(shares))
    assert parts.dtype == np.int32 and len(parts) == samples and (np.diff(parts) >= 0).all()
    assert (sizes >= 1).all() and np.allclose(sizes, samples * np.array(shares) / sum(shares), atol=1.001)
    shuffled = methods.random(samples, shares, seed)
    assert np.array_equal(np.bincount(shuffled), sizes)
    assert np.array_equal(shuffled, methods.random(samples, shares, seed))


@given(st.lists(st.integers(-5, 20), min_size=1, max_size=80), SHARES)
def test_equal_values_stay_together(values: list[int], shares: list[int]) -> None:
    for method in (methods.groups, methods.ranges):
        if len(set(values)) < len(shares) or len(values) < 2 * sum(shares):
            continue
        parts = method(np.array(values), shares)
        assert sorted(set(parts.tolist())) == list(range(len(shares))), "no part is empty"
        of_value = {}
        for value, part in zip(values, parts.tolist(), strict=True):
            assert of_value.setdefault(value, part) == part
        if method is methods.ranges:
            assert [of_value[value] for value in sorted(of_value)] == sorted(of_value.values())


@given(st.lists(st.integers(1, 30), min_size=4, max_size=40), st.integers(1, 4))
def test_groups_are_as_even_as_promised(sizes: list[int], parts: int) -> None:
    values = np.repeat(np.arange(len(sizes)), sizes)
    load = np.bincount(methods.groups(values, [1.0] * parts))
    # the best possible is not below either of these, nor (where two groups must share a part) the sum of those two
    ordered = sorted(sizes, reverse=True)
    best = max(sum(sizes) / parts, ordered[0], sum(ordered[parts - 1 : parts + 1]) if len(sizes) > parts else 0)
    assert load.max() <= best * 4 / 3 + 1e-9 or load.max() <= sum(sizes) / parts + ordered[0]


def test_an_even_attribute_is_cut_evenly() -> None:
    times = np.random.default_rng(1).permutation(1000).astype(np.float64)
    assert np.bincount(methods.ranges(times, [1, 1, 2])).tolist() == [250, 250, 500]
    assert np.bincount(methods.groups(np.arange(1000) % 100, [3, 1])).tolist() == [750, 250]


@pytest.mark.parametrize("method", [clusters.kmeans, clusters.ward])
@pytest.mark.parametrize("looked_at", [5000, 40])
def test_clusters_are_found(method: Any, looked_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clouds; also where centres come from a few samples only."""
    monkeypatch.setattr(clusters, "KMEANS_SAMPLE", looked_at)
    monkeypatch.setattr(clusters, "WARD_SAMPLE", looked_at)
    monkeypatch.setattr(clusters, "PIECE", 100)
    x = CENTRES[np.arange(120) % 3] + np.random.default_rng(0).uniform(-1, 1, (120, 2))
    parts = method(lambda ids: x[ids], 120, 3, 0)
    assert {tuple(set(parts[start::3].tolist())) for start in range(3)} == {(0,), (1,), (2,)}
    assert np.array_equal(parts, method(lambda ids: x[ids], 120, 3, 0))


def test_wards_clusters_have_the_least_variance() -> None:
    """Against all ways to cut six points into two."""
    x = np.array([[0.0], [1.0], [1.5], [7.0], [8.0], [20.0]])
    found = clusters.ward(lambda ids: x[ids], 6, 2, 0)

    def within(mask: Any) -> float:
        return sum(float(((x[m] - x[m].mean()) ** 2).sum()) for m in (mask, ~mask))

    every = [np.array([number >> bit & 1 for bit in range(6)], bool) for number in range(1, 63)]
    assert within(found == 1) == pytest.approx(min(within(mask) for mask in every))


def test_what_cannot_be_cut_is_told() -> None:
    with pytest.raises(ConfigError, match="5 samples are too few for 6 parts"):
        methods.random(5, [1] * 6, 0)
    with pytest.raises(ConfigError, match="has 2 different values, too few for 3 parts"):
        methods.groups(np.array([1, 1, 2, 2]), [1] * 3)
    with pytest.raises(ConfigError, match="not finite"):
        methods.ranges(np.array([1.0, np.nan, 2.0]), [1])
    with pytest.raises(ConfigError, match="1 of 2 clusters are empty"):
        clusters._nearest(lambda ids: np.zeros((len(ids), 1)), 5, np.array([[0.0], [9.0]]))
    with pytest.raises(ConfigError, match="features are not finite"):
        clusters.kmeans(lambda ids: np.full((len(ids), 1), np.inf), 5, 2, 0)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(Unavailable, match=r"clusters need scikit-learn\n.*harness\[clusters\]"):
        clusters.kmeans(lambda ids: np.zeros((len(ids), 1)), 5, 2, 0)


# --- files


def test_a_partition_is_read_back(tmp_path: Path) -> None:
    made = Partition(np.array([1, 0, 1, 2], np.int32), "groups", "user", 2**63, "train-*.h5")
    write(made, tmp_path / "parts.h5")
    found = read(tmp_path / "parts.h5")
    assert vars(found) == vars(made) | {"part": found.part} and found.part.tolist() == [1, 0, 1, 2]
    assert [ids.tolist() for ids in found.ids()] == [[1], [0, 2], [3]]
    with pytest.raises(UsageError, match="is there already"):
        write(made, tmp_path / "parts.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["parts.h5"]


def test_what_is_no_partition_is_told(tmp_path: Path, data: Hdf5Dataset) -> None:
    with pytest.raises(InputMissing, match=r"none\.h5: no such file"):
        read(tmp_path / "none.h5")
    with pytest.raises(DataError, match="is no partition"):
        read(tmp_path / "train-0.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(DataError, match="is no HDF5 file, or is damaged"):
        read(tmp_path / "text.h5")
    for number, part in enumerate([[0, 2], [-1, 0], [], [2**31 - 1]]):
        path = tmp_path / f"bad-{number}.h5"
        with h5py.File(path, "w") as file:
            file.attrs.update(format="harness-partition", version=1)
            file["part"] = np.array(part, np.int32)
        with pytest.raises(DataError, match=r"part 1 has no samples|no list of parts"):
            read(path)


def test_split_copies_every_sample_once(data: Hdf5Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "PIECE", 100)  # some samples at a time
    made = Partition(methods.random(90, [3, 2, 1], 5), "random")
    told: list[tuple[int, int]] = []
    split(data, made, tmp_path / "parts", lambda done, total: told.append((done, total)))
    assert told[-1] == (90 * 24, 90 * 24)
    copied = Hdf5Dataset("parts/part-*.h5", ["sample", "x", "user", "log/time"])
    rows, whole = copied.read(np.arange(90)), data.read(np.arange(90))
    assert sorted(rows["sample"].tolist()) == list(range(90))
    for name in ("x", "user", "log/time"):
        assert np.array_equal(rows[name], whole[name][rows["sample"]]) and rows[name].dtype == whole[name].dtype
    again = read(tmp_path / "parts" / "partition.h5")
    assert [rows["sample"][ids].tolist() for ids in again.ids()] == [ids.tolist() for ids in made.ids()]
    with pytest.raises(ConfigError, match=r"is of 4 samples, but the data set has 90"):
        split(data, Partition(np.array([0, 1, 0, 1], np.int32)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_interrupted_split_leaves_what_was_there(data: Hdf5Dataset, tmp_path: Path) -> None:
    made = Partition(methods.contiguous(90, [1, 1]), "contiguous")
    before = sorted(path.name for path in tmp_path.iterdir())

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(data, made, tmp_path / "parts", interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_killed_split_is_no_data_set(data: Hdf5Dataset, tmp_path: Path) -> None:
    """SIGKILL: a hidden directory remains, under no name that anything reads."""
    write(Partition(methods.contiguous(90, [1, 1])), tmp_path / "parts.h5")
    code = (
        "import os, signal, sys; from harness.partition import split; split.PIECE = 24 * 20\n"
        "bar = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if 2 * done > total else None\n"
        "from harness.hdf5data import Hdf5Dataset; from harness.partition.file import read; from pathlib import Path\n"
        "split.split(Hdf5Dataset('train-*.h5', ['x', 'user', 'log/time']), read(Path('parts.h5')), Path('out'), bar)"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "MPI4PY_RC_INITIALIZE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0].startswith(".out.") and left[1:] == ["parts.h5", "train-0.h5", "train-1.h5"]


# --- balance


def test_balance_counts_and_measures(data: Hdf5Dataset) -> None:
    made = Partition(methods.ranges(data.read(np.arange(90))["log/time"], [2, 1]))
    first, second = balance(made, data, "log/time")
    assert (first.samples, first.nbytes, first.least, first.greatest, first.values) == (60, 1440, 911, 970, 60)
    assert (second.least, second.mean, second.greatest) == (971, 985.5, 1000)
    assert second.spread == pytest.approx(np.std(np.arange(971, 1001)))
    by_cluster = Partition(clusters.ward(lambda ids: data.read(ids)["x"], 90, 3, 0))
    spreads = [part.spread for part in balance(by_cluster, data, "x")]
    x = data.read(np.arange(90))["x"]
    assert spreads == pytest.approx([np.sqrt(x[ids].var(0).sum()) for ids in by_cluster.ids()])
    assert balance(by_cluster, data, "x")[0].least is None
    assert [part.samples for part in balance(by_cluster, data)] == [30, 30, 30]


# --- the order of samples


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_each_part_goes_through_epochs_of_its_own(draw: st.DataObject) -> None:
    """On any number of ranks that divides the parts, and cut anywhere: the same samples in every step."""
    count = draw.draw(st.sampled_from([1, 2, 3, 4, 6]))
    sizes = draw.draw(st.lists(st.integers(1, 7), min_size=count, max_size=count))
    numbers = np.random.default_rng(draw.draw(st.integers(0, 99))).permutation(sum(sizes))
    parts = [np.sort(part) for part in np.split(numbers, np.cumsum(sizes)[:-1])]
    share, steps = draw.draw(st.integers(1, 4)), draw.draw(st.integers(1, 9))
    seed, block = draw.draw(st.integers(0, 2**63 - 1)), draw.draw(st.integers(1, 3))
    order = PartOrder(parts, batch=share * count, seed=seed, block=block)
    table = order.ids(0, steps * share * count).reshape(steps, count, share)
    for number, part in enumerate(parts):
        stream = table[:, number].ravel()
        for start in range(0, len(stream) - len(part) + 1, len(part)):
            assert sorted(stream[start : start + len(part)].tolist()) == part.tolist()
        assert max(Counter(stream.tolist()).values()) - min(Counter(stream.tolist()).get(i, 0) for i in part) <= 1
    cut = draw.draw(st.integers(0, table.size))
    assert np.array_equal(np.concatenate([order.ids(0, cut), order.ids(cut, table.size)]), table.ravel())


class Numbers:
    def __len__(self) -> int:
        return 24

    def batch(self, ids: Any, seeds: Any) -> Any:
        return ids


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_reads_its_parts_only(ranks: int) -> None:
    partition = Partition(methods.random(24, [1, 1, 2, 2], 7))
    check_partition(partition, "p.h5", samples=24, ranks=ranks)
    plan = plan_batch(global_batch=8, ranks=ranks, micro_batch=2)
    order = PartOrder(partition.ids(), batch=8, seed=3)
    for rank in range(ranks):
        stream = train_batches(Numbers(), order, plan, replica=rank, start_step=0, stop_step=12, seed=0)
        seen = {int(sample) for batch in stream for sample in batch.data}
        mine = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        assert seen == {int(sample) for part in mine for sample in partition.ids()[part]}


def test_what_does_not_fit_a_run_is_told() -> None:
    partition = Partition(methods.contiguous(24, [1] * 6), source="train.h5")
    with pytest.raises(ConfigError, match=r"6 parts, which 4 ranks cannot share evenly\n  use 3 or 6 ranks"):
        check_partition(partition, "p.h5", samples=24, ranks=4)
    with pytest.raises(ConfigError, match=r"of 24 samples, but the training data has 25\n  it was made for train.h5"):
        check_partition(partition, "p.h5", samples=25, ranks=3)
    with pytest.raises(ConfigError, match=r"64 does not divide by the 6 parts .*\n  use train.global_batch=60 or 66"):
        PartOrder(partition.ids(), batch=64, seed=0)


# --- the command


@pytest.mark.parametrize("by", ["random", "contiguous", "groups", "ranges", "kmeans", "ward"])
def test_the_command(by: str, data: Hdf5Dataset, capsys: Any) -> None:
    of = {"groups": "user", "ranges": "log/time", "kmeans": "x", "ward": "x"}.get(by)
    arguments = ["--of", of] if of else []
    code, out, err = ask(capsys, "partition", "train-*.h5", "-o", "parts.h5", "-p", 3, "--by", by, *arguments)
    assert (code, err) == (0, "") and "wrote parts.h5: 90 samples in 3 parts" in out
    assert "33.3%" in out and "720 B" in out and (of is None or f"{of}: spread" in out)
    assert read(Path("parts.h5")).sizes.tolist() == [30, 30, 30]
    code, out, _ = ask(capsys, "split", "train-*.h5", "parts.h5", "-o", "parts", "--json")
    assert code == 0 and json.loads(out)["samples"] == 90
    assert len(Hdf5Dataset("parts/part-*.h5", ["sample"])) == 90
    before = Path("parts.h5").read_bytes(), sorted(Path("parts").iterdir())
    assert ask(capsys, "partition", "train-*.h5", "-o", "parts.h5", "-p", 2)[0] == 64
    code, _, err = ask(capsys, "split", "train-*.h5", "parts.h5", "-o", "parts")
    assert (code, err) == (64, "error: parts is there already\n  choose another name, or remove it first\n")
    assert before == (Path("parts.h5").read_bytes(), sorted(Path("parts").iterdir()))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--by", "size"], "--by size is none of random, contiguous"),
        (["--by", "groups"], "--by groups needs --of FIELD"),
        (["--by", "groups", "--of", "x"], "--by groups needs one number per sample"),
        (["--of", "y"], "--of y: the data set has log/time, user, x"),
        (["--sizes", "1,2,3"], "--sizes 1,2,3 is no list of 2 positive numbers"),
        (["--sizes", "1,nan"], "--sizes 1,nan is no list"),
        (["--by", "kmeans", "--of", "x", "--sizes", "1,2"], "--sizes does not go with --by kmeans"),
    ],
)
def test_wrong_command_lines(arguments: list[str], told: str, data: Hdf5Dataset, capsys: Any) -> None:
    code, out, err = ask(capsys, "partition", "train-*.h5", "-o", "parts.h5", "-p", 2, *arguments)
    assert (code, out) == (64, "") and told in err and "Traceback" not in err
    assert not Path("parts.h5").exists()
    assert ask(capsys, "partition", "no.h5", "-o", "parts.h5", "-p", 2)[0] == 66


def test_the_command_starts_no_mpi(data: Hdf5Dataset, tmp_path: Path) -> None:
    code = (
        "import sys; from launch import cli; assert not cli.execute(sys.argv[1:])\n"
        "assert 'mpi4py.MPI' not in sys.modules or not sys.modules['mpi4py.MPI'].Is_initialized()"
    )
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", code, "data", "partition", "train-0.h5", "-o", "parts.h5", "-p", "2"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=True, timeout=120,
    )  # fmt: skip
    assert time.monotonic() - began < 120
