"""Adasum (Maleki et al. 2020, arXiv:2006.02924): ranks take their own steps, and the steps are combined.

    take_combined_step(optimizer, named_parameters)

Steps that point the same way are averaged, orthogonal ones are added. Horovod combines them tensor by tensor. What is
not here: gradients; each rank's are its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.parallel.reducer import travels_as, wait


@torch.no_grad()
def take_combined_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    wire: torch.dtype | None = None,
) -> None:
    """Step each rank's optimizer and replace its step by all ranks' combined one. Collective.

    wire: the dtype in which steps travel; unset: the parameters' own, for bf16 fp32.
    """
    import horovod.torch as hvd

    before = [parameter.detach().clone() for _, parameter in parameters]
    optimizer.step()
    waiting = []
    for (name, parameter), start in zip(parameters, before, strict=True):
        step = torch.sub(parameter, start).to(wire or travels_as(parameter.dtype)).contiguous()
        waiting.append(hvd.allreduce_async_(step, name=f"steps/{name}", op=hvd.Adasum))
    for (_, parameter), start, handle in zip(parameters, before, waiting, strict=True):
        parameter.copy_(start + wait(handle))
