"""World: the three views agree; control collectives give every rank the same."""

from __future__ import annotations

import os

import numpy as np
import torch

from harness.clock import Clock
from harness.env import identify
from harness.metrics import Meter
from harness.pulse import Pulse, Wishes
from harness.world import World


def test_the_world_is_the_launchers(world: World) -> None:
    import horovod.torch as hvd

    assert (world.rank, world.size) == (identify().rank, identify().size) == (hvd.rank(), hvd.size())
    assert world.size == int(os.environ["HARNESS_RANKS"])
    assert len(world.hosts) == world.size
    assert world.controller == os.environ["HARNESS_CONTROLLER"]
    assert (world.comm.mpi is not None) == (world.controller == "mpi")
    if world.controller == "mpi":
        assert hvd.mpi_enabled()
        assert hvd.mpi_threads_supported()


def test_exchange_gives_the_same_table_to_all(world: World) -> None:
    table = world.exchange([world.rank, world.rank**2, -1.5], "test/exchange")
    expected = [[rank, rank**2, -1.5] for rank in range(world.size)]
    assert table.dtype == np.float64
    assert table.tolist() == expected


def test_broadcast_of_every_dtype_and_layout(world: World) -> None:
    generator = torch.Generator().manual_seed(7 + world.rank)
    numbers = torch.randn(3, 4, 5, 6, generator=generator)
    expected = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(7))

    def variants(base: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "fp32": base.clone(),
            "fp64": base.double(),
            "fp16": base.half(),
            "bf16": base.bfloat16(),
            "bool": base > 0,
            "int8": (base * 10).to(torch.int8),
            "int64": (base * 1e6).long(),
            "complex": torch.complex(base, -base),
            "channels_last": base.clone().contiguous(memory_format=torch.channels_last),
            "transposed": base.clone().permute(3, 1, 0, 2),
            "scalar": base[0, 0, 0, 0].clone(),
            "empty": base[:0].clone(),
        }

    mine = variants(numbers)
    strides = {name: tensor.stride() for name, tensor in mine.items()}
    world.broadcast_tensors(mine.items(), "test/broadcast")
    for name, wanted in variants(expected).items():
        assert torch.equal(mine[name], wanted), name
        assert mine[name].stride() == strides[name], name


def test_the_mean_of_tensors(world: World) -> None:
    tensors = {
        "half": torch.full((3,), 60000.0, dtype=torch.float16),
        "bf16": torch.tensor([float(world.rank)], dtype=torch.bfloat16),
        "strided": torch.full((4, 2), float(world.rank)).t(),
        "count": torch.tensor(world.rank),
    }
    world.average_tensors(tensors.items(), "test/average")
    mean = (world.size - 1) / 2
    assert tensors["half"].tolist() == [60000.0] * 3, "the sum would not fit"
    assert tensors["bf16"].item() == mean and torch.equal(tensors["strided"], torch.full((2, 4), mean))
    assert tensors["count"].item() == world.rank, "a count has no mean"


def test_json_collectives(world: World) -> None:
    assert world.comm.broadcast({"rank": world.rank, "x": [1.5, None, "ä"]}) == {"rank": 0, "x": [1.5, None, "ä"]}
    assert world.comm.all_gather([world.rank, "é" * world.rank]) == [[r, "é" * r] for r in range(world.size)]


def test_an_interval_combines_all_ranks(world: World) -> None:
    meter, clock = Meter(), Clock()
    for step in range(3):
        meter.add([torch.tensor(float(world.rank + step))])
    clock.seconds["data"] = 3.0 if world.rank == world.size - 1 else 0.3
    asked = Pulse(0).ask(world.rank == world.size - 1, False, False)
    interval = meter.exchange(world, clock, sent=100.0 * (world.rank + 1), asked=asked)
    assert interval.loss == np.mean([rank + step for rank in range(world.size) for step in range(3)])
    assert Pulse(0).hear(3, interval.asked) == Wishes(stop=True)
    assert interval.slowest == world.size - 1
    assert interval.sections["data"] > 0.09
