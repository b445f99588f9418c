"""One optimizer step over all ranks: the order of what belongs to it.

    update.begin(factor)                                              learning rates of this step
    for each of `passes` micro batches:   update.backward(loss)      gradients travel while the last backward runs
    update.synchronize()                                              wait for them: averaged or summed
    update.step()                                                     unscale -> finite? -> clip -> step -> zero

The average over ranks is a sum of gradients of the loss divided by the ranks, which costs no pass over the gradients.

A loss that is not finite on one rank is made to spoil that rank's whole gradient (`_poison`), so that the reduced
gradient tells all ranks the same thing and no extra collective is needed to agree.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.shards import Flat
from harness.config import Horovod, Train
from harness.errors import ConfigError
from harness.parallel.adasum import take_combined_step
from harness.parallel.groups import SINGLE, Groups
from harness.parallel.norm import norm_of_replica
from harness.parallel.reducer import Reducer, travels_as
from harness.parallel.sharded import Sharded
from harness.parallel.traffic import allreduce_bytes


@dataclass(frozen=True)
class Step:
    """What a step did. `grad_norm`: L2 norm of the reduced gradient before clipping, None when not computed."""

    grad_norm: float | None
    finite: bool
    taken: bool


OPTIONAL = ("local", "shared", "momentum")
"""Entries of a checkpoint that only some forms of training make; others go on without them."""


class Update:
    """Owns the optimizer, the reduction of gradients, the gradient scaler and the accumulation of one model.

    `ranks`: over how many gradients are reduced: all, or those of `groups.replicas`. `cut`: names of parameters of
    which this rank alone of its stage has a part. `sharded`: reduces gradients instead, and the optimizer is one of its
    slices.
    """

    together = True
    """All ranks take the same step, and know it."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train: Train,
        horovod: Horovod,
        passes: int,
        ranks: int,
        device: torch.device,
        groups: Groups = SINGLE,
        cut: Container[str] = (),
        sharded: Sharded | None = None,
    ) -> None:
        if train.precision == "fp16" and device.type == "cpu":
            raise ConfigError("train.precision fp16 needs a GPU", hint="use bf16, which CPUs compute as well")
        self.passes = passes
        self.device = device
        self.train = train
        self.groups = groups
        self.cut = {id(parameter) for name, parameter in model.named_parameters() if name in cut}
        self.optimizer = optimizer
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type) if train.precision == "fp16" else None
        self._watched = train.nonfinite != "ignore" or train.clip_norm is not None
        """Somebody needs the gradient's norm."""
        self._passed = 0
        self._divisor = passes * _before(horovod, ranks)
        self._wire = _wire(horovod)
        self._adasum: list[tuple[str, torch.nn.Parameter]] | None = None
        self._steps_sent = 0.0
        self._ranks = ranks
        self.sharded = sharded
        self._reducer: Reducer | None = sharded
        if ranks > 1 and sharded is None:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parameters, settings = _settings(model, held, horovod, ranks)
            if horovod.op == "adasum":
                check_adasum(ranks)
                self._adasum = parameters
            else:
                self._reducer = Reducer(parameters, process_set=groups.replicas.process_set, **settings)

    @property
    def regions(self) -> dict[str, Flat]:
        """Which elements of a parameter this rank's optimizer has, by the parameter's name; empty: all of all."""
        return {} if self.sharded is None else self.sharded.regions

    def autocast(self) -> Any:
        """The context of the forward pass; parameters stay fp32 (Horovod reduces no bf16)."""
        if self.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.train.precision == "bf16" else torch.float16)

    def begin(self, factor: float) -> None:
        """Set the learning rates of this step to their peaks times `factor`."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def backward(self, loss: Tensor) -> None:
        """Add one micro batch's gradient. `loss` is its mean over samples, a scalar."""
        if self.train.nonfinite != "ignore":
            loss = _poison(loss)
        if self._divisor != 1:
            loss = loss / self._divisor
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        self.backward_from(loss)

    def backward_from(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Add one micro batch's gradient, given that of `output`; None: `output` is a loss, scaled as it should be."""
        self._passed += 1
        if self._passed == self.passes and self._reducer is not None:
            self._reducer.expect()
        output.backward(gradient)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait until every gradient is reduced. Collective."""
        self._passed = 0
        if self._reducer is not None:
            self._reducer.synchronize(norm=self._watched and self.groups.replica.size == 1)

    def step(self) -> Step:
        """Use the reduced gradient. Collective for Adasum and a sharded optimizer; all ranks do the same."""
        if self._adasum is not None:
            return self._adasum_step(self._adasum)
        norm = self._unscaled_norm()
        finite = norm is None or norm - norm == 0.0  # false for nan and for both infinities
        taken = finite or self.train.nonfinite == "ignore"
        if taken:
            self._clip(norm)
            if self.sharded is not None:
                self.sharded.load()
        if self.scaler is not None:
            if taken:
                self.scaler.step(self.optimizer)  # skips by itself where it found an infinity
            self.scaler.update()
        elif taken:
            self.optimizer.step()
        if taken or self.train.nonfinite == "skip" or self.scaler is not None:
            self.optimizer.zero_grad()
        if taken and self.sharded is not None:
            self.sharded.gather()
        return Step(norm, finite, taken)

    @property
    def sent(self) -> float:
        """Bytes that this rank has sent to others since the start, at least: see `parallel/traffic.py`."""
        return self._steps_sent + (0.0 if self._reducer is None else self._reducer.sent)

    def share(self, done: int) -> None:
        """After step `done`: make the parameters what all ranks go on with. Collective, in forms that do so."""

    def shared(self, *, state: bool = False) -> AbstractContextManager[None]:
        """In the block the model (with `state` the optimizer, too) is what all ranks have in common. Collective."""
        return nullcontext()

    def close(self) -> None:
        """Let go of the model, so that another update can take its steps. Between two steps; local."""
        if self._reducer is not None:
            self._reducer.close()
        self.optimizer.zero_grad()

    def entries(self) -> dict[str, Any]:
        """What a checkpoint of this form holds besides model and optimizer; of `OPTIONAL` names only."""
        return {}

    def restored(self, step: int, loaded: Collection[str]) -> None:
        """After a restore at this step; loaded: names of what the checkpoint held. Not collective."""

    def _unscaled_norm(self) -> float | None:
        """Undo the scaler's factor; the gradient's norm, None where nobody needs it."""
        scale, sharded = 1.0, self.sharded
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            if sharded is not None and sharded.norm - sharded.norm != 0.0:
                sharded.spoil()  # the scaler looks at this rank's slices only
            self.scaler.unscale_(self.optimizer)
        if not self._watched:
            return None
        if self.groups.replica.size > 1:
            own, alike = _norm(self._gradients(cut=True)), _norm(self._gradients(cut=False))
            return float(norm_of_replica(own, alike, self.groups))
        return float(_norm(self._gradients())) if self._reducer is None else self._reducer.norm / scale

    def _adasum_step(self, parameters: list[tuple[str, torch.nn.Parameter]]) -> Step:
        """Ranks take their own steps, which are then combined: there is no gradient to clip, or to skip a step for.

        So what is not finite shows only in the parameters, on all ranks alike. Collective.
        """
        take_combined_step(self.optimizer, parameters, self._wire)
        itemsize = None if self._wire is None else self._wire.itemsize
        nbytes = sum(p.numel() * (itemsize or travels_as(p.dtype).itemsize) for _, p in parameters)
        self._steps_sent += allreduce_bytes(nbytes, self._ranks)
        self.optimizer.zero_grad()
        if self.train.nonfinite == "ignore":
            return Step(None, True, True)
        total = float(_norm(parameter.detach() for _, parameter in parameters))
        return Step(None, total - total == 0.0, True)

    def _gradients(self, cut: bool | None = None) -> Iterator[Tensor]:
        """The dense values of every gradient, sparse ones summed over repeated rows first; those cut, or the others."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or cut not in (None, id(parameter) in self.cut):
                    continue
                if parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
                    yield parameter.grad.values()
                else:
                    yield parameter.grad

    def _clip(self, norm: float | None) -> None:
        limit = self.train.clip_norm
        if limit is not None and norm is not None and norm > limit:
            for gradient in self._gradients():
                gradient.mul_(limit / norm)
        if self.train.clip_value is not None:
            for gradient in self._gradients():
                gradient.clamp_(-self.train.clip_value, self.train.clip_value)


def check_adasum(ranks: int) -> None:
    """Raises ConfigError where Horovod has no Adasum."""
    import horovod.torch as hvd

    if ranks & (ranks - 1):
        raise ConfigError(f"horovod.op=adasum needs 2, 4, 8, ... ranks, not {ranks}")
    if not hvd.mpi_enabled():
        raise ConfigError("horovod.op=adasum needs MPI; Horovod has no Adasum over Gloo", hint="use mpirun or srun")


def _poison(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, its gradient is nan. Without a branch, so a GPU need not be waited for.

    0 * loss is 0 for finite values and nan otherwise; 1 + 0 multiplies exactly.
    """
    return loss * (1.0 + 0.0 * loss.detach())


def _norm(tensors: Iterator[Tensor]) -> Tensor:
    """The L2 norm over all elements, 0 when there are none."""
    values = [tensor for tensor in tensors if tensor.numel()]
    if not values:
        return torch.zeros(())
    norms = torch._foreach_norm(values, 2.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    return total


def shard(
    model: torch.nn.Module, parameters: Iterable[Any], horovod: Horovod, groups: Groups
) -> tuple[Sharded, list[Any]]:
    """What cuts the optimizer of these parameters, or groups of them, over `groups.shards`, and what it is made of.

    Raises ConfigError.
    """
    mine = [group | {"params": _listed(group["params"])} if isinstance(group, dict) else group for group in parameters]
    found = [each for group in mine for each in (group["params"] if isinstance(group, dict) else [group])]
    held = [each[1] if isinstance(each, tuple) else each for each in found]
    named, settings = _settings(model, held, horovod, groups.replicas.size)
    if settings["rows"] and not settings["dense"]:
        raise ConfigError(
            "parallel.optimizer_shards cannot cut sparse gradients", hint="set horovod.sparse_as_dense=true"
        )
    sharded = Sharded(named, shards=groups.shards, copies=groups.copies, replicas=groups.replicas, **settings)
    return sharded, sharded.slices_of(mine)


def _listed(params: Any) -> list[Any]:
    """A group may hold one parameter, or an iterator that gives them once."""
    return [params] if isinstance(params, Tensor) else list(params)


def _settings(
    model: torch.nn.Module, held: Sequence[Any], horovod: Horovod, ranks: int
) -> tuple[list[tuple[str, torch.nn.Parameter]], dict[str, Any]]:
    """What a Reducer needs: parameters by name, in the model's order, and settings. Raises ConfigError."""
    rows = _with_rows(model)
    if rows and not horovod.sparse_as_dense:
        for field, value in (("op", "adasum"), ("compression", "fp16")):
            if getattr(horovod, field) == value:
                raise ConfigError(
                    f"horovod.{field}={value} cannot reduce sparse gradients", hint="set horovod.sparse_as_dense=true"
                )
    wanted = {id(parameter) for parameter in held}
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in wanted]
    if len(named) < len(wanted):
        raise ConfigError(
            f"the optimizer has {len(wanted) - len(named)} parameters that the model does not have",
            hint="what Task.parameters returns must be parameters of what Task.model returns",
        )
    return named, {
        "limit": horovod.bucket,
        "wire": _wire(horovod),
        "rows": rows,
        "dense": horovod.sparse_as_dense,
        "post": _before(horovod, ranks) / ranks if horovod.op == "average" else 1.0,
    }


def _before(horovod: Horovod, ranks: int) -> float:
    """What the loss is divided by for the average over ranks; the rest of the division follows the sum."""
    if horovod.op != "average" or ranks == 1:
        return 1.0
    return ranks if horovod.predivide is None else horovod.predivide


def _wire(horovod: Horovod) -> torch.dtype | None:
    return torch.float16 if horovod.compression == "fp16" else None


def _with_rows(model: torch.nn.Module) -> frozenset[str]:
    """Names of parameters whose gradients are sparse: those of embeddings that are declared so."""
    modules = model.named_modules()
    own = (m.named_parameters(name, recurse=False) for name, m in modules if getattr(m, "sparse", False))
    return frozenset(name for parameters in own for name, _ in parameters)
