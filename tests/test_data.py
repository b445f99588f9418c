"""Batches: the same with any number of loader processes, exact over ranks, clean in the end, told in sentences."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import needs_mpirun, ranks
from torch.utils.data import IterableDataset, TensorDataset

from harness.batch import BatchPlan, plan_batch
from harness.data import EvalBatches, check_dataset, start_forkserver, to_device, train_batches
from harness.errors import ConfigError, DataError, Unavailable
from harness.order import Order
from harness.stop import SIGNALS


@pytest.fixture(scope="module", autouse=True)
def _forkserver() -> None:
    start_forkserver()


class Noisy:
    """One sample at a time, with all three global generators, as torchvision's transforms use them."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "noise": torch.rand(2), "numpy": np.random.rand(), "python": random.random()}


class Whole:
    """Whole batches from ids and seeds."""

    def __len__(self) -> int:
        return 20

    def batch(self, ids: np.ndarray, seeds: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(ids), torch.from_numpy(seeds % np.uint64(1000))


class Failing(Whole):
    """Fails at sample 7 in one of several ways."""

    def __init__(self, error: str) -> None:
        self.error = error

    def batch(self, ids: np.ndarray, seeds: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if 7 in ids:
            if self.error == "sentence":
                raise DataError("sample 7 is damaged", hint="copy it again")
            if self.error == "odd":
                raise Odd(1, lock=object())
            if self.error == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("seven")
        return super().batch(ids, seeds)


class Signalled(Whole):
    """Each batch, this worker and the process it was forked from get every signal that asks a run to stop."""

    def batch(self, ids: np.ndarray, seeds: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        for process in (os.getpid(), os.getppid()):
            for number in SIGNALS:
                os.kill(process, number)
        return super().batch(ids, seeds)


class Odd(Exception):
    """Cannot be made again from its `args`, as pickle does."""

    def __init__(self, number: int, *, lock: object) -> None:
        super().__init__(f"odd {number}")
        self.lock = lock


def load(
    dataset: Any, *, workers: int = 0, start: int = 0, stop: int = 6, rank: int = 0, plan: BatchPlan | None = None
) -> Any:
    plan = plan or plan_batch(global_batch=8, ranks=1, micro_batch=4)
    order = Order(len(dataset), seed=3)
    return train_batches(
        dataset, order, plan, replica=rank, start_step=start, stop_step=stop, seed=3, workers=workers, prefetch=2
    )


def flat(data: Any) -> list[Any]:
    if isinstance(data, dict):
        return [number for value in data.values() for number in flat(value)]
    if isinstance(data, (tuple, list)):
        return [number for value in data for number in flat(value)]
    return data.flatten().tolist()


def contents(batches: Iterator[Any]) -> list[Any]:
    return [(batch.first, batch.samples, batch.ids.tolist(), flat(batch.data)) for batch in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("dataset", [Noisy(), Whole()], ids=["samples", "batches"])
def test_batches_do_not_depend_on_workers(dataset: Any) -> None:
    alone = contents(load(dataset))
    assert len(alone) == 12
    assert all(samples == 4 for _, samples, _, _ in alone)
    for workers in (1, 3):
        assert contents(load(dataset, workers=workers)) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_a_step_gives_what_would_have_come(workers: int) -> None:
    assert contents(load(Noisy(), start=3, workers=workers)) == contents(load(Noisy()))[6:]


def test_samples_of_a_sample_do_not_depend_on_ranks() -> None:
    """Augmentation drawn from the global generators follows the position, not the rank or the batch."""
    one = [flat(batch.data) for batch in load(Noisy(), stop=1, plan=plan_batch(global_batch=8, ranks=1, micro_batch=1))]
    two = [
        flat(batch.data)
        for rank in range(2)
        for batch in load(Noisy(), stop=1, rank=rank, plan=plan_batch(global_batch=8, ranks=2, micro_batch=1))
    ]
    assert one == two
    assert len({str(sample) for sample in one}) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_alone(workers: int) -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(load(Noisy(), workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_set_comes_as_it_is(workers: int) -> None:
    with pytest.raises(DataError) as sentence:
        list(load(Failing("sentence"), workers=workers))
    assert str(sentence.value) == "sample 7 is damaged\n  copy it again"
    with pytest.raises(KeyError, match="seven") as plain:
        list(load(Failing("key"), workers=workers))
    if workers:
        assert "in batch" in str(plain.value.__cause__), "the worker's traceback is told"


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    with pytest.raises(Odd):
        list(load(Failing("odd")))
    with pytest.raises(RuntimeError, match="Odd: odd 1"):
        list(load(Failing("odd"), workers=1))


def test_a_killed_worker_is_told() -> None:
    with pytest.raises(Unavailable, match="a loader process ended"):
        list(load(Failing("killed"), workers=1))


def test_a_signal_to_the_whole_process_group_leaves_the_workers() -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    for _ in range(2):
        assert contents(load(Signalled(), workers=1)) == contents(load(Whole()))
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_what_cannot_be_sent_is_told() -> None:
    class Local(Whole):
        pass

    with pytest.raises(ConfigError, match="cannot be sent to loader processes"):
        list(load(Local(), workers=1))


@pytest.mark.parametrize("how", ["exhausted", "closed", "failed"])
def test_workers_end_with_the_iterator(how: str) -> None:
    batches = load(Failing("key") if how == "failed" else Whole(), workers=2)
    next(batches)
    started = multiprocessing.active_children()
    assert len(started) == 2
    if how == "closed":
        batches.close()
    elif how == "failed":
        with pytest.raises(KeyError):
            list(batches)
    else:
        list(batches)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
    assert all(not Path(f"/proc/{process.pid}").exists() for process in started)


@given(samples=st.integers(1, 40), size=st.integers(1, 6), batch=st.integers(1, 9))
def test_evaluation_takes_each_sample_once(samples: int, size: int, batch: int) -> None:
    dataset = TensorDataset(torch.arange(samples))
    parts = [list(EvalBatches(dataset, replica=rank, replicas=size, batch=batch)) for rank in range(size)]
    ids = [number for part in parts for found in part for number in found.ids.tolist()]
    assert ids == list(range(samples)) == [n for part in parts for found in part for n in found.data[0].tolist()]
    assert all(found.samples <= batch for part in parts for found in part)
    lengths = [sum(found.samples for found in part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_evaluation_draws_the_same_each_time() -> None:
    first = contents(EvalBatches(Noisy(), replica=0, replicas=1, batch=5))
    assert contents(EvalBatches(Noisy(), replica=0, replicas=1, batch=5, workers=2)) == first


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        (None, r"data\('train'\) is None"),
        (Endless(), "has no length or cannot be indexed"),
        (iter([1, 2]), "list_iterator, which has no length"),
        ([], "is empty"),
        ([1, 2, 3], "has 3 samples, fewer than train.global_batch 8"),
    ],
)
def test_data_sets_that_cannot_be_trained_on(dataset: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_dataset(dataset, "train", 8)


def test_data_sets_that_can() -> None:
    assert check_dataset(Whole(), "train", 20) == 20
    assert check_dataset([1, 2, 3], "eval", 8) == 3, "an evaluation may be small"


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_to_device_keeps_the_nesting() -> None:
    data = {"a": [torch.zeros(1), (torch.ones(2), "name")], "b": Point(torch.zeros(1), torch.ones(1)), "c": 3}
    moved = to_device(data, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == moved["b"].y.device.type == "meta"
    assert isinstance(moved["b"], Point)
    assert (moved["a"][1][1], moved["c"]) == ("name", 3)


class Where(Whole):
    """Tells what the process that loads is like."""

    def batch(self, ids: np.ndarray, seeds: np.ndarray) -> Any:
        import mpi4py.MPI

        return torch.tensor([os.getpid(), os.getppid(), int(mpi4py.MPI.Is_initialized())])


def test_workers_do_not_initialise_mpi() -> None:
    """Not even when the user's data set imports mpi4py: a second MPI_Init under one rank's environment can hang."""
    for batch in load(Where(), workers=2, stop=2):
        process, parent, initialised = batch.data.tolist()
        assert process != os.getpid() != parent, "forked from the fork server, not from this process"
        assert not initialised
    assert "MPI4PY_RC_INITIALIZE" not in os.environ


@needs_mpirun
@pytest.mark.mpi
def test_workers_under_mpi() -> None:
    """Ranks that use MPI load with workers, and all see each sample of the stream once."""
    done = ranks(2, [str(Path(__file__).with_name("load_under_mpi.py"))], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: all 48 samples, loaded by 4 other processes" in done.stdout
