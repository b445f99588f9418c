"""One optimizer step over all ranks: THE place that knows Horovod's order of calls.

    update.begin(factor)                                              learning rates of this step
    for each of `passes` micro batches:   update.backward(loss)      gradients travel while the last backward runs
    update.synchronize()                                              wait for them: averaged or summed
    update.step()                                                     unscale -> finite? -> clip -> step -> zero

Any other order is silently wrong with Horovod: clipping before the wait clips a local gradient, a scaler that skips
leaves handles open, `zero_grad(set_to_none=...)` is refused, hooks on the wrapped optimizer are lost.

A loss that is not finite on one rank is made to spoil that rank's whole gradient (`_poison`), so that the reduced
gradient tells all ranks the same thing and no extra collective is needed to agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.config import Horovod, Train
from harness.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """What a step did. `grad_norm`: L2 norm of the reduced gradient before clipping, None when not computed."""

    grad_norm: float | None
    finite: bool
    taken: bool


class Update:
    """Owns the optimizer, the gradient scaler and the accumulation of one model.

    `optimizer` must be fresh: Horovod's wrapper drops the state of one that has any. Restore state into
    `self.optimizer` afterwards. `ranks`, `process_set`: those over which gradients are reduced; None: all.
    """

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
        process_set: Any = None,
    ) -> None:
        if train.precision == "fp16" and device.type == "cpu":
            raise ConfigError("train.precision fp16 needs a GPU", hint="use bf16, which CPUs compute as well")
        self.passes = passes
        self.device = device
        self.train = train
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.optimizer: Any = (
            _distribute(model, optimizer, horovod, passes, ranks, process_set) if ranks > 1 else optimizer
        )
        self.distributed = ranks > 1
        self.adasum = self.distributed and horovod.op == "adasum"
        self.scaler = torch.amp.GradScaler(device.type) if train.precision == "fp16" else None

    def autocast(self) -> Any:
        """The context of the forward pass; parameters stay fp32 (Horovod reduces no bf16)."""
        if self.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.train.precision == "bf16" else torch.float16)

    def begin(self, factor: float) -> None:
        """Set the learning rates of this step to their peaks times `factor`; Adasum uses them during backward."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def backward(self, loss: Tensor) -> None:
        """Add one micro batch's gradient. `loss` is its mean over samples, a scalar."""
        if self.train.nonfinite != "ignore":
            loss = _poison(loss)
        if self.passes > 1:
            loss = loss / self.passes
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait until every gradient is reduced. Collective."""
        if self.distributed:
            self.optimizer.synchronize()

    def step(self) -> Step:
        """Use the reduced gradient. Not collective, but for Adasum; all ranks do the same."""
        if self.adasum:
            return self._adasum_step()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = None
        if self.train.nonfinite != "ignore" or self.train.clip_norm is not None:
            norm = float(_norm(self._gradients()))
        finite = norm is None or norm - norm == 0.0  # false for nan and for both infinities
        taken = finite or self.train.nonfinite == "ignore"
        if taken:
            self._clip(norm)
        with self.optimizer.skip_synchronize() if self.distributed else nullcontext():
            if self.scaler is not None:
                if taken:
                    self.scaler.step(self.optimizer)  # skips by itself where it found an infinity
                self.scaler.update()
            elif taken:
                self.optimizer.step()
        if taken or self.train.nonfinite == "skip" or self.scaler is not None:
            self.optimizer.zero_grad()
        return Step(norm, finite, taken)

    def _adasum_step(self) -> Step:
        """Horovod's Adasum takes each rank's own step in backward and combines the steps: no gradient to clip or skip.

        So what is not finite shows only in the parameters, on all ranks alike. Collective.
        """
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.train.nonfinite == "ignore":
            return Step(None, True, True)
        total = float(_norm(p.detach() for group in self.optimizer.param_groups for p in group["params"]))
        return Step(None, total - total == 0.0, True)

    def _gradients(self) -> Iterator[Tensor]:
        """The dense values of every gradient, sparse ones summed over repeated rows first."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
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


def _distribute(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Horovod,
    passes: int,
    ranks: int,
    process_set: Any = None,
) -> Any:
    import horovod.torch as hvd

    if settings.op == "adasum" and ranks & (ranks - 1):
        raise ConfigError(f"horovod.op=adasum needs 2, 4, 8, ... ranks, not {ranks}")
    if settings.op == "adasum" and not hvd.mpi_enabled():
        raise ConfigError("horovod.op=adasum needs MPI; Horovod has no Adasum over Gloo", hint="use mpirun or srun")
    if any(_sparse_embeddings(model)):
        if settings.groups is not None:
            raise ConfigError("horovod.groups cannot hold sparse gradients", hint="leave horovod.groups unset")
        for field, value in (("op", "adasum"), ("compression", "fp16")):
            if getattr(settings, field) == value and not settings.sparse_as_dense:
                raise ConfigError(
                    f"horovod.{field}={value} cannot reduce sparse gradients", hint="set horovod.sparse_as_dense=true"
                )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    plain = all(parameter.is_contiguous() and parameter.dtype != torch.bfloat16 for parameter in parameters)
    if settings.compression == "fp16":
        compression = hvd.Compression.fp16
    else:
        compression = hvd.Compression.none if plain else LayoutCompression
    try:
        return hvd.DistributedOptimizer(
            optimizer,
            named_parameters=list(model.named_parameters()),
            compression=compression,
            backward_passes_per_step=passes,
            op={"average": hvd.Average, "sum": hvd.Sum, "adasum": hvd.Adasum}[settings.op],
            gradient_predivide_factor=settings.predivide,
            groups=settings.groups,
            sparse_as_dense=settings.sparse_as_dense,
            process_set=process_set or hvd.global_process_set,
        )
    except ValueError as error:
        raise ConfigError(f"Horovod refuses these settings: {error}") from error


class LayoutCompression:
    """For gradients that Horovod refuses as they are: bf16 travels as fp32, channels_last as a contiguous copy.

    The result is written back in the gradient's own layout, because torch's fused optimizers take a gradient's
    strides to be its parameter's.
    """

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Tensor]:
        return tensor.to(torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype).contiguous(), tensor

    @staticmethod
    def decompress(tensor: Tensor, like: Tensor | None) -> Tensor:
        return tensor if like is None else torch.empty_like(like).copy_(tensor)  # None: sparse, never compressed


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


def _sparse_embeddings(model: torch.nn.Module) -> Iterator[bool]:
    return (bool(getattr(module, "sparse", False)) for module in model.modules())
