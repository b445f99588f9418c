"""States to save and restore, and how to compare them by bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import Manager, Single

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "SGD, nesterov, maximize": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, maximize=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam, fused, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam, lr a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "Adam, betas tensors": lambda p: torch.optim.Adam(p, lr=0.01, betas=(torch.tensor(0.9), torch.tensor(0.99))),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=2.0),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
    "LBFGS, line search": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
    "Muon": lambda p: torch.optim.Muon([parameter for parameter in p if parameter.ndim == 2], lr=0.01),
}
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if hasattr(torch.optim, name.partition(",")[0])}
"""Every optimizer of torch but the one of sparse gradients: parameters -> optimizer."""


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
