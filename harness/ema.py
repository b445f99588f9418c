"""An exponential moving average of parameters, for evaluation: shadow <- decay * shadow + (1 - decay) * new.

Where the optimizer is cut over ranks (`parallel/sharded.py`), the average is, too: of a parameter each rank has the
elements that it steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.parallel.sharded import Sharded


class Ema:
    """The shadow parameters by name, in the parameters' own dtype; those that `sharded` cuts as slices.

    Equal on all ranks, or their slices.
    """

    def __init__(self, model: torch.nn.Module, decay: float, sharded: Sharded | None = None) -> None:
        self.decay = decay
        whole = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._sharded = sharded
        if sharded is not None:
            sharded.load()
            whole |= sharded.slices
        self.live = whole
        self.shadow = {name: live.detach().clone() for name, live in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step. Not collective."""
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged parameters inside the block, and its own again after it.

        Collective where the average is cut. After an exception all of it is as before where it is not.
        """
        if self._sharded is not None:
            self._sharded.load()
            self._sharded.gather(self.shadow)
            yield
            self._sharded.gather()  # the slices still have what the parameters had
            return
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
