"""The process world: MPI and Horovod brought up in the right order, checked, and the few control collectives.

Order (DESIGN: a wrong order segfaults or hangs with some MPIs): environment, mpi4py with MPI_THREAD_MULTIPLE, GPU,
`hvd.init` with the process sets of the groups (`parallel/groups.py`). Under `horovodrun --gloo`, and for a single
process without a launcher, MPI is not touched at all.

What is not here: gradients (`update.py`).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checkpoint.comm import Comm, Horovod, Mpi, Single
from harness.config import Horovod as Settings
from harness.device import choose_device
from harness.env import Environment
from harness.errors import Unavailable
from harness.parallel.groups import SINGLE, Grid, Group, Groups, Ranks, Shards, arrange, groups_of
from harness.parallel.settings import Parallel
from harness.rundir import storage_errors

if TYPE_CHECKING:
    import numpy as np
    import torch

THREAD_MULTIPLE = "MPI_THREAD_MULTIPLE"
JOINING = "300"
"""Seconds that ranks of an elastic run wait within Horovod for one of those that they have met (`meeting.py`)."""


@dataclass(frozen=True)
class World:
    """All ranks of the run, seen from one of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    hosts: tuple[str, ...]
    """Host name of every rank."""
    device: torch.device
    comm: Comm
    """For control values and checkpoints; its own duplicate of COMM_WORLD, so no message meets Horovod's."""
    controller: str
    """What Horovod negotiates over: "mpi", "gloo", or "none" for a single process."""
    groups: Groups = SINGLE
    """Whom this rank works with on what."""
    servers: int = 0
    """The first so many ranks take no samples (`parallel/server.py`)."""

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    @property
    def replica(self) -> int:
        """The number of this rank's replica, which takes samples of its own; servers' numbers come after those."""
        return (self.groups.place.replica - self.servers) % len(self.groups.grid.cells)

    @property
    def replicas(self) -> int:
        """Replicas in all."""
        return len(self.groups.grid.cells) - self.servers

    def exchange(self, values: Sequence[float], name: str) -> np.ndarray:
        """Every rank's values as float64 [size, len(values)]. Collective; one Horovod operation."""
        import horovod.torch as hvd
        import torch

        mine = torch.tensor([list(values)], dtype=torch.float64)
        table = mine if self.size == 1 else hvd.allgather(mine, name=name)
        return table.numpy()

    def broadcast_tensors(
        self, tensors: Iterable[tuple[str, torch.Tensor]], name: str, group: Group | None = None, *, root: int = 0
    ) -> None:
        """The values of `root` to all, or of a group's first rank to it; in place, any dtype and layout. Collective.

        Bytes travel, not numbers, because Horovod knows no bool, bf16 or complex and only contiguous tensors.
        """
        if self.size == 1 or (group is not None and group.size == 1):
            return
        import horovod.torch as hvd
        import torch

        root, chosen = (root, hvd.global_process_set) if group is None else (group.root, group.process_set)
        with torch.no_grad():
            waiting = []
            for key, tensor in tensors:
                if tensor.numel() == 0:
                    continue
                flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
                handle = hvd.broadcast_async_(flat, root_rank=root, name=f"{name}/{key}", process_set=chosen)
                waiting.append((tensor, flat, handle))
            for tensor, flat, handle in waiting:
                hvd.synchronize(handle)
                tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))

    def average_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
        """The mean over all ranks, in place, of those tensors that are of a float type. Collective."""
        if self.size == 1:
            return
        import horovod.torch as hvd
        import torch

        with torch.no_grad():
            waiting = []
            for key, tensor in tensors:
                if tensor.numel() and tensor.is_floating_point():
                    mean = tensor.detach().double().contiguous()  # Horovod knows no bf16, and fp16 would overflow
                    waiting.append((tensor, hvd.allreduce_async_(mean, name=f"{name}/{key}", op=hvd.Average)))
            for tensor, handle in waiting:
                tensor.copy_(hvd.synchronize(handle))


def bring_up(
    environment: Environment,
    settings: Settings,
    directory: Path,
    *,
    parallel: Parallel = Parallel(),  # noqa: B008  # frozen
    limit: float = math.inf,
) -> World:
    """Join the other ranks. Collective. `parallel`: who works with whom. `limit`: see `horovod_environment`.

    Raises Unavailable, the same on all ranks, when they do not form one world."""
    os.environ.update(horovod_environment(settings, directory, limit=limit))
    if environment.elastic:
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", JOINING)
    if settings.timeline or settings.autotune:  # Horovod opens its files now, before the run directory is made
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
    alone = environment.launcher == "none"
    mpi = None
    if alone or environment.gloo:
        # h5py's parallel build would otherwise call MPI_Init on import, as a singleton beside the real ranks
        import mpi4py

        mpi4py.rc.initialize = False
        if alone:
            os.environ.update(HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
    else:
        mpi = _start_mpi(environment)

    local_rank, local_size = environment.local_rank or 0, environment.local_size or 1
    node: Comm = Single()
    comm: Comm = Single()
    if mpi is not None:
        comm = Mpi(mpi.COMM_WORLD)
        node = Mpi(mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED))
        local_rank, local_size = node.rank, node.size

    import horovod.torch as hvd

    device = choose_device(local_rank, local_size, node.all_gather)
    grid: Grid | None = None
    sets: list[Any] = []
    if mpi is not None and comm.size == environment.size:
        grid = _arrange(environment, comm, parallel)
        sets = [hvd.ProcessSet(list(ranks)) for ranks in grid.sets(parallel.optimizer_shards)]
    try:
        if mpi is not None:
            hvd.init(comm=mpi.COMM_WORLD, process_sets=sets)
        else:
            # without MPI nobody knows the hosts yet; sets that are added later cost a little in each of its cycles
            hvd.init(process_sets="dynamic" if parallel != Parallel() else None)
    except Exception as error:
        raise Unavailable(f"Horovod does not start: {error}", hint="`harness check` shows what works here") from error
    views = {"the environment": (environment.rank, environment.size)}
    if mpi is not None:
        views["MPI's COMM_WORLD"] = (mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size)
    views["Horovod"] = (hvd.rank(), hvd.size())
    check_views(views, environment.launcher)

    if mpi is None and environment.size > 1:
        comm = Horovod()
    if grid is None:
        grid = _arrange(environment, comm, parallel)
        sets = [hvd.add_process_set(list(ranks)) for ranks in grid.sets(parallel.optimizer_shards)]
    return World(
        rank=environment.rank,
        size=environment.size,
        local_rank=local_rank,
        local_size=local_size,
        hosts=grid.hosts,
        device=device,
        comm=comm,
        controller="none" if alone else "mpi" if mpi is not None else "gloo",
        groups=form_groups(grid, environment.rank, sets, parallel.optimizer_shards),
        servers=parallel.without_samples,
    )


def _arrange(environment: Environment, comm: Comm, parallel: Parallel) -> Grid:
    """Collective."""
    return arrange(
        [str(host) for host in comm.all_gather(environment.host)], model=parallel.model, pipeline=parallel.pipeline
    )


def form_groups(grid: Grid, rank: int, sets: Iterable[Any], spread: Shards = "none") -> Groups:
    """A rank's groups with the process sets that Horovod has made of `grid.sets(spread)`."""
    import horovod.torch as hvd

    known: dict[Ranks, Any] = {tuple(one.ranks): one for one in sets}
    return groups_of(grid, rank, {**known, tuple(range(len(grid.hosts))): hvd.global_process_set}, spread)


def check_views(views: dict[str, tuple[int, int]], launcher: str) -> None:
    """All must name the same (rank, size); otherwise ranks would train alone, or hang. Raises Unavailable."""
    if len(set(views.values())) > 1:
        told = ", ".join(f"{who} says rank {rank} of {size}" for who, (rank, size) in views.items())
        raise Unavailable(
            f"the ranks do not form one world ({launcher}): {told}",
            hint="the launcher and the MPI that mpi4py or Horovod was built with differ; `harness check` names both",
        )


def horovod_environment(settings: Settings, directory: Path, *, limit: float = math.inf) -> dict[str, str]:
    """Horovod's settings as its environment variables (horovod 0.28, docs/); unset fields are left alone. Pure.

    `limit`: seconds after which the watchdog takes a rank for hung. Horovod tells of a stall one to three times
    `stall_warn` after it has begun, and knows whole seconds only.

    Packing is off unless it is wished for. Gradients come in buckets, and which of them would share a buffer depends on
    timing: where a number lies in a buffer decides in which order more than two ranks add it.
    """
    stop = math.ceil(settings.stall_stop)
    # Horovod ignores a stop before the warning
    warn = min(60.0, limit / 4) if settings.stall_warn is None else settings.stall_warn
    warn = min(warn, stop or math.inf)
    variables: dict[str, object] = {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": max(1, math.floor(warn)) if warn else None,
        "HOROVOD_STALL_CHECK_DISABLE": None if warn else 1,
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": stop or None,
        "HOROVOD_FUSION_THRESHOLD": 0 if settings.fusion is None and not settings.autotune else settings.fusion,
        "HOROVOD_CYCLE_TIME": None if settings.cycle_time is None else settings.cycle_time * 1e3,
        "HOROVOD_CACHE_CAPACITY": settings.cache_capacity,
    }
    if settings.autotune:
        variables |= {"HOROVOD_AUTOTUNE": 1, "HOROVOD_AUTOTUNE_LOG": directory / "autotune.csv"}
    if settings.timeline:
        variables["HOROVOD_TIMELINE"] = directory / "timeline.json"
    return {
        key: f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in variables.items()
        if value is not None
    }


def _start_mpi(environment: Environment):  # type: ignore[no-untyped-def]
    """mpi4py's MPI module, initialised. Its type is untyped on purpose: mpi4py may be absent."""
    if "mpi4py.MPI" not in sys.modules:
        try:
            import mpi4py

            mpi4py.rc.thread_level = "multiple"
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise Unavailable(
                f"an MPI launcher ({environment.launcher}) started this process, but mpi4py does not load: {error}",
                hint="run launch/setup.sh, or load the MPI module that mpi4py was built with",
            ) from error
    else:
        from mpi4py import MPI
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise Unavailable(
            f"this MPI does not give {THREAD_MULTIPLE}, which Horovod's background thread needs",
            hint=f"{MPI.Get_library_version().splitlines()[0]}: use a build with thread support",
        )
    return MPI
