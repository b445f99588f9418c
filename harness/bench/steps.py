"""What `harness bench train` measures inside a rank: optimizer steps of the user's own task, in rounds.

    python -m harness RUN_DIR --measure '{"rounds": 5}'          writes RUN_DIR/measured.json, and trains nothing

A contender is the config as it is, the same with another setting of section `horovod`, or the same steps with the
communication left out: every rank then trains by itself. All of them use one model, one after the other; in its turn
each has a fresh optimizer, takes one step that does not count, and then some more without a pause in between, of which
the slowest rank's time is taken. A step is what it is in a run (`loop.take_step`), data included. Log lines,
evaluations and checkpoints are not part of it.

Share of time in communication: what of a step is not needed where the communication is left out, in the same round. So
it counts what the transfers take from the computation as well, and what is hidden behind it does not count. Where ranks
cannot compute without each other (section `parallel`) it is the time that a step waits for others, by the run's clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from harness.bench.rounds import Contender, Rounds, Seconds, Spread, run_rounds, slowest
from harness.bench.tried import CONFIGURED, Tried, tried
from harness.config import Config, Horovod
from harness.data import Batch
from harness.errors import ConfigError
from harness.job import Job, make_update
from harness.loop import batches_of, take_step
from harness.parallel.groups import SINGLE
from harness.parallel.reducer import travels_as
from harness.rundir import write_json
from harness.section import Positive, Section
from harness.world import World

ALONE = "no communication"
WAITING = "waiting"
TURN = 0.5
"""Seconds that the steps of one turn take, where their number is not given."""
MANY = 10**9
"""More steps than are ever measured."""


class Request(Section):
    """What to measure."""

    rounds: Positive
    steps: Positive | None = None
    """Steps of a turn that count; unset: as many as take TURN."""
    settings: bool = False
    """Try other settings, too."""


@dataclass(frozen=True)
class Way:
    """How a contender takes its steps."""

    config: Config
    world: World


@dataclass
class Turns:
    """All contenders' turns: they share the model, and go on in one stream of batches."""

    job: Job
    batches: Iterator[Batch]
    steps: int = 1
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that this rank sends in a step, at least, by the name of the contender."""

    def take(self, name: str, way: Way, number: int) -> Seconds:
        """This rank's seconds of a step, and how much of it this rank waited. Collective."""
        job = replace(self.job, update=_update(self.job, way))
        self._run(job, range(1))
        job.world.comm.barrier()
        job.clock.take()
        before, began = job.sent, time.perf_counter()
        self._run(job, range(1, self.steps + 1))
        seconds = time.perf_counter() - began
        self.sent[name] = (job.sent - before) / self.steps
        job.update.close()
        waited = job.clock.take().get("communication", 0.0)
        return {name: seconds / self.steps, f"{name}, {WAITING}": waited / self.steps}

    def _run(self, job: Job, steps: range) -> None:
        for step in steps:
            take_step(job, self.batches, step)
        if job.world.device.type == "cuda":
            torch.cuda.synchronize(job.world.device)


def measure(request: Request, job: Job) -> None:
    """Measure, and write down on rank 0 what was found. Collective. Raises ConfigError, and what the task raises."""
    job.update.close()
    job = replace(job, steps=MANY)
    choices, left_out = _choices(job, settings=request.settings)
    with batches_of(job, 0) as batches:
        turns = Turns(job, batches)
        ways = {one.name: Way(_with(job.config, one), job.world) for one in choices}
        if _can_be_alone(job):
            ways[ALONE] = Way(job.config, replace(job.world, groups=SINGLE))
        turns.steps = request.steps or _steps_of_a_turn(turns, ways[CONFIGURED])
        contenders = [Contender(name, partial(turns.take, name, way)) for name, way in ways.items()]
        rounds = run_rounds(contenders, request.rounds, job.world.comm, told=_Progress(job, request.rounds))
    sent = slowest(turns.sent, job.world.comm)
    if job.world.is_root:
        told = _told(job, choices, rounds, sent) | {"steps": turns.steps, "left_out": left_out}
        write_json(job.run.root / "measured.json", told)
    job.sinks.record("state", 0, state="finished", summary="measured")


def _update(job: Job, way: Way) -> Any:
    parameters = job.task.parameters(job.model)
    return make_update(way.config, job.spread, parameters, job.plan, way.world, job.order, job.stop, elastic=False)


def _with(config: Config, one: Tried) -> Config:
    changed = Horovod.model_validate(config.horovod.model_dump() | one.changes)
    return config.model_copy(update={"horovod": changed})


def _choices(job: Job, *, settings: bool) -> tuple[list[Tried], dict[str, str]]:
    """What is measured beside the config as it is, and by its name why something else cannot be."""
    own = Tried(CONFIGURED, {})
    if not settings or job.world.size == 1:
        return [own], {}
    possible, left_out = [own], {}
    sparse = any(getattr(module, "sparse", False) for module in job.model.modules())
    for one in tried(job.config.horovod, _gradients(job), sparse=sparse):
        try:
            _update(job, Way(_with(job.config, one), job.world)).close()
        except ConfigError as error:  # the same on all ranks
            left_out[one.name] = error.message
        else:
            possible.append(one)
    return possible, left_out


def _gradients(job: Job) -> int:
    """Bytes of this rank's gradients, as they travel."""
    found = (parameter for parameter in job.model.parameters() if parameter.requires_grad)
    return sum(parameter.numel() * travels_as(parameter.dtype).itemsize for parameter in found)


def _can_be_alone(job: Job) -> bool:
    """Whether a rank has all that it computes with."""
    parallel = job.config.parallel
    return job.world.size > 1 and parallel.each == 1 and parallel.optimizer_shards == "none"


def _steps_of_a_turn(turns: Turns, way: Way) -> int:
    """As many as take TURN, at least 2; whole rounds of local steps. Collective."""
    seconds = slowest(turns.take(CONFIGURED, way, 0), turns.job.world.comm)[CONFIGURED]
    every = turns.job.config.parallel.average_every
    return math.ceil(min(max(TURN / max(seconds, 1e-6), 2), 1000) / every) * every


@dataclass
class _Progress:
    """Says on rank 0 how far it has come."""

    job: Job
    rounds: int
    number: int | None = None

    def __call__(self, number: int, name: str) -> None:
        if number != self.number:
            self.number = number
            ranks = f"{self.job.world.size} rank{'s' * (self.job.world.size != 1)}"
            what = "warming up" if number == 0 else f"round {number} of {self.rounds}"
            self.job.sinks.say(f"{ranks}: {what}")


def _told(job: Job, choices: list[Tried], rounds: Rounds, sent: Mapping[str, float]) -> dict[str, Any]:
    """What the launcher shows. Times in seconds, sizes in bytes; a share is null where nothing was communicated."""
    return {
        "ranks": job.world.size,
        "samples": job.plan.global_batch,
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "gradients": _gradients(job),
        "device": job.world.device.type,
        "plan": str(job.plan),
        "settings": [
            {
                "name": one.name,
                "changes": one.changes,
                "exact": one.exact,
                "seconds": asdict(rounds.seconds(one.name)),
                "ratio": asdict(rounds.ratio(one.name, CONFIGURED)),
                "share": _share(job, rounds, one.name),
                "sent": sent[one.name],
            }
            for one in choices
        ],
        "alone": asdict(rounds.seconds(ALONE)) if ALONE in rounds else None,
    }


def _share(job: Job, rounds: Rounds, name: str) -> dict[str, Any] | None:
    """Of a contender's step, communication: between 0 and 1 but for noise."""
    if job.world.size == 1:
        return None
    if ALONE not in rounds:
        return asdict(rounds.ratio(f"{name}, {WAITING}", name))
    alone = rounds.ratio(ALONE, name)
    return asdict(Spread(1 - alone.median, 1 - alone.most, 1 - alone.least, alone.count))
