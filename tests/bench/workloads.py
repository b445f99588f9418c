"""The states that are saved in `checkpoints.py`, of float32 numbers on the CPU, the same for the same scale.

A   GPT-2 small with AdamW: 124 M parameters, 1.5 GB, 148 parameters and 2 moments of each
B   10,000 tensors of 1,000 to 20,000 numbers, 0.4 GB
BB  B as parameters, with AdamW: 30,000 tensors, 1.3 GB
C   one tensor of 40 % of 1 GB, the rest in 1,000 others
D   A, but each rank holds its part of the moments only, as with a sharded optimizer
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from harness.bench.contents import fill
from harness.bench.state import Training, with_adam
from harness.checkpoint import State
from harness.checkpoint.shards import Flat, Shard

NAMES = ("A", "B", "BB", "C", "D")


@dataclass(frozen=True)
class Part:
    """Numbers [lo, hi) of a flat global tensor of `length`."""

    tensor: torch.Tensor
    lo: int
    hi: int
    length: int


@dataclass(frozen=True)
class Workload:
    """`whole`: tensors that every rank holds, by name; `parts`: those that ranks hold in parts, in rank order.

    `training`: the same tensors as our checkpoints are given them.
    """

    name: str
    training: Training
    whole: dict[str, torch.Tensor]
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all ranks together, what they all hold counted once."""
        return sum(tensor.nbytes for tensor in self.whole.values()) + sum(4 * one.length for one in self.parts.values())

    @property
    def count(self) -> int:
        return len(self.whole) + len(self.parts)


def make(name: str, scale: float, rank: int, size: int) -> Workload:
    """`scale`: of the bytes; B has fewer tensors then, the others smaller ones."""
    if name == "A":
        return _adam(name, with_adam(gpt2(scale)))
    if name == "BB":
        return _adam(name, with_adam({f"layers.{index}": (n,) for index, n in enumerate(_many(scale))}))
    if name == "B":
        return _plain(name, _many(scale))
    if name == "C":
        others = max(4, round(1000 * min(1.0, 4 * scale)))
        rest = np.random.default_rng(3).dirichlet(np.full(others, 2.0)) * 150e6 * scale
        return _plain(name, [round(100e6 * scale), *(max(1, round(n)) for n in rest)])
    if name == "D":
        return _sharded(name, gpt2(scale), rank, size)
    raise ValueError(f"there is no workload {name!r}: {', '.join(NAMES)}")


def gpt2(scale: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Parameters of GPT-2 small by name, with fewer rows; for tests, of fewer layers.

    >>> len(gpt2()), sum(np.prod(shape) for shape in gpt2().values())
    (148, 124439808)
    """
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for layer in range(min(12, max(1, round(120 * scale)))):
        for name, (rows, columns) in (
            ("attn.c_attn", (768, 2304)),
            ("attn.c_proj", (768, 768)),
            ("mlp.c_fc", (768, 3072)),
            ("mlp.c_proj", (3072, 768)),
        ):
            shapes |= {f"h.{layer}.{name}.weight": (rows, columns), f"h.{layer}.{name}.bias": (columns,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (768,), f"h.{layer}.{name}.bias": (768,)}
    shapes |= {"ln_f.weight": (768,), "ln_f.bias": (768,)}
    return {name: (max(8, round(shape[0] * scale)), *shape[1:]) for name, shape in shapes.items()}


def _many(scale: float) -> list[int]:
    return np.random.default_rng(2).integers(1_000, 20_000, max(4, round(10_000 * scale))).tolist()


def _adam(name: str, training: Training) -> Workload:
    whole: dict[str, torch.Tensor] = {}
    state = training.state
    for key, parameter in state.model.named_parameters():
        whole[f"model.{key}"] = parameter.detach()
        whole |= {f"optimizer.{key}.{what}": tensor for what, tensor in state.optimizer.state[parameter].items()}
    return Workload(name, training, whole)


def _plain(name: str, counts: list[int]) -> Workload:
    whole = {f"t{index:06d}": torch.empty(n) for index, n in enumerate(counts)}
    fill(list(whole.values()), 1)
    return Workload(name, Training(State(tensors=whole), tuple(whole.values())), whole)


def _sharded(name: str, shapes: dict[str, tuple[int, ...]], rank: int, size: int) -> Workload:
    whole = {f"model.{key}": torch.empty(shape) for key, shape in shapes.items()}
    parts: dict[str, Part] = {}
    for key, tensor in whole.items():
        lo, hi = (tensor.numel() * at // size for at in (rank, rank + 1))
        for moment in ("exp_avg", "exp_avg_sq"):
            parts[key.replace("model", moment)] = Part(torch.empty(hi - lo), lo, hi, tensor.numel())
    fill(list(whole.values()), 1)
    fill([part.tensor for part in parts.values()], 10 + rank)
    moments = {key: Shard(part.tensor, Flat((part.length,), part.lo, part.hi)) for key, part in parts.items()}
    tensors = (*whole.values(), *(part.tensor for part in parts.values()))
    return Workload(name, Training(State(parameters=whole, moments=moments), tensors), whole, parts)
