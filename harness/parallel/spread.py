"""A task's model as the ranks of a replica share it: by parts of every layer (`tensor.py`), by stages (`pipeline.py`).

spread = make_model(task, world)
spread.model                  whole where a rank is a replica
spread.passes, spread.whole   how a step's micro batches go through it, and how an evaluation calls it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from harness.checkpoint.shards import Region
from harness.errors import ConfigError
from harness.parallel.pipeline import Pipeline
from harness.parallel.tensor import cut
from harness.parallel.traffic import Traffic
from harness.parallel.wire import Wire
from harness.passes import Passes, one_by_one
from harness.seeds import Draws
from harness.task import Task
from harness.world import World


@dataclass(frozen=True)
class Spread:
    """A model, of whose parameters this rank may have a part."""

    model: nn.Module
    regions: Mapping[str, Region]
    """Which part, by name; empty where this rank has the whole model."""
    cut: frozenset[str]
    """Names of parameters of which the ranks of a stage have different parts."""
    passes: Passes
    whole: nn.Module
    draws: Draws = field(default_factory=Draws)
    """Of its layers, where they are known."""
    traffic: tuple[Traffic, ...] = ()

    @property
    def sent(self) -> float:
        """Bytes of activations and their gradients that this rank has sent since the start, at least."""
        return sum(traffic.sent for traffic in self.traffic)


def make_model(task: Task, world: World) -> Spread:
    """A fresh model on the CPU, this rank's part of it. Collective. Raises ConfigError and Unavailable."""
    task.model_group = world.groups.model
    model = task.model()
    regions: dict[str, Region] = {**cut(model, task.model_group)}
    parts = frozenset(regions)
    pipelined = world.groups.stages.size > 1
    layers = _layers(task, model, needed=pipelined)
    passes: Passes = one_by_one
    whole = model
    traffic: tuple[Traffic, ...] = (task.model_group.traffic,)
    if pipelined:
        wire = Wire(world.comm.mpi, world.device)
        passes = pipeline = Pipeline(model, layers, world.groups.stages, wire)
        regions, whole = pipeline.keep(model, regions), pipeline.whole
        traffic += (wire.traffic,)
    if regions and type(task).export is not Task.export:
        raise ConfigError(
            f"task {type(task).__name__} exports its model on rank 0, which has only a part of it (section parallel)",
            hint="train without, or write a task without export; `harness ckpt export` writes whole models",
        )
    return Spread(model, regions, parts, passes, whole, Draws(layers), traffic)


def _layers(task: Task, model: nn.Module, *, needed: bool) -> list[nn.Module]:
    """The model's layers in sequence; none where they are not known, which raises ConfigError where they are needed.

    Where they are not, the task itself must say which: a loss may call a Sequential twice.
    """
    if not needed and type(task).sequence is Task.sequence:
        return []
    try:
        return task.sequence(model)
    except ConfigError:
        if needed:
            raise
        return []
