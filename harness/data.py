"""Batches: from a data set and an order to what one replica trains and evaluates on, with or without loader processes.

A data set is any torch map-style data set (`__len__` and `__getitem__`; samples are joined by torch's default_collate).
If it also has a method

    batch(ids, seeds)       # ids int64 (n,), seeds uint64 (n,) -> the whole batch, of any nesting of tensors

that is called instead, once per batch: for arrays, files read in blocks, and draws that must be the same on any number
of ranks (see `order.uniform`). Samples that come from `__getitem__` may use the global generators of torch, numpy and
random: they are seeded for each sample, and the training process's own state is left as it was.

What is not here: the order (`order.py`), the arithmetic of batches (`batch.py`). Nothing here is collective.

    for batch in train_batches(dataset, order, plan, replica=0, start_step=0, stop_step=100, seed=0):
        loss = task.loss(model, to_device(batch.data, device))
"""

from __future__ import annotations

import copy
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from harness.batch import BatchPlan
from harness.errors import ConfigError, Unavailable
from harness.order import Ids, Order, Seeds, sample_seeds
from harness.stop import SIGNALS

if TYPE_CHECKING:
    from harness.partition.order import PartOrder


@dataclass(frozen=True)
class Batch:
    """One micro batch: `data` for the task, and which samples of the data set it holds.

    `first` is the position of its first sample in the stream of epochs (training) or in the data set (evaluation).
    """

    data: Any
    samples: int
    first: int
    ids: Ids

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader: the copy in page-locked memory, from which transfers to a GPU overlap."""
        return replace(self, data=pin_memory(self.data))  # type: ignore[no-untyped-call]


def train_batches(
    dataset: Any,
    order: Order | PartOrder,
    plan: BatchPlan,
    *,
    replica: int,
    start_step: int,
    stop_step: int,
    seed: int,
    workers: int = 0,
    prefetch: int = 2,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """`plan.passes` micro batches for each step in [start_step, stop_step), in order.

    Step s covers positions [s * global_batch, (s + 1) * global_batch) of the order; each replica takes its own of
    `plan.replicas` contiguous parts. Batches do not depend on `workers`. Closing the iterator ends the workers.
    An exception of the data set is raised as it is; ConfigError when the data set cannot be sent to workers.
    """

    def requests() -> Iterator[_Request]:
        for step in range(start_step, stop_step):
            begin = step * plan.global_batch
            for first, stop in ((begin + lo, begin + hi) for lo, hi in plan.cuts(replica)):
                yield _Request(first, order.ids(first, stop), sample_seeds(seed, first, stop))

    return _batches(_loader(dataset, requests(), workers, prefetch, pin))


class EvalBatches:
    """This replica's contiguous part of the data set, in batches of `batch` samples; the last one may be smaller.

    Over all replicas every sample comes exactly once. One gets nothing when there are more replicas than samples. Every
    iteration gives the same; workers start with the first one and live until `close`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        replica: int,
        replicas: int,
        batch: int,
        seed: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        begin, end = (len(dataset) * part // replicas for part in (replica, replica + 1))
        self._loader: Any = _loader(
            dataset, _EvalRequests(begin, end, batch, seed), workers, prefetch, pin, persistent=workers > 0
        )

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self._loader)

    def close(self) -> None:
        """End the workers."""
        self._loader = None


@dataclass(frozen=True)
class _EvalRequests:
    begin: int
    end: int
    batch: int
    seed: int

    def __iter__(self) -> Iterator[_Request]:
        for first in range(self.begin, self.end, self.batch):
            stop = min(first + self.batch, self.end)
            yield _Request(first, np.arange(first, stop, dtype=np.int64), sample_seeds(self.seed, first, stop))


def check_dataset(dataset: Any, split: str, global_batch: int) -> int:
    """The number of samples. Raises ConfigError for what cannot be trained or evaluated on.

    An evaluation may be on fewer samples than the global batch; training may not.
    """
    what = f"the task's data({split!r})"
    if dataset is None:
        raise ConfigError(f"{what} is None", hint="return a data set with __len__ and __getitem__")
    if not hasattr(dataset, "__len__") or not (hasattr(dataset, "__getitem__") or hasattr(dataset, "batch")):
        raise ConfigError(
            f"{what} is a {type(dataset).__name__}, which has no length or cannot be indexed",
            hint="the order and the resume point are those of a data set with __len__ and __getitem__",
        )
    samples = len(dataset)
    if samples == 0:
        raise ConfigError(f"{what} is empty", hint="check the paths and arguments under task.args")
    if split == "train" and samples < global_batch:
        raise ConfigError(
            f"{what} has {samples} samples, fewer than train.global_batch {global_batch}",
            hint=f"use train.global_batch={samples} at most, or more data",
        )
    return samples


def to_device(data: Any, device: torch.device) -> Any:
    """The same nesting of tuples, lists and dicts with all tensors on `device`; anything else as it is."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return {key: to_device(value, device) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(value, device) for value in data))
    if isinstance(data, (tuple, list)):
        return type(data)(to_device(value, device) for value in data)
    return data


def start_forkserver() -> None:
    """Start the process that loader workers are forked from. Call it before MPI is initialised.

    Forking a process that uses MPI or a GPU can crash or hang (horovod/horovod#2898); this one never does: it begins as
    a fresh interpreter, has torch imported so that workers start quickly, and mpi4py in it does not initialise MPI. It
    and its children ignore the signals that ask a run to stop, which mpirun and srun send to a rank's process group.
    """
    multiprocessing.set_forkserver_preload(["numpy", "torch", "torch.utils.data"])
    quiet = {"MPI4PY_RC_INITIALIZE": "0", "MPI4PY_RC_FINALIZE": "0"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _Request:
    first: int
    ids: Ids
    seeds: Seeds


@dataclass(frozen=True)
class _Failure:
    """An exception of the data set, on its way from a worker to the training process."""

    error: Exception
    trace: str


class _WorkerTraceback(Exception):
    """The cause of an exception that a worker raised: its traceback there, as text."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class _Fetch(Dataset[Any]):
    """Makes one batch; lives in the training process or in a worker."""

    def __init__(self, dataset: Any, in_worker: bool) -> None:
        self.dataset = dataset
        self.in_worker = in_worker

    def __getitem__(self, request: _Request) -> Batch | _Failure:
        try:
            if hasattr(self.dataset, "batch"):
                data = self.dataset.batch(request.ids, request.seeds)
            else:
                data = _one_by_one(self.dataset, request)
        except Exception as error:
            if not self.in_worker:
                raise
            return _Failure(_sendable(error), traceback.format_exc())
        return Batch(data, len(request.ids), request.first, request.ids)


def _one_by_one(dataset: Any, request: _Request) -> Any:
    samples = []
    with _random_state_kept():
        for index, seed in zip(request.ids.tolist(), request.seeds.tolist(), strict=True):
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.default_generator.manual_seed(seed)
            samples.append(dataset[index])
    return default_collate(samples)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _sendable(error: Exception) -> Exception:
    try:
        copy.copy(error)  # fails, as the queue would at the other end, when its constructor takes other arguments
        pickle.dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _loader(
    dataset: Any, requests: Iterable[_Request], workers: int, prefetch: int, pin: bool, persistent: bool = False
) -> DataLoader[Any]:
    return DataLoader(
        _Fetch(dataset, in_worker=workers > 0),
        batch_size=None,  # a request is a whole batch
        sampler=requests,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),  # else the loader draws from torch's global generator
        persistent_workers=persistent,
        worker_init_fn=_ignore_stop_signals if workers else None,
    )


def _batches(loader: DataLoader[Any]) -> Generator[Batch, None, None]:
    try:
        batches = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the data set cannot be sent to loader processes: {error}",
            hint="use data.workers=0, or open files and make lambdas only when the first sample is read",
        ) from error
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if loader.num_workers == 0:
                    raise
                # the data set's own errors come as a _Failure: this is about the process or the pipe to it
                raise Unavailable(
                    f"a loader process ended: {error or type(error).__name__}",
                    hint="it was killed, perhaps for memory, or could not import the task; what it said is above."
                    " data.workers=0 loads in the training process",
                ) from error
            if isinstance(batch, _Failure):
                raise batch.error from _WorkerTraceback(batch.trace)
            yield batch
    finally:
        del batches  # the loader's iterator ends and joins its workers when it goes


def _ignore_stop_signals(worker: int) -> None:
    for number in SIGNALS:  # torch has given SIGTERM back its effect
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
