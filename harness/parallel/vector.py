"""The trained parameters of a model as vectors, one per group of its optimizer, each cut into equal slices.

>>> equal_cuts(10, 4)
[0, 2, 5, 7, 10]

What is not here: messages (`server.py`). Nothing is collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.errors import ConfigError


def equal_cuts(length: int, parts: int) -> list[int]:
    """Where each of `parts` slices begins, and the end; their lengths differ by one at most. Pure."""
    return [length * part // parts for part in range(parts + 1)]


class Vector:
    """`groups`: parameters by group, in the optimizer's order. `cuts`: for each group, where the slices begin and end.

    Vectors are on the CPU. Raises ConfigError where parameters are of several dtypes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, slices: int) -> None:
        self.groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        kinds = {parameter.dtype for group in self.groups for parameter in group}
        if not kinds <= {torch.float32, torch.float64} or len(kinds) > 1:
            raise ConfigError(
                f"a parameter server needs parameters of fp32 or fp64 alone, not of {', '.join(map(str, kinds))}"
            )
        self.dtype = kinds.pop() if kinds else torch.float32
        self.sizes = [sum(parameter.numel() for parameter in group) for group in self.groups]
        self.cuts = [equal_cuts(size, slices) for size in self.sizes]
        self._slices = slices

    def length(self, server: int) -> int:
        """Elements of a slice, over all groups."""
        return sum(cuts[server + 1] - cuts[server] for cuts in self.cuts)

    def empty(self) -> list[Tensor]:
        """Vectors to be filled."""
        return [torch.empty(size, dtype=self.dtype) for size in self.sizes]

    def pack(self, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Vectors of what `of` gives for each parameter, which has its shape."""
        vectors = self.empty()
        for vector, group in zip(vectors, self.groups, strict=True):
            if group:
                torch.cat([of(parameter).reshape(-1).cpu() for parameter in group], out=vector)
        return vectors

    def part(self, vectors: Sequence[Tensor], server: int) -> Tensor:
        """A server's slices of all vectors, one behind the other."""
        return torch.cat([v[cuts[server] : cuts[server + 1]] for v, cuts in zip(vectors, self.cuts, strict=True)])

    def joined(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Vectors from every server's `part`."""
        lengths = [[cuts[server + 1] - cuts[server] for cuts in self.cuts] for server in range(self._slices)]
        pieces = [torch.split(part, length) for part, length in zip(parts, lengths, strict=True)]
        return [torch.cat([of[group] for of in pieces]) for group in range(len(self.groups))]

    @torch.no_grad()
    def fill(self, vectors: Sequence[Tensor]) -> None:
        """The parameters become what the vectors say."""
        for vector, group in zip(vectors, self.groups, strict=True):
            for parameter, values in zip(group, self._split(vector, group), strict=True):
                parameter.copy_(values.view(parameter.shape))

    def give(self, optimizer: torch.optim.Optimizer, key: str, vectors: Sequence[Tensor]) -> None:
        """The optimizer's state of this key becomes what the vectors say."""
        for vector, group in zip(vectors, self.groups, strict=True):
            for parameter, values in zip(group, self._split(vector, group), strict=True):
                optimizer.state[parameter][key] = values.view(parameter.shape).to(parameter.device, copy=True)

    def elementwise(self, optimizer: torch.optim.Optimizer, key: str) -> bool:
        """Whether this state has a number for each element of every parameter."""
        states = [(p, optimizer.state.get(p, {}).get(key)) for group in self.groups for p in group]
        return all(isinstance(value, Tensor) and value.shape == p.shape for p, value in states)

    @staticmethod
    def _split(vector: Tensor, group: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.split(vector, [parameter.numel() for parameter in group])
