"""An exponential moving average of parameters, for evaluation: shadow <- decay * shadow + (1 - decay) * new."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Ema:
    """The shadow parameters by name, in the parameters' own dtype. Equal on all ranks; nothing is collective."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shadow = {name: parameter.detach().clone() for name, parameter in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged parameters inside the block, and its own again after it, also on an exception."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)
