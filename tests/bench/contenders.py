"""What users pick today instead of our checkpoints: how each saves a `Workload` durably and brings it back.

    for one in contenders(comm): one.save(folder, workload); one.restore(folder, workload)

As their own documentation shows them, with what makes the result durable added where they leave it out: all get their
files and folders synced. Where ranks hold parts, a contender that writes on rank 0 gathers them there, within its time.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from mpi4py import MPI
from workloads import Workload

from harness.checkpoint.commit import sync_directory

world = MPI.COMM_WORLD
Save = Callable[[Path, Workload], "float | None"]
"""Collective. Returns once all is durable; seconds for which training stood still, None: all the time."""
Restore = Callable[[Path, Workload], None]
"""Collective. Into the live tensors."""


@dataclass(frozen=True)
class Way:
    """`restores`: ways to bring it back, by name; the first one is what its documentation shows."""

    name: str
    save: Save
    restores: dict[str, Restore]


@dataclass(frozen=True)
class Absent:
    name: str
    why: str


def ways() -> list[Way | Absent]:
    """All of them, and those that cannot be tried here."""
    found: list[Way | Absent] = [
        Way(
            "rank-0 torch.save", torch_save, {"torch.load by each rank": torch_load, "rank 0 + broadcast": torch_bcast}
        ),
        _safetensors(),
        *_distributed(),
        _torchsnapshot(),
        Way("serial h5py on rank 0", h5py_save, {"h5py by each rank": h5py_load}),
    ]
    if h5py.get_config().mpi:
        found.append(Way("h5py mpio, a data set per tensor", mpio_save, {"h5py by each rank": h5py_load}))
    else:
        found.append(Absent("h5py mpio, a data set per tensor", "this h5py was built without MPI"))
    return found


# All tensors in one place


def gathered(workload: Workload) -> dict[str, torch.Tensor]:
    """Everything, on rank 0; nothing on the others."""
    everything = dict(workload.whole) if world.rank == 0 else {}
    for name, part in workload.parts.items():
        counts = [
            part.length * (rank + 1) // world.size - part.length * rank // world.size for rank in range(world.size)
        ]
        target = np.empty(part.length, np.float32) if world.rank == 0 else None
        world.Gatherv(part.tensor.numpy(), None if target is None else (target, counts))
        if target is not None:
            everything[name] = torch.from_numpy(target)
    return everything


def take(workload: Workload, name: str, value: torch.Tensor) -> None:
    """Copy a whole tensor into the live one, or this rank's part of it."""
    if name in workload.whole:
        workload.whole[name].copy_(value)
    else:
        part = workload.parts[name]
        part.tensor.copy_(value[part.lo : part.hi])


def sync(folder: Path) -> None:
    """fsync of all files and folders below, on rank 0, for those who leave it out."""
    world.Barrier()
    if world.rank == 0:
        for path in [*folder.rglob("*"), folder]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    world.Barrier()


# Horovod's own advice: rank 0 saves


def torch_save(folder: Path, workload: Workload) -> None:
    tensors = gathered(workload)
    if world.rank == 0:
        with open(folder / "state.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(folder)
    world.Barrier()


def torch_load(folder: Path, workload: Workload) -> None:
    for name, value in torch.load(folder / "state.pt", weights_only=True).items():
        take(workload, name, value)


def torch_bcast(folder: Path, workload: Workload) -> None:
    loaded = torch.load(folder / "state.pt", weights_only=True) if world.rank == 0 else {}
    for name in [*workload.whole, *workload.parts]:
        if world.rank == 0:
            value = loaded[name]
        elif name in workload.whole:
            value = workload.whole[name]
        else:
            value = torch.empty(workload.parts[name].length)
        world.Bcast(value.reshape(-1).numpy())
        if world.rank == 0 or name in workload.parts:
            take(workload, name, value)


# safetensors


def _safetensors() -> Way | Absent:
    name = "rank-0 safetensors"
    try:
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        return Absent(name, str(error))

    def save(folder: Path, workload: Workload) -> None:
        tensors = gathered(workload)
        if world.rank == 0:
            save_file(tensors, folder / "state.safetensors")
        sync(folder)

    def restore(folder: Path, workload: Workload) -> None:
        for key, value in load_file(folder / "state.safetensors").items():
            take(workload, key, value)

    return Way(name, save, {"safetensors by each rank": restore})


# torch.distributed.checkpoint


def _distributed() -> Iterator[Way | Absent]:
    names = ("DCP", "DCP, 4 threads", "DCP async")
    try:
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        address = world.bcast(f"tcp://127.0.0.1:{_free_port()}" if world.rank == 0 else None)
        dist.init_process_group("gloo", init_method=address, rank=world.rank, world_size=world.size)
    except (ImportError, RuntimeError) as error:
        yield from (Absent(name, str(error)) for name in names)
        return

    def state(workload: Workload) -> dict[str, torch.Tensor]:
        """Parts under names that only this rank has, so that each is saved."""
        return workload.whole | {f"{name}.rank{world.rank}": part.tensor for name, part in workload.parts.items()}

    def saver(threads: int) -> Save:
        def save(folder: Path, workload: Workload) -> None:
            writer = dcp.FileSystemWriter(folder / "dcp", thread_count=threads)
            dcp.save(state(workload), storage_writer=writer)
            if world.rank == 0:
                sync_directory(folder / "dcp")
            world.Barrier()

        return save

    def save_async(folder: Path, workload: Workload) -> float:
        began = time.perf_counter()
        future: Any = dcp.async_save(state(workload), storage_writer=dcp.FileSystemWriter(folder / "dcp"))
        held = time.perf_counter() - began
        future.result()
        if world.rank == 0:
            sync_directory(folder / "dcp")
        world.Barrier()
        return held

    def restore(folder: Path, workload: Workload) -> None:
        dcp.load(state(workload), storage_reader=dcp.FileSystemReader(folder / "dcp"))

    yield Way(names[0], saver(1), {"DCP load": restore})
    yield Way(names[1], saver(4), {})
    yield Way(names[2], save_async, {})


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# torchsnapshot


def _torchsnapshot() -> Way | Absent:
    name = "torchsnapshot"
    try:
        from torchsnapshot import Snapshot, StateDict
    except Exception as error:  # it is old: whatever breaks its import is the reason
        return Absent(name, f"{type(error).__name__}: {error}")

    def state(workload: Workload) -> dict[str, Any]:
        """Its keys become parts of paths, and parts are each rank's own."""
        own = {key: part.tensor for key, part in workload.parts.items()}
        return {"whole": StateDict(**workload.whole)} | ({"own": StateDict(**own)} if own else {})

    def save(folder: Path, workload: Workload) -> None:
        Snapshot.take(str(folder / "snapshot"), state(workload), replicated=["whole/**"])
        sync(folder)

    def restore(folder: Path, workload: Workload) -> None:
        Snapshot(str(folder / "snapshot")).restore(state(workload))

    return Way(name, save, {"torchsnapshot": restore})


# h5py


def h5py_save(folder: Path, workload: Workload) -> None:
    tensors = gathered(workload)
    if world.rank == 0:
        with h5py.File(folder / "state.h5", "w") as file:
            for name, tensor in tensors.items():
                file.create_dataset(name, data=tensor.numpy())
    sync(folder)


def mpio_save(folder: Path, workload: Workload) -> None:
    """Each rank writes its rows of each data set, as in h5py's documentation of parallel HDF5."""
    with h5py.File(folder / "state.h5", "w", driver="mpio", comm=world) as file:
        for name, tensor in workload.whole.items():
            flat = tensor.reshape(-1).numpy()
            dataset = file.create_dataset(name, flat.shape, flat.dtype)
            lo, hi = (len(flat) * at // world.size for at in (world.rank, world.rank + 1))
            if hi > lo:
                dataset[lo:hi] = flat[lo:hi]
        for name, part in workload.parts.items():
            dataset = file.create_dataset(name, (part.length,), np.float32)
            if part.hi > part.lo:
                dataset[part.lo : part.hi] = part.tensor.numpy()
    sync(folder)


def h5py_load(folder: Path, workload: Workload) -> None:
    with h5py.File(folder / "state.h5", "r") as file:
        for name, tensor in workload.whole.items():
            target = tensor.numpy()
            source = file[name]
            if target.ndim == source.ndim:
                source.read_direct(target)
            else:  # written flat, by mpio
                source.read_direct(target.reshape(-1))
        for name, part in workload.parts.items():
            if part.hi > part.lo:
                file[name].read_direct(part.tensor.numpy(), np.s_[part.lo : part.hi])
