"""Collectives of a group that know their gradient, for layers whose parameters are cut over the group.

All ranks of the group compute the same loss from the same inputs, each with its part of the parameters. Of a tensor
that all have alike, gradients then are alike, too; of one that differs, each rank has the gradient of its own.
(Horovod's own gradients mean a loss that is summed over ranks: for a gather they are off by the number of ranks.)

    copied     all have x alike and use it differently            gradient: the sum over ranks
    summed     the sum over ranks, which all have alike           gradient: as it comes
    gathered   all ranks' x, one after the other in the last      gradient: this rank's part
               dimension, which all have alike

After Shoeybi et al. 2019, arXiv:1909.08053 (their f and g). Each is collective in its group, forward and backward; a
rank alone does nothing. `name` tells operations apart that are under way at once. bf16 and fp16 travel as fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.parallel.groups import Group
from harness.parallel.reducer import wait
from harness.parallel.traffic import allgather_bytes, allreduce_bytes


def copied(x: Tensor, group: Group, name: str) -> Tensor:
    """x itself; its gradient is the sum of all ranks' gradients."""
    return x if group.size == 1 else _Copied.apply(x, group, name)  # type: ignore[no-untyped-call]


def summed(x: Tensor, group: Group, name: str) -> Tensor:
    """The sum of all ranks' x, of one shape."""
    return x if group.size == 1 else _Summed.apply(x, group, name)  # type: ignore[no-untyped-call]


def gathered(x: Tensor, group: Group, name: str) -> Tensor:
    """All ranks' x (..., n) as (..., size * n); n is the same on all ranks."""
    return x if group.size == 1 else _Gathered.apply(x, group, name)  # type: ignore[no-untyped-call]


@torch.no_grad()
def greatest(x: Tensor, group: Group, name: str) -> Tensor:
    """The greatest of all ranks' x, element by element; has no gradient."""
    import horovod.torch as hvd

    return x if group.size == 1 else _reduce(x, group, name, hvd.Max)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str) -> Tensor:
        ctx.group, ctx.name = group, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(gradients[0], ctx.group, f"{ctx.name}/backward"), None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str) -> Tensor:
        return _sum(x, group, f"{name}/forward")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str) -> Tensor:
        import horovod.torch as hvd

        ctx.begin, ctx.count = group.index * x.shape[-1], x.shape[-1]
        last_first = _for_the_wire(x.movedim(-1, 0))
        group.traffic.sent += allgather_bytes(last_first.nbytes, group.size)
        whole = wait(hvd.allgather_async(last_first, name=f"{name}/gather", process_set=group.process_set))
        return whole.movedim(0, -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].narrow(-1, ctx.begin, ctx.count), None, None


def _sum(x: Tensor, group: Group, name: str) -> Tensor:
    import horovod.torch as hvd

    return _reduce(x, group, name, hvd.Sum)


def _reduce(x: Tensor, group: Group, name: str, op: Any) -> Tensor:
    import horovod.torch as hvd

    mine = _for_the_wire(x)
    group.traffic.sent += allreduce_bytes(mine.nbytes, group.size)
    return wait(hvd.allreduce_async(mine, op=op, name=name, process_set=group.process_set)).to(x.dtype)


def _for_the_wire(x: Tensor) -> Tensor:
    """Horovod takes no bf16 and only contiguous tensors; sums of fp16 would overflow."""
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).detach().contiguous()
