"""Ranks that come and go while a run trains: Horovod's elastic mode, `horovodrun --gloo --min-np ... --max-np ...`.

horovodrun drops a worker that dies, with its host, and starts new ones where its discovery script shows room. Whenever
the ranks change, those that go on leave Horovod and join it again with the new ones, in the same process; then every
rank builds its job for the new number of ranks, as at a start, and takes the state from the memory of the rank that
remembers the latest step. Each rank remembers the state every `log.every` steps. Nothing is read from disk.

    survive(train, clock)    # train(elastic) is called again and again, until it returns

Ranks meet before they join Horovod (`meeting.py`). A world that nobody survives is started again from its newest
checkpoint by `harness run`, like any other.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import NoReturn

import horovod.torch as hvd
import torch
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError

from harness.checkpoint.comm import Horovod
from harness.checkpoint.memory import Memory, empty, outline, recall, remember
from harness.checkpoint.state import State
from harness.clock import Clock
from harness.heartbeat import WAITING
from harness.meeting import meet
from harness.world import World

IN_VAIN = 3
"""Failures in a row, without a step that was remembered in between, after which a rank gives up."""


class HostsChanged(Exception):
    """The launcher has room for more ranks, or takes some away. The state is remembered."""


RANKS_CHANGED = (HostsChanged, HorovodInternalError)
"""What a rank survives: a change that was announced, and a collective that failed because another rank is gone."""


class Elastic:
    """What outlives a change of the ranks, in one process: the state in memory, and what the launcher announces."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.announced = False
        """On rank 0: the launcher has other hosts now."""

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Called by Horovod in a thread of its own, on the rank that was 0 when it last looked."""
        self.announced = True

    def survives(self, error: BaseException) -> bool:
        return isinstance(error, RANKS_CHANGED)

    def remember(self, state: State, step: int) -> None:
        """Keep a copy of the state as it is now."""
        self.memory = remember(state, step, self.memory)

    def change(self, step: int) -> NoReturn:
        """Leave this world for the next one, on all ranks after the same step."""
        raise HostsChanged(f"other ranks take part from step {step} on")

    def recall(self, state: State, world: World) -> tuple[int, int] | None:
        """Bring the state to the latest step that any rank remembers: (step, rank); None where none does. Collective.

        All ranks take that rank's, also those that remember the same step: what differs between ranks (the statistics
        of batch normalization) is then the same, as after a restart.
        """
        steps = [int(str(told)) for told in world.comm.all_gather(-1 if self.memory is None else self.memory.step)]
        latest = max(steps)
        if latest < 0:
            return None
        rank = steps.index(latest)
        mine = outline(self.memory) if self.memory is not None and world.rank == rank else None
        text = str(world.comm.all_gather(mine)[rank])
        if self.memory is None or world.rank != rank:
            self.memory = empty(text)
        tensors = ((name, torch.from_numpy(data)) for name, data in self.memory.leaves.items())
        world.broadcast_tensors(tensors, "elastic", root=rank)
        recall(state, self.memory)
        return latest, rank


def survive(train: Callable[[Elastic], None], clock: Clock) -> None:
    """Call `train` until it returns; in between the clock's section is WAITING.

    Raises what `train` raises, but for `RANKS_CHANGED`, and what `meet` raises.
    """
    elastic = Elastic()
    notification_manager.init()
    notification_manager.register_listener(elastic)
    vain, remembered = 0, -1
    section, clock.section = clock.section, WAITING
    meet()
    clock.section = section
    while True:
        try:
            train(elastic)
            return
        except HostsChanged:
            why = "the hosts have changed"
        except HorovodInternalError:
            step = -1 if elastic.memory is None else elastic.memory.step
            vain, remembered = (vain + 1 if step <= remembered else 1), step
            if vain > IN_VAIN:
                raise
            why = "another rank is gone"
        print(f"{why}: waiting for horovodrun to say who goes on", flush=True)
        clock.section = WAITING
        gc.collect()  # the job with its model; not in a handler, where the exception keeps them
        rejoin()
        elastic.announced = False


def rejoin() -> None:
    """Leave Horovod, and join it with the ranks that go on and those that are new. Collective over all of them."""
    hvd.shutdown()
    Horovod.begin_anew()
    meet(anew=True)
    del os.environ["HOROVOD_ELASTIC"]  # otherwise Horovod asks horovodrun once more
    try:
        hvd.init()
    finally:
        os.environ["HOROVOD_ELASTIC"] = "1"
