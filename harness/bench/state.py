"""A training's state of a wished size: parameters of a module, and the moments that Adam has of each of them.

    training = make(lengths(8 << 30, tensors=450))
    manager.save(0, training.state)

Not a model: nothing can be computed with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from harness.bench.contents import fill
from harness.checkpoint import State
from harness.errors import UsageError

SMALL = 1024
"""Elements of every second parameter, as biases and norms have, where there is room."""
_EACH = 3
"""A parameter and its two moments."""


@dataclass(frozen=True)
class Training:
    """A state, and the tensors of it that hold numbers: those of 4 bytes, without Adam's counts of steps."""

    state: State
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def lengths(size: int, tensors: int) -> list[int]:
    """Elements of each parameter, so that they and their moments are about so many tensors and bytes, rather fewer.

    Raises UsageError where that leaves nothing for some.

    >>> lengths(12 * 10_000, 12)
    [3976, 1024, 3976, 1024]
    """
    parameters = -(-tensors // _EACH)
    elements = size // (4 * _EACH)
    if elements < parameters:
        raise UsageError(
            f"{size} bytes are too few for {tensors} tensors", hint="give a larger --size, or fewer --tensors"
        )
    small = min(SMALL, elements // parameters)
    large = (elements - small * (parameters // 2)) // (parameters - parameters // 2)
    return [small if index % 2 else large for index in range(parameters)]


def make(counts: Sequence[int], seed: int = 1) -> Training:
    """Parameters with so many elements each, float32, with AdamW; the same on all ranks."""
    return with_adam(
        {f"layers.{index // 2}.{'bias' if index % 2 else 'weight'}": (n,) for index, n in enumerate(counts)}, seed
    )


def with_adam(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> Training:
    """Parameters of these names and shapes, with AdamW as it is after its first step."""
    model = torch.nn.Module()
    parameters = {}
    for name, shape in shapes.items():
        *path, last = name.split(".")
        owner = model
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        parameters[name] = torch.nn.Parameter(torch.empty(shape))
        owner.register_parameter(last, parameters[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    moments = []
    for parameter in parameters.values():
        state = {"step": torch.tensor(1.0), "exp_avg": torch.empty(parameter.shape)}
        state["exp_avg_sq"] = torch.empty(parameter.shape)
        optimizer.state[parameter] = state
        moments += [state["exp_avg"], state["exp_avg_sq"]]
    tensors = (*(parameter.detach() for parameter in parameters.values()), *moments)
    fill(tensors, seed)
    return Training(State(model=model, optimizer=optimizer), tensors)
