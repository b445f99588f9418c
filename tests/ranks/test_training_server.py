"""Parameter servers on real ranks: the same mathematics as allreduce, staleness that is bounded, checkpoints of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_training import OUT, assert_same_bits, directory, finish, records, settings, start, stop_at

from harness.errors import ConfigError
from harness.parallel.server import Server, Worker
from harness.world import World

BATCH = {"train.global_batch": 24, "train.micro_batch": 2}
"""For 1, 2 and 3 workers, and for 4 ranks without a server."""
SERVER: dict[str, Any] = {"parallel": {"strategy": "parameter_server"}} | BATCH


def with_servers(world: World, servers: int = 1) -> World:
    """Where there are ranks enough and MPI."""
    if world.controller != "mpi" or world.size <= servers:
        pytest.skip("needs MPI, and a rank beside the servers")
    return replace(world, servers=servers)


def parameters(job: Any) -> list[torch.Tensor]:
    with job.update.shared():
        return [parameter.detach().clone() for parameter in job.model.parameters()]


def curve(path: Any, kind: str = "train") -> list[float]:
    return [record["loss"] for record in records(path, kind)]


@pytest.mark.parametrize(("name", "servers"), [("adamw", 1), ("momentum", 2), ("adagrad", 2)])
def test_synchronous_servers_do_what_allreduce_does(world: World, name: str, servers: int) -> None:
    """Losses, evaluations and parameters; slices of a vector step as tensors do."""
    served = with_servers(world, servers)
    changes = {"optim": {"name": name, "lr": 0.01}} | BATCH
    path = directory(world, "served")
    parallel = {"parallel": {"strategy": "parameter_server", "servers": servers}}
    job = start(served, settings("digits", path, **changes, **parallel))
    finish(job)
    reference = start(world, settings("digits", directory(world, "reduced"), **changes))
    finish(reference)
    for one, other in zip(parameters(job), parameters(reference), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)
    if world.is_root:
        for kind in ("train", "eval"):
            assert curve(path, kind) == pytest.approx(curve(OUT / f"{world.size}-reduced", kind), rel=1e-4)
    bytes_of_slice = sum(p.nbytes for p in job.model.parameters()) / servers
    if isinstance(job.update, Worker):
        assert job.update.sent == pytest.approx(8 * servers * bytes_of_slice)
    else:
        assert job.update.sent >= 8 * (world.size - servers) * (bytes_of_slice - 16)


def test_a_stopped_run_goes_on_by_bits_and_in_other_forms(world: World) -> None:
    served = with_servers(world)
    straight = start(served, settings("digits", directory(world, "served-straight"), **SERVER))
    finish(straight)
    path = directory(world, "served-resumed")
    config = settings("digits", path, **SERVER, checkpoint={})
    stop_at(served, config, 5)
    resumed = start(served, config)
    finish(resumed)
    assert_same_bits(parameters(resumed), parameters(straight))
    after = start(world, settings("digits", path, **BATCH | {"train.steps": 10}))
    finish(after)  # allreduce, with the optimizer's state that the servers had
    again = start(served, settings("digits", path, **SERVER, **{"train.steps": 12}))
    finish(again)
    assert again.progress.step == 12
    if world.is_root:
        losses = curve(path)
        assert len(losses) == 12 and losses[-1] < losses[0]


@pytest.mark.parametrize("staleness", [1, "unbounded"])
def test_workers_may_be_apart(world: World, staleness: Any) -> None:
    """Every gradient is used once; no worker is further ahead than it may be; it learns."""
    served = with_servers(world)
    path = directory(world, "served-loose")
    changes = {"parallel": {"strategy": "parameter_server", "staleness": staleness}, "train.steps": 24}
    changes |= {"optim": {"name": "adamw", "lr": 0.02}, "schedule": {}}
    job = start(
        served, settings("digits", path, **SERVER | changes, log={"every": 6}, eval={}, checkpoint={"every": 12})
    )
    apart: list[int] = []
    if isinstance(job.update, Server):
        take, clocks = job.update._take, job.update._clocks

        def look(worker: int, gradient: torch.Tensor) -> None:
            take(worker, gradient)
            apart.append(max(clocks) - min(clocks))

        job.update._take = look
    finish(job)
    if isinstance(job.update, Server):
        assert job.update._clocks == [24] * (world.size - 1) and len(apart) == 24 * (world.size - 1)
        # a worker computes its next gradient while it is still within bounds
        assert max(apart) <= (staleness + 1 if staleness != "unbounded" else 6)
    if world.is_root:
        assert curve(path)[-1] < 0.95 * curve(path)[0]


def test_a_bad_sample_is_left_out(world: World) -> None:
    served = with_servers(world)
    job = start(served, settings("digits", directory(world, "served-bad"), **SERVER, **{"train.nonfinite": "skip"}))
    job.task.images[int(job.order.ids(0, 96)[95])] = float("nan")  # falls to the last worker
    finish(job)
    assert all(value.isfinite().all() for value in parameters(job))


def test_without_mpi_it_is_refused(world: World) -> None:
    if world.controller == "mpi":
        pytest.skip("there is MPI")
    with pytest.raises(ConfigError, match="sends its messages over MPI, which is not there"):
        start(replace(world, servers=1), settings("digits", directory(world, "served-gloo"), **SERVER))
