"""States to save and restore, and how to compare them by bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import Manager, Single


def bits(value: Any) -> Any:
    """A value with every tensor replaced by its dtype, shape and bytes, so that == compares by bits."""
    if isinstance(value, torch.Tensor):
        if value.is_sparse:
            return ("sparse", tuple(value.shape), value.is_coalesced(), bits(value._indices()), bits(value._values()))
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        flat = torch.view_as_real(flat) if flat.is_complex() else flat
        return (str(value.dtype), tuple(value.shape), bytes(flat.contiguous().view(torch.uint8).numpy()))
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bits(item) for item in value)
    return value


class Net(torch.nn.Module):
    """Parameters, buffers, a tied weight, odd sizes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.hidden = torch.nn.Linear(6, 6, bias=False)
        self.head = torch.nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.tanh(self.hidden(self.norm(self.embedding(words)))))
        return result


def train(model: torch.nn.Module, optimizer: Any, steps: Iterator[int] | range) -> None:
    """Some steps, each determined by its number alone."""
    for step in steps:
        words = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(step))

        def closure(words: torch.Tensor = words) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(words), words.roll(1))
            loss.backward()
            return loss

        if "LBFGS" in type(optimizer).__name__:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def manager(directory: Path, **options: Any) -> Manager:
    """A manager of one process that keeps what it says in `lines`; a save returns once it is durable."""
    lines: list[str] = []
    made = Manager(directory, Single(), log=lines.append, **{"background": False, **options})
    made.lines = lines  # type: ignore[attr-defined]
    return made
