"""Differentiable collectives and cut layers: torch's gradcheck on doubles, and the layers that are not cut.

Every rank has the same whole tensors and perturbs the same element: `copied` gives it the gradient of all ranks' parts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.collectives import copied, gathered, summed
from harness.parallel.groups import Group
from harness.parallel.tensor import (
    ColumnLinear,
    RowLinear,
    VocabEmbedding,
    cross_entropy,
    cut,
    dropout_mask,
    whole_logits,
)
from harness.world import World

Regroup = Callable[..., World]


@pytest.fixture(params=[1, 2, 4])
def group(request: pytest.FixtureRequest, world: World, regrouped: Regroup) -> Group:
    if world.size % request.param:
        pytest.skip("not with so many ranks")
    return regrouped(model=request.param).groups.model


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """The same on all ranks."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def part(x: Tensor, dimension: int, group: Group) -> Tensor:
    return x.chunk(group.size, dimension)[group.index]


def test_gradients_of_the_collectives(group: Group) -> None:
    def mixed(x: Tensor) -> Tensor:
        mine = part(copied(x, group, "c"), 1, group).square()
        return gathered(mine * (group.index + 1), group, "g").sin() + summed(mine.sum(), group, "s")

    assert torch.autograd.gradcheck(mixed, (drawn(2, 4),))


def test_what_is_sent_is_counted(group: Group) -> None:
    before = group.traffic.sent
    summed(torch.ones(10), group, "counted")
    assert group.traffic.sent - before == 2 * (group.size - 1) / group.size * 40


def test_a_gather_is_in_the_order_of_the_group(group: Group) -> None:
    mine = torch.full((2, 1), float(group.index))
    assert gathered(mine, group, "order").tolist() == [list(range(group.size))] * 2
    half = summed(torch.full((3,), 40000.0, dtype=torch.float16), group, "half")
    assert half.dtype == torch.float16
    assert summed(mine.bfloat16(), group, "bf16").dtype == torch.bfloat16


def test_gradients_of_cut_layers(group: Group) -> None:
    tokens = torch.tensor([0, 3, 7, 3])

    def losses(table: Tensor, up: Tensor, bias: Tensor, down: Tensor, head: Tensor) -> Tensor:
        def mine(x: Tensor, dimension: int) -> Tensor:
            return part(copied(x, group, "whole"), dimension, group)

        embedding = VocabEmbedding(8, 3)
        column, row, last = ColumnLinear(3, 4), RowLinear(4, 3, bias=False), ColumnLinear(3, 8, bias=False)
        for layer in (embedding, column, row, last):
            layer.group, layer.label = group, type(layer).__name__
            for key in list(layer._parameters):
                delattr(layer, key)
        embedding.weight, row.weight, row.bias = mine(table, 0), mine(down, 1), None
        column.weight, column.bias, last.weight, last.bias = mine(up, 0), mine(bias, 0), mine(head, 0), None
        x = row(torch.tanh(column(embedding(tokens))))
        return cross_entropy(last(x), torch.tensor([1, 0, 5, 7]), group)

    whole = drawn(8, 3), drawn(4, 3, seed=1), drawn(4, seed=2), drawn(3, 4, seed=3), drawn(8, 3, seed=4)
    torch.manual_seed(0)  # the fast mode, for the slower of the groups, draws directions: the same on all ranks
    assert torch.autograd.gradcheck(losses, whole, fast_mode=group.size == 4)


class Net(nn.Module):
    """A model of every kind of layer that can be cut, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = VocabEmbedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = ColumnLinear(8, 12), RowLinear(12, 8)
        self.head = ColumnLinear(8, 16, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(self.norm(x)))))
        return logits


def test_a_cut_model_computes_what_the_whole_one_does(group: Group) -> None:
    torch.manual_seed(3)
    whole = Net().double()
    torch.manual_seed(3)
    model = Net().double()
    regions = cut(model, group)
    assert model.head.weight is model.token.weight, "tied parameters stay one"
    tokens, targets = torch.arange(24) % 16, (torch.arange(24) * 5) % 16
    losses = []
    for net, over in ((whole, Group((0,), 0)), (model, group)):
        logits = net(tokens)
        loss = cross_entropy(logits, targets, over)
        loss.backward()
        losses.append((loss.detach(), whole_logits(logits.detach(), over)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses[0][0], F.cross_entropy(losses[0][1], targets))
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        box = regions.get(name)
        part = (
            theirs.grad
            if box is None
            else theirs.grad[tuple(slice(a, a + n) for a, n in zip(box.start, box.count, strict=True))]
        )
        torch.testing.assert_close(mine.grad, part, rtol=1e-12, atol=1e-12, msg=name)
    cuts = {"token.weight", "up.weight", "up.bias", "down.weight"}
    assert regions.keys() == (set() if group.size == 1 else cuts)


def test_a_dropout_mask_does_not_depend_on_the_group(group: Group) -> None:
    torch.manual_seed(5)
    whole = torch.empty(2, 8, 3).bernoulli_(0.7) / 0.7
    torch.manual_seed(5)
    mine = dropout_mask((2, 8 // group.size, 3), 1, 0.3, group, torch.empty(0))
    assert torch.equal(mine, part(whole, 1, group))
