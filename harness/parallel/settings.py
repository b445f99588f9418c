"""The section `parallel` of a config: which form of training, and how ranks share its work. Read by `groups.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from harness.section import Count, Fraction, Positive, PositiveFloat, Section


class Outer(Section):
    """What moves the shared parameters where a round of local steps ends (DiLoCo): SGD with Nesterov momentum."""

    lr: PositiveFloat = 0.7
    """Times the difference that the ranks' mean makes; 1 with momentum 0 is the mean itself."""
    momentum: Fraction = 0.9
    """Of the differences of earlier rounds."""


ELEMENTWISE = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop")
"""Those of torch.optim, besides the built-in ones, that treat every element alone: their state can be cut anywhere."""


class Parallel(Section):
    """How ranks share the work; unset: every rank has the whole model and its own samples."""

    model: Positive = 1
    """Ranks that share one copy of the model, each with a part of every layer (tensor parallel)."""
    pipeline: Positive = 1
    """Stages: ranks, or groups of `model` ranks, that each have some of the layers and hand on micro batches."""
    optimizer_shards: Literal["none", "node", "all"] = "none"
    """Ranks that share one optimizer state, each with a slice of it: none, those of a node, or all (ZeRO stage 1)."""
    average_every: Positive = 1
    """Steps that ranks take on their own before their parameters are averaged (local SGD); 1: gradients are, always."""
    outer: Outer | None = None
    """How the mean moves the shared parameters, with `average_every`; unset: it replaces them."""

    strategy: Literal["allreduce", "parameter_server"] = "allreduce"
    """allreduce: ranks reduce their gradients; parameter_server: the first ranks hold the parameters, others push."""
    servers: Positive = 1
    """For parameter_server: so many ranks, each with an equal slice; they have no samples."""
    staleness: Count | Literal["unbounded"] = 0
    """For parameter_server: how many steps workers may be apart; 0: all wait for all, as with allreduce."""

    @property
    def without_samples(self) -> int:
        """Ranks, the first ones, that take no samples."""
        return self.servers if self.strategy == "parameter_server" else 0

    @property
    def each(self) -> int:
        """Ranks of a replica."""
        return self.model * self.pipeline

    @property
    def local(self) -> bool:
        """Ranks take steps of their own."""
        return self.average_every > 1

    @model_validator(mode="after")
    def _fits(self) -> Parallel:
        if self.outer is not None and not self.local:
            raise ValueError("outer needs average_every: the steps between two of its own")
        parts = [f"{name}={ranks}" for name, ranks in (("model", self.model), ("pipeline", self.pipeline)) if ranks > 1]
        shards = [f"optimizer_shards={self.optimizer_shards}"] if self.optimizer_shards != "none" else []
        steps = [f"average_every={self.average_every}"] if self.local else []
        for why, holds, others in (
            ("average_every takes whole models and optimizers", self.local, parts + shards),
            ("optimizer_shards cuts whole parameters", bool(shards), parts),
            (
                "strategy parameter_server is a form of its own",
                self.strategy == "parameter_server",
                parts + shards + steps,
            ),
        ):
            if holds and others:
                raise ValueError(f"{why}: it does not go with {' and '.join(others)}")
        if self.strategy != "parameter_server" and (self.servers, self.staleness) != (1, 0):
            raise ValueError("servers and staleness need strategy parameter_server")
        return self
