"""A model as a sequence of layers that lie on several ranks (stages): micro batches follow each other through them.

Each rank makes the whole model, so that initial values do not depend on the stages, and keeps the parameters of its own
run of layers; the others stay as empty tensors under their names, so that optimizer, averages and checkpoints speak of
the same parameters on all ranks. A stage sends what its layers return to the next, and the gradient of what it got to
the one before, over MPI. After its first few forward passes each stage takes one micro batch forward, one backward
(1F1B, Narayanan et al. 2019, PipeDream), so that stage s of S holds at most S - s of them.

    stage 0   f0 f1 f2    b0 f3 b1    b2    b3
    stage 1      f0 f1 b0 f2 b1 f3 b2    b3               with 4 micro batches, S = 2 (times not to scale)

What is not here: how layers are cut (`tensor.py`); both go together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from harness.checkpoint.shards import Flat, Region
from harness.data import Batch, to_device
from harness.errors import ConfigError
from harness.parallel.groups import Group
from harness.parallel.wire import Wire

if TYPE_CHECKING:
    from harness.job import Job


class Pipeline:
    """This rank's stage. `__call__` is the `passes.Passes` of a step; `whole` is the model for evaluations.

    Made before the optimizer is. Collective in the world; raises ConfigError and Unavailable.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], stages: Group, wire: Wire) -> None:
        runs = balanced([sum(p.numel() for p in layer.parameters()) for layer in layers], stages.size)
        self.stages, self.wire = stages, wire
        self.layers = nn.Sequential(*(layers[number] for number in runs[stages.index]))
        check(model, layers, runs)
        self.whole = Whole(model, self)
        self._waiting: dict[int, tuple[Any, Tensor]] = {}  # micro batch -> what the stage got, what it made of it

    @property
    def first(self) -> bool:
        return self.stages.index == 0

    @property
    def last(self) -> bool:
        return self.stages.index == self.stages.size - 1

    def __call__(self, job: Job, batches: Iterator[Batch]) -> list[Tensor]:
        """All micro batches of a step; their losses, on all stages. Collective in the replica."""
        assert job.clock.done is not None
        losses: list[Tensor] = []
        for way, number in schedule(self.stages.index, self.stages.size, job.plan.passes):
            # also backward, where layers may be computed a second time
            job.spread.draws.key = job.config.seed, job.clock.done, job.world.replica, number
            if way == "backward":
                with job.clock("forward/backward"):
                    self._backward(job, number)
                continue
            batch = None
            if self.first or self.last:
                with job.clock("data"):
                    batch = to_device(next(batches).data, job.world.device)
            with job.clock("forward/backward"):
                made = self._forward(job, batch, number)
                if self.last:
                    losses.append(made.detach())
        for parameter in job.model.parameters():
            if not parameter.numel() and parameter.requires_grad:  # so that all ranks' optimizers have state for it
                parameter.grad = torch.zeros_like(parameter)
        with job.clock("communication"):
            return self._share(losses, job.plan.passes)

    def step_through(self, x: Tensor) -> Tensor:
        """The whole model's output from its input, on all ranks of the replica. Collective there."""
        last = self.stages.ranks[-1]
        y: Tensor = self.layers(x if self.first else self.wire.receive(self._before(), 0))
        if not self.last:
            self.wire.send(y, self._after(), 0)
            y = self.wire.receive(last, 0)
        else:
            for rank in self.stages.ranks[:-1]:
                self.wire.send(y, rank, 0)
        self.wire.finish()
        return y

    def _forward(self, job: Job, batch: Any, number: int) -> Tensor:
        got: Any = job.task.model_input(batch) if self.first else self.wire.receive(self._before(), 2 * number)
        if not self.first and got.is_floating_point():
            got.requires_grad_()
        with job.update.autocast():
            made: Tensor = self.layers(got)
            if self.last:
                made = job.task.loss(Known(made), batch)
        if not isinstance(made, Tensor):
            raise ConfigError(
                f"a layer of the pipeline returns a {type(made).__name__}", hint="stages hand on one tensor each"
            )
        if not self.last:
            self.wire.send(made, self._after(), 2 * number)
        self._waiting[number] = got, made
        return made

    def _backward(self, job: Job, number: int) -> None:
        got, made = self._waiting.pop(number)
        if self.last:
            job.update.backward(made)
        else:
            job.update.backward_from(made, self.wire.receive(self._after(), 2 * number + 1))
        if not self.first:
            gradient = got.grad if got.grad is not None else torch.zeros_like(got)
            self.wire.send(gradient, self._before(), 2 * number + 1)

    def _share(self, losses: list[Tensor], passes: int) -> list[Tensor]:
        """The last stage's losses, on all."""
        tag = 2 * passes
        if self.last:
            table = torch.stack(losses)
            for rank in self.stages.ranks[:-1]:
                self.wire.send(table, rank, tag)
        else:
            table = self.wire.receive(self.stages.ranks[-1], tag)
        self.wire.finish()
        return list(table)

    def _before(self) -> int:
        return self.stages.ranks[self.stages.index - 1]

    def _after(self) -> int:
        return self.stages.ranks[self.stages.index + 1]

    def keep(self, model: nn.Module, regions: dict[str, Region]) -> dict[str, Region]:
        """Free the parameters of other stages; what this rank then has of each. `regions`: of those that are cut.

        After it, the region of a parameter is all of it on its own stage, and nothing on the others.
        """
        mine = {id(parameter) for parameter in self.layers.parameters()}
        held: dict[str, Region] = {}
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            here = regions.get(name)
            shape = here.shape if here is not None else shapes[name]
            if id(parameter) in mine:
                held[name] = here if here is not None else Flat(shape, 0, math.prod(shape))
            else:
                parameter.data = parameter.data.new_empty(0)
                held[name] = Flat(shape, 0, 0)
        return held


class Whole(nn.Module):
    """The whole model as one that can be called, alike on all ranks of the replica; it has no gradient."""

    def __init__(self, model: nn.Module, pipeline: Pipeline) -> None:
        super().__init__()
        self.model = model
        self._pipeline = pipeline

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self._pipeline.step_through(x)


class Known(nn.Module):
    """In a model's place where its output is known: for `Task.loss` on the last stage."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *inputs: Any) -> Tensor:
        return self._output


def schedule(stage: int, stages: int, passes: int) -> Iterator[tuple[Literal["forward", "backward"], int]]:
    """What a stage does in which order: (way, micro batch). Pure.

    >>> [f"{way[0]}{number}" for way, number in schedule(0, 2, 3)]
    ['f0', 'f1', 'b0', 'f2', 'b1', 'b2']
    """
    ahead = min(stages - 1 - stage, passes)
    for number in range(ahead):
        yield "forward", number
    for number in range(passes - ahead):
        yield "forward", ahead + number
        yield "backward", number
    for number in range(passes - ahead, passes):
        yield "backward", number


def balanced(weights: Sequence[int], parts: int) -> list[range]:
    """Cut a sequence into so many runs, none empty, whose greatest sum is the least possible. Pure.

    Raises ConfigError where there are fewer weights than parts.

    >>> balanced([4, 1, 1, 4], 2)
    [range(0, 2), range(2, 4)]
    """
    if len(weights) < parts:
        raise ConfigError(
            f"the model has {len(weights)} layers in sequence, too few for parallel.pipeline {parts}",
            hint=f"use at most parallel.pipeline={len(weights)}",
        )

    def cut(limit: int) -> list[range]:
        begin, total = 0, 0
        runs: list[range] = []
        for at, weight in enumerate(weights):
            # full, or each of the layers left is needed for a run of its own
            if at > begin and (total + weight > limit or len(weights) - at == parts - len(runs) - 1):
                runs.append(range(begin, at))
                begin, total = at, 0
            total += weight
        return [*runs, range(begin, len(weights))]

    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= parts else (middle + 1, high)
    return cut(low)


def check(model: nn.Module, layers: Sequence[nn.Module], runs: Sequence[range]) -> None:
    """Raises ConfigError for a model whose parameters are not each in one stage, or with statistics of its batches."""
    stage_of: dict[int, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for stage, run in enumerate(runs):
        parameters = [parameter for number in run for parameter in layers[number].parameters()]
        if not any(parameter.requires_grad for parameter in parameters):
            raise ConfigError(
                f"stage {stage} of the pipeline has no parameters to train", hint="use a smaller parallel.pipeline"
            )
        for parameter in parameters:
            if stage_of.setdefault(id(parameter), stage) != stage:
                raise ConfigError(
                    f"{names.get(id(parameter), 'a parameter')} is used by stages {stage_of[id(parameter)]} and {stage}"
                    " of the pipeline",
                    hint="layers that share a parameter must be on one stage",
                )
    if left := [name for number, name in names.items() if number not in stage_of]:
        raise ConfigError(f"{left[0]} is in none of the layers that Task.sequence returns")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{name} is a batch normalization, whose statistics parallel.pipeline does not bring together",
                hint="use another norm",
            )
