"""One rank of one form of training, looked at from outside: step by step times, memory, losses. Started by `forms.py`.

    mpirun -np 2 python tests/bench/one_form.py CONFIG WARM LATE TURNS

CONFIG is a run's config as JSON. It is built and trained as any run is; the loop is left before the last step, so that
nothing is saved. Rank 0 prints a line of JSON with what every rank has found (`Found`). Open MPI's monitoring counts
from step WARM on. LATE seconds are slept in every step of the last rank, or with TURNS = 1 in a quarter of the steps of
each rank.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.clock import Clock
from harness.config import Config
from harness.device import set_threads
from harness.env import identify

LATE_OF = 4
"""With TURNS, a rank is late in one of so many steps."""


@dataclass
class Found:
    """What one rank has found."""

    began: list[float] = field(default_factory=list)
    """When each step began, the one that was not taken, too; seconds."""
    told: list[float] = field(default_factory=list)
    """Bytes sent by then, as the run counts them."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each step on this rank; none on a server."""
    grown: float = 0.0
    """Bytes by which the process was larger at its peak than before the model was made."""
    held: float = 0.0
    """Bytes of all tensors of floats between backward pass and optimizer step."""
    speaks: bool = True
    """Whether it speaks for its replica, whose ranks all have the same losses."""


class Enough(Exception):
    """The steps that were asked for are taken."""


class Marks(Clock):
    """A clock that notes when steps begin, and ends the last one."""

    def __init__(self, warm: int, steps: int) -> None:
        super().__init__()
        self.warm, self.steps, self.found, self.counting = warm, steps, Found(), counting()
        self.counting.value = 0  # before the first parameters go to all ranks
        self.job: Any = None

    def begin(self, done: int) -> None:
        super().begin(done)
        self.found.began.append(time.perf_counter())
        self.found.told.append(self.job.sent)
        self.counting.value = self.warm <= done < self.steps
        if done == self.steps:
            raise Enough


def counting() -> ctypes.c_int:
    """The switch of Open MPI's monitoring, which counts from MPI_Init on."""
    places = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libmca_common_mon" in line
    }
    if not places:
        sys.exit("this MPI does not count messages: forms.py needs Open MPI 4 with its component pml_monitoring")
    return ctypes.c_int.in_dll(ctypes.CDLL(places.pop()), "mca_common_monitoring_current_state")


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[key].split()[0]) * 1024


def held() -> float:
    """Bytes of all tensors of floats that Python knows, each memory once: parameters, gradients, state, buffers."""
    import torch

    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.is_meta]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return float(sum(stores.values()))


def watch(job: Any, marks: Marks, late: Iterator[float]) -> None:
    """Note losses of all steps, and memory in the last one; sleep where this rank is late."""
    passes, step = job.spread.passes, job.update.step

    def noted(*arguments: Any) -> Any:
        losses = passes(*arguments)
        if losses:
            marks.found.losses.append(float(sum(losses[1:], losses[0])) / len(losses))
            time.sleep(next(late))
        return losses

    def measured() -> Any:
        if job.clock.step == marks.steps:
            marks.found.held = held()
        return step()

    object.__setattr__(job.spread, "passes", noted)
    job.update.step = measured


def delays(seconds: float, turns: bool, rank: int, last: bool) -> Iterator[float]:
    draw = np.random.default_rng(rank)
    while True:
        if turns:
            yield seconds * (draw.random() * LATE_OF < 1)
        else:
            yield seconds * last


def main() -> None:
    config = Config.model_validate_json(sys.argv[1])
    warm, late, turns = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "1"
    assert config.train.steps is not None
    set_threads(1, 1)
    from harness.job import build
    from harness.loop import train
    from harness.rundir import RunDir, open_run
    from harness.world import bring_up

    world = bring_up(identify(), config.horovod, Path(config.directory), parallel=config.parallel)
    number = open_run(config).new_attempt().number if world.is_root else None
    marks = Marks(warm, config.train.steps - 1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    floor = resident("VmRSS")
    job = build(config, RunDir(Path(config.directory)), int(str(world.comm.broadcast(number))), world, marks)
    marks.job = job
    watch(job, marks, delays(late, turns, world.rank, world.rank == world.size - 1))
    try:
        train(job)
    except Enough:
        marks.found.grown = resident("VmHWM") - floor
    marks.found.speaks = world.groups.speaks
    table = world.comm.all_gather(asdict(marks.found))
    job.abandon()
    job.sinks.close()
    if world.is_root:
        print(json.dumps(table))
    world.comm.barrier()
    sys.stdout.flush()

    import horovod.torch as hvd
    from mpi4py import MPI

    hvd.shutdown()
    marks.counting.value = 1
    MPI.Finalize()  # writes what was counted
    os._exit(0)


if __name__ == "__main__":
    main()
