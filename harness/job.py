"""Everything one rank needs to train, built from the config in the order that Horovod and restoring need.

What is not here: what happens with it (`loop.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from harness.batch import BatchPlan, plan_of
from harness.checkpoint import Manager, State
from harness.checkpoint.rules import keep_rule
from harness.checkpoint.shards import Shard
from harness.checkpoint.writing import Outcome
from harness.clock import Clock
from harness.config import Config
from harness.data import EvalBatches, check_dataset
from harness.eager import be_deterministic
from harness.ema import Ema
from harness.errors import ConfigError
from harness.optim import make_optimizer, peak_lr
from harness.order import Order
from harness.parallel.local import LocalSteps
from harness.parallel.rescue import rescue
from harness.parallel.server import Server, Worker
from harness.parallel.spread import Spread, make_model
from harness.partition.file import read
from harness.partition.order import PartOrder, check_partition
from harness.rundir import RunDir
from harness.seeds import seed_generators
from harness.sinks import Sinks, open_sinks
from harness.stop import SaveRequest, StopRequest, deadline
from harness.task import Task, make_task
from harness.update import OPTIONAL, Update, shard
from harness.world import World

if TYPE_CHECKING:
    from harness.elastic import Elastic


@dataclass
class Progress:
    """What a checkpoint remembers of the loop besides tensors; plain JSON values."""

    step: int = 0
    best: float | None = None
    """The best value so far of the metric that early stopping watches."""
    waited: int = 0
    """Evaluations since then."""
    evaluated: int = 0
    """The step of the last evaluation: one that a stop left out is made up for on the restart."""


@dataclass(frozen=True)
class Job:
    """One rank's share of a run."""

    config: Config
    run: RunDir
    world: World
    clock: Clock
    stop: StopRequest
    request: SaveRequest
    sinks: Sinks
    task: Task
    model: torch.nn.Module
    train_data: Any
    eval_batches: EvalBatches | None
    order: Order | PartOrder
    plan: BatchPlan
    spread: Spread
    """How the ranks of a replica share the model."""
    steps: int
    update: Update
    ema: Ema | None
    manager: Manager
    elastic: Elastic | None
    progress: Progress = field(default_factory=Progress)
    evaluated: dict[str, float] = field(default_factory=dict)
    """What the last evaluation found (`progress.evaluated` is its step)."""

    def state(self, extra: dict[str, Any]) -> State:
        """What a checkpoint holds; restoring puts what `extra()` saved into `extra`."""
        return State(
            model=self.model,
            optimizer=self.update.optimizer,
            ema=None if self.ema is None else {name: self._part(name, x) for name, x in self.ema.shadow.items()},
            extra=extra,
            optional=OPTIONAL,
            shards={**self.spread.regions, **{f"optimizer.{name}": one for name, one in self.update.regions.items()}},
            **self.update.entries(),
        )

    def _part(self, name: str, tensor: torch.Tensor) -> torch.Tensor | Shard:
        region = self.spread.regions.get(name) or self.update.regions.get(name)
        return tensor if region is None else Shard(tensor, region)

    def shown(self) -> AbstractContextManager[None]:
        """In the block the model has the parameters that are evaluated and exported. Collective."""
        return self.ema.applied() if self.ema is not None else self.update.shared()

    def align_buffers(self, name: str) -> None:
        """Make the model's buffers the same on all ranks, as `checkpoint.buffers` says. Collective."""
        if self.config.checkpoint.buffers == "average":
            self.world.average_tensors(self.model.named_buffers(), f"{name}/average")
        self.world.broadcast_tensors(
            self.model.named_buffers(), name, root=self.world.servers
        )  # also those that have no mean

    @property
    def sent(self) -> float:
        """Bytes that this rank has sent to others since the start, at least: see `parallel/traffic.py`."""
        return self.update.sent + self.spread.sent

    def close(self) -> None:
        """End the evaluation's loader workers and the checkpoint manager. Collective."""
        if self.eval_batches is not None:
            self.eval_batches.close()
        self.manager.close()

    def abandon(self) -> None:
        """The same where other ranks are gone. Local."""
        if self.eval_batches is not None:
            self.eval_batches.close()
        self.manager.abandon()

    def extra(self) -> dict[str, Any]:
        """The part of the state that is plain values."""
        return vars(self.progress) | {"scaler": self.update.scaler.state_dict() if self.update.scaler else None}


def total_steps(config: Config, samples: int) -> int:
    """Optimizer steps of the whole run; epochs are rounded up to whole steps."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    return max(1, math.ceil(config.train.epochs * samples / config.train.global_batch))


def build(config: Config, run: RunDir, attempt: int, world: World, clock: Clock, elastic: Elastic | None = None) -> Job:
    """Collective (initial parameters and buffers come from rank 0). Raises ConfigError and what the task raises."""
    if config.train.deterministic:  # read when cuBLAS starts; without it torch refuses matrix products on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    be_deterministic(config.train.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs time and only hides reads of unset memory
    torch.backends.cudnn.benchmark = not config.train.deterministic
    settings = config.checkpoint
    plan = plan_of(config, world.size, uneven=elastic is not None)
    seed_generators(config.seed)  # a task may split or make its data at random: all ranks alike, at every start
    task = make_task(config.task.name, config.task.args)
    train_data, eval_data = task.data("train"), task.data("eval")
    samples = check_dataset(train_data, "train", config.train.global_batch)
    if eval_data is not None:
        check_dataset(eval_data, "eval", 1)

    seed_generators(config.seed)
    spread = make_model(task, world)
    model, regions = spread.model, spread.regions
    if regions and elastic is not None:
        raise ConfigError("an elastic run may lose ranks, and with them parts of the model: it needs parallel.model=1")
    model.to(world.device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"the model of task {config.task.name} has no parameters to train")
    tensors = model.state_dict(keep_vars=True)
    world.broadcast_tensors(((name, x) for name, x in tensors.items() if name not in regions), "init")
    world.broadcast_tensors(((name, tensors[name]) for name in regions), "init/parts", world.groups.replicas)
    model.train()
    serves = world.rank < world.servers
    order = make_order(config, samples, world.replicas)
    steps = total_steps(config, samples)
    stop = StopRequest(
        run.stop if world.is_root else None,
        signals=config.stop.signals,
        ends=deadline(config.stop.time) if world.is_root else None,
        margin=config.stop.margin,
    )
    update = make_update(config, spread, task.parameters(model), plan, world, order, stop, elastic=elastic is not None)
    sinks = open_sinks(config, run, attempt=attempt, world_size=world.size, steps=steps) if world.is_root else Sinks([])
    job = Job(
        config=config,
        run=run,
        world=world,
        clock=clock,
        stop=stop,
        request=SaveRequest(run.save if world.is_root else None, config.checkpoint.interval),
        sinks=sinks,
        task=task,
        model=model,
        train_data=train_data,
        eval_batches=None
        if eval_data is None
        else EvalBatches(
            Subset(eval_data, []) if serves else eval_data,
            replica=world.replica,
            replicas=world.replicas,
            batch=config.eval.batch or plan.micro_batch,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            pin=world.device.type == "cuda",
        ),
        order=order,
        plan=replace(plan, passes=0) if serves else plan,
        spread=spread,
        steps=steps,
        update=update,
        ema=Ema(model, config.train.ema, update.sharded) if config.train.ema is not None else None,
        manager=Manager(
            run.checkpoints,
            comm=world.comm,
            keep=keep_rule(settings.keep),
            engine=settings.engine,
            background=settings.mode != "wait",
            lazy=settings.mode == "lazy",
            busy=settings.busy,
            timeout=settings.timeout,
            check_replicas=settings.check_replicas,
            strict=settings.strict,
            log=sinks.say,
            saved=lambda outcome: _saved(sinks, stop, outcome),
        ),
        elastic=elastic,
    )
    if isinstance(job.update, Server):
        job.update.rescue = partial(rescue, job, job.update)
    return job


def make_update(
    config: Config,
    spread: Spread,
    parameters: Iterable[Any],
    plan: BatchPlan,
    world: World,
    order: Order | PartOrder,
    stop: StopRequest,
    *,
    elastic: bool,
) -> Update:
    """The form of training: what ranks do with their gradients. Raises ConfigError."""
    model, replicas, parallel = spread.model, world.groups.replicas, config.parallel
    if elastic and (parallel.local or parallel.strategy != "allreduce"):
        raise ConfigError(
            "an elastic run reduces gradients: parallel.average_every and parallel.strategy do not go with it",
            hint="what a lost rank has learned or holds alone would be lost with it; use restarts instead",
        )
    common: dict[str, Any] = {
        "train": config.train,
        "horovod": config.horovod,
        "passes": plan.passes,
        "device": world.device,
    }
    sharded = None
    if world.groups.shards.size > 1:
        if elastic:
            raise ConfigError(
                "an elastic run cannot cut the optimizer's state (parallel.optimizer_shards): a lost rank's slices"
                " are lost",
                hint="use restarts instead of elastic ranks",
            )
        sharded, parameters = shard(model, parameters, config.horovod, world.groups)
    optimizer = make_optimizer(parameters, config.optim, lr=peak_lr(config.optim, config.train.global_batch))
    if parallel.strategy == "parameter_server":
        if world.controller != "mpi":
            raise ConfigError(
                "parallel.strategy=parameter_server sends its messages over MPI, which is not there",
                hint="start the run with mpirun or srun, not over Gloo or as a single process",
            )
        common |= {"servers": parallel.servers}
        if world.rank >= parallel.servers:
            return Worker(model, optimizer, **common)
        return Server(model, optimizer, staleness=parallel.staleness, stopping=lambda: stop.flag, **common)
    if parallel.local:
        weight = order.weight(world.replica, world.replicas)
        every, outer = parallel.average_every, parallel.outer
        return LocalSteps(model, optimizer, ranks=replicas.size, every=every, weight=weight, outer=outer, **common)
    groups = world.groups
    return Update(model, optimizer, ranks=replicas.size, groups=groups, cut=spread.cut, sharded=sharded, **common)


def make_order(config: Config, samples: int, replicas: int) -> Order | PartOrder:
    """The order of samples; with `data.partition` replicas have their own parts. Raises ConfigError, and `read`'s."""
    data = config.data
    if data.partition is None:
        return Order(samples, config.seed, shuffle=data.shuffle, block=data.block)
    partition = read(Path(data.partition))
    check_partition(partition, data.partition, samples=samples, ranks=replicas)
    batch = config.train.global_batch
    return PartOrder(partition.ids(), batch=batch, seed=config.seed, shuffle=data.shuffle, block=data.block)


def _saved(sinks: Sinks, stop: StopRequest, outcome: Outcome) -> None:
    stop.saved(outcome.seconds)
    sinks.record("checkpoint", outcome.step, path=str(outcome.path), seconds=outcome.seconds, waited=outcome.waited)
