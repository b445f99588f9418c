"""What the tests of tasks share: a plain loop in one process that adds up any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from harness.batch import plan_batch
from harness.config import Config
from harness.data import EvalBatches, train_batches
from harness.optim import make_optimizer
from harness.order import Order
from harness.resolve import resolve
from harness.schedule import factor
from harness.task import Task

ROOT = Path(__file__).resolve().parent.parent


def config(name: str, *changes: str) -> Config:
    return resolve(ROOT / "configs" / f"{name}.yaml", list(changes)).config


def train(task: Task, settings: Config, *, ranks: int = 1, steps: int | None = None) -> tuple[Any, list[float]]:
    """The config's training, with all ranks' shares added up in one process. The model and the loss of each step."""
    data = task.data("train")
    batch = settings.train.global_batch
    total = settings.train.steps or math.ceil((settings.train.epochs or 0) * len(data) / batch)
    order = Order(len(data), settings.seed, settings.data.shuffle, settings.data.block)
    plan = plan_batch(global_batch=batch, ranks=ranks, micro_batch=settings.train.micro_batch)
    torch.manual_seed(settings.seed)
    model = task.model()
    optimizer = make_optimizer(task.parameters(model), settings.optim, lr=settings.optim.lr)
    streams = [
        train_batches(data, order, plan, replica=rank, start_step=0, stop_step=total, seed=settings.seed)
        for rank in range(ranks)
    ]
    losses = []
    for step in range(total if steps is None else steps):
        optimizer.zero_grad()
        loss = 0.0
        for stream in streams:
            part = task.loss(model, next(stream).data) / ranks
            part.backward()
            loss += part.item()
        if settings.train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.optim.lr * factor(settings.schedule, step, total)
        optimizer.step()
        losses.append(loss)
    return model, losses


@torch.no_grad()
def evaluate(task: Task, model: Any, *, ranks: int = 1, batch: int = 256) -> dict[str, float]:
    model.eval()
    sums: dict[str, float] = {}
    count = 0
    for rank in range(ranks):
        for part in EvalBatches(task.data("eval"), replica=rank, replicas=ranks, batch=batch):
            for name, mean in task.evaluate(model, part.data).items():
                sums[name] = sums.get(name, 0.0) + mean.item() * part.samples
            count += part.samples
    model.train()
    metrics = {name: value / count for name, value in sums.items()}
    return metrics | dict(task.summarize(model, metrics))
