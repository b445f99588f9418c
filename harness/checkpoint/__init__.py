"""Checkpoints: global tensors in one ordinary HDF5 file, written by all ranks, readable without any of them.

    from harness.checkpoint import Manager, State, keep_last, latest, open_checkpoint

    manager = Manager("runs/exp7/checkpoints", keep=keep_last(3))
    state = State(model=model, optimizer=optimizer, extra={"epoch": 0})
    step = manager.restore(state) or 0          # newest good one, written by any number of ranks
    manager.save(step, state)

Importing this needs neither torch, nor MPI, nor Horovod, nor h5py.

A checkpoint is a directory with two files. `manifest.json` says what is where (`manifest`); `data.h5` is an HDF5 file
with every tensor as a contiguous dataset under its name, and can be read by anything that reads HDF5. To read it
without HDF5: take a leaf's `offset`, `shape` and `dtype` (little-endian, row-major; `schema`) from the manifest; the
bytes are there. A leaf's `placement` tells who held it when it was saved (`schema.Placement`): all ranks, rank 0, all
ranks in parts, or each its own. The file is the same for all of them; only what is per rank has a row for each rank.
Digests: `digest`; the order of things in the file: `layout`; how it is committed: `commit`.
"""

from __future__ import annotations

from harness.checkpoint.agree import SaveFailed
from harness.checkpoint.comm import Comm, Horovod, Mpi, Single, detect
from harness.checkpoint.manager import Manager
from harness.checkpoint.partial import Partial
from harness.checkpoint.policy import (
    Keep,
    When,
    at_end,
    every,
    keep_all,
    keep_best,
    keep_every,
    keep_last,
    on_stop,
)
from harness.checkpoint.reader import Checkpoint, open_checkpoint
from harness.checkpoint.rng import Rng
from harness.checkpoint.shards import Box, Flat, PerRank, Shard
from harness.checkpoint.state import State
from harness.checkpoint.store import Damaged, latest

__all__ = [
    "Box",
    "Checkpoint",
    "Comm",
    "Damaged",
    "Flat",
    "Horovod",
    "Keep",
    "Manager",
    "Mpi",
    "Partial",
    "PerRank",
    "Rng",
    "SaveFailed",
    "Shard",
    "Single",
    "State",
    "When",
    "at_end",
    "detect",
    "every",
    "keep_all",
    "keep_best",
    "keep_every",
    "keep_last",
    "latest",
    "on_stop",
    "open_checkpoint",
]
