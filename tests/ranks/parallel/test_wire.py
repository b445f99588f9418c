"""Tensors from rank to rank."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError
from harness.parallel.wire import DTYPES, Wire
from harness.world import World


def test_tensors_of_any_kind_go_round_without_waiting(world: World) -> None:
    wire = Wire(world.comm.mpi, torch.device("cpu"))
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    shapes = ((), (0, 3), (5,), (2, 3, 4))

    def made(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.arange(torch.Size(shape).numel()).view(shape) + rank).to(dtype)

    kinds = [(dtype, shape) for dtype in DTYPES for shape in shapes]
    for tag, (dtype, shape) in enumerate(kinds):  # all are sent before any is received
        wire.send(made(world.rank, dtype, shape), after, tag)
    wire.send(torch.full((1 << 20,), float(world.rank)).view(1024, 1024).t(), after, len(kinds))
    for tag in reversed(range(len(kinds))):
        dtype, shape = kinds[tag]
        got = wire.receive(before, tag)
        assert got.dtype == dtype and torch.equal(got, made(before, dtype, shape))
    assert torch.equal(wire.receive(before, len(kinds)), torch.full((1024, 1024), float(before)))
    wire.finish()
    assert wire.traffic.sent > 4 << 20
    with pytest.raises(ConfigError, match="complex64 of shape"):
        wire.send(torch.zeros(1, dtype=torch.complex64), after, 0)
