"""Whole runs with local steps: bits after a stop inside a round, other forms and ranks, partitions, bad samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_local import common
from test_training import OUT, assert_same_bits, bits, directory, finish, records, settings, start, stop_at

from harness.checkpoint import Manager, Single, State
from harness.errors import InternalError
from harness.nonfinite import handle_nonfinite
from harness.parallel.local import LocalSteps
from harness.parallel.settings import Outer
from harness.partition import file as partitions
from harness.partition import methods
from harness.update import OPTIONAL
from harness.world import World

LOCAL: dict[str, Any] = {"parallel": {"average_every": 3}, "eval": {"every": 2}}
FORMS = [
    LOCAL,
    LOCAL | {"parallel": {"average_every": 3, "outer": {}}, "optim": {"name": "adamw", "lr": 0.01}},
]


@pytest.mark.parametrize("changes", FORMS, ids=["momentum", "outer+adamw"])
def test_a_run_stopped_inside_a_round_goes_on_by_bits(world: World, changes: dict[str, Any]) -> None:
    """Steps 4 and 5 are inside a round of three; each rank has its own model and momentum there."""
    straight = start(world, settings("digits", directory(world, "local-straight"), **changes))
    finish(straight)
    path = directory(world, "local-resumed")
    config = settings("digits", path, **changes, checkpoint={})
    stop_at(world, config, 5)
    resumed = start(world, config)
    finish(resumed)
    assert_same_bits(bits(resumed), bits(straight))
    curves = [
        [(r["step"], r["loss"]) for kind in ("train", "eval") for r in records(OUT / f"{world.size}-local-{way}", kind)]
        for way in ("straight", "resumed")
    ]
    assert not world.is_root or curves[0] == curves[1]


def test_other_forms_and_other_ranks_go_on_from_the_mean(world: World) -> None:
    """Local steps -> one rank alone -> local steps; and local -> synchronous -> local, in one run directory."""
    path = directory(world, "local-forms")
    first = start(world, settings("digits", path, **LOCAL, **{"train.steps": 4}))
    finish(first)
    with first.update.shared():
        mean = _parameters(first)
    sync = start(world, settings("digits", path, **{"train.steps": 4}))
    finish(sync)
    assert_same_bits(_parameters(sync), mean)
    if world.is_root:  # one rank alone, in a form of its own
        alone = start_alone(path)
        assert_same_bits([parameter.detach() for parameter in alone.parameters()], mean)
    world.comm.barrier()
    finish(start(world, settings("digits", path, **{"train.steps": 6})))
    last = start(world, settings("digits", path, **LOCAL, **{"train.steps": 9}))
    finish(last)
    assert last.progress.step == 9
    assert_same_bits(_parameters(last), [t.clone() for t in _first_rank(world, _parameters(last))])


def _parameters(job: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in job.model.parameters()]


def _first_rank(world: World, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    copies = [tensor.clone() for tensor in tensors]
    world.broadcast_tensors([(str(number), copy) for number, copy in enumerate(copies)], "test/first")
    return copies


def start_alone(path: Path) -> torch.nn.Module:
    """What a single process with local steps reads from the newest checkpoint."""
    from harness.tasks.digits import Digits

    net = Digits(width=4).model()
    update = LocalSteps(net, ranks=1, every=3, weight=1.0, outer=Outer(), **common(net, lr=0.05, momentum=0.9))
    manager = Manager(path / "checkpoints", Single())
    extra: dict[str, Any] = {}
    state = State(model=net, optimizer=update.optimizer, extra=extra, optional=OPTIONAL, **update.entries())
    assert manager.restore(state) == 4
    update.restored(4, manager.report.loaded)
    manager.close()
    return net


def test_each_rank_trains_on_its_part(world: World) -> None:
    """Parts of unequal sizes: what a rank sees, what it weighs in the mean, what is told of the network."""
    path, parts = directory(world, "local-parts"), OUT / f"{world.size}-parts.h5"
    if world.is_root:
        parts.unlink(missing_ok=True)
        partitions.write(partitions.Partition(methods.contiguous(1440, [1, 1, 2, 5])), parts)
    world.comm.barrier()
    changes = {"data": {"partition": str(parts)}, "train.steps": 6, "eval": {}, "checkpoint": {}}
    job = start(world, settings("digits", path, **LOCAL | changes))
    mine = range(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    sizes = partitions.read(parts).sizes
    assert job.update.weight == pytest.approx(sum(sizes[list(mine)]) / 1440)
    seen: set[int] = set()
    read = job.order.ids

    def look(begin: int, end: int) -> Any:
        seen.update(read(begin, end).tolist())
        return read(begin, end)

    job.order.ids = look
    finish(job)
    allowed = {int(i) for part in mine for i in partitions.read(parts).ids()[part]}
    assert seen and seen <= allowed
    if world.is_root:
        told = [record["network_bytes_per_sample"] for record in records(path, "train")]
        each = 2 * (world.size - 1) * sum(p.nbytes for p in job.model.parameters()) / 16
        assert told == pytest.approx([0, 0, each, 0, 0, each])


def test_a_bad_sample_on_one_rank_stays_there(world: World) -> None:
    job = start(world, settings("digits", directory(world, "local-bad"), **LOCAL, **{"train.nonfinite": "skip"}))
    bad = int(job.order.ids(0, 64)[63])  # the last sample of step 4: it falls to the last rank
    job.task.images[bad] = float("nan")
    finish(job)
    assert all(value.isfinite().all() for value in bits(job))
    stop = start(world, settings("digits", directory(world, "local-stop"), **LOCAL))
    losses = [torch.tensor(1.0), torch.tensor(float("nan"))]
    with pytest.raises(InternalError, match=rf"step 4: the loss \(1.0, nan\) .* on rank {world.rank}; samples \d+"):
        handle_nonfinite(stop, 4, losses, 1)
    stop.sinks.close()
    stop.close()
