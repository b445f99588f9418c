"""Least squares by gradient descent, on scikit-learn's diabetes data: must reach numpy's solution.

400 of the 442 patients are trained on, all in one batch, in double precision. `distance` is the relative distance of
the weights to the least-squares solution; plain gradient descent halves it every 130 steps or so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

from harness.order import Ids, Order, Seeds
from harness.task import Split, Task

TRAIN = 400
"""Divides by 1, 2, 4, 5, 8, 10, 16, 20, ... ranks."""


@dataclass(frozen=True)
class Rows:
    """float64 (samples, 10) and (samples, 1)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, ids: Ids, seeds: Seeds) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(ids)
        return self.x[at], self.y[at]


class Linear(Task):
    """Ten standardised measurements -> the standardised progression of the disease a year later."""

    def __init__(self, split_seed: int = 0) -> None:
        x, y = load_diabetes(return_X_y=True, scaled=False)
        order = Order(len(x), split_seed).ids(0, len(x))
        x, y = x[order], y[order, None]
        self.x = torch.from_numpy((x - x[:TRAIN].mean(0)) / x[:TRAIN].std(0))  # float64 (442, 10)
        self.y = torch.from_numpy((y - y[:TRAIN].mean(0)) / y[:TRAIN].std(0))  # float64 (442, 1)

    def model(self) -> nn.Module:
        model = nn.Linear(self.x.shape[1], 1, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def data(self, split: Split) -> Rows:
        part = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
        return Rows(self.x[part], self.y[part])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)

    def summarize(self, model: nn.Module, metrics: Mapping[str, float]) -> Mapping[str, float]:
        weights = np.concatenate([parameter.detach().cpu().numpy().ravel() for parameter in model.parameters()])
        exact = self.solution
        return {"distance": float(np.linalg.norm(weights - exact) / np.linalg.norm(exact))}

    @cached_property
    def solution(self) -> NDArray[np.float64]:
        """Weights and bias of the least-squares fit to the training rows, by numpy.linalg.lstsq."""
        x = np.column_stack([self.x[:TRAIN].numpy(), np.ones(TRAIN)])
        solution: NDArray[np.float64] = np.linalg.lstsq(x, self.y[:TRAIN, 0].numpy(), rcond=None)[0]
        return solution
