"""Whole training runs inside one job: every built-in task trains, repeats by bits, and resumes by bits.

The curves are left in HARNESS_OUT for `tests/test_ranks.py`, which compares them between numbers of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.clock import Clock
from harness.config import Config
from harness.errors import InternalError, Stopped
from harness.job import Job, build
from harness.loop import train
from harness.rundir import RunDir, open_run
from harness.world import World

OUT = Path(os.environ.get("HARNESS_OUT", "."))
TEXT = str(Path(__file__).resolve().parent.parent.parent / "harness" / "loop.py")
TASKS: dict[str, dict[str, Any]] = {
    "linear": {"train.global_batch": 48, "optim": {"name": "gd", "lr": 0.1}},
    "digits": {"task.args": {"width": 4}, "optim": {"name": "momentum", "lr": 0.05}, "schedule": {"name": "cosine"}},
    "charlm": {"task.args": {"text": TEXT, "block": 16, "layers": 1, "width": 16, "heads": 2}},
    "rnn": {"task.args": {"text": TEXT, "block": 16, "width": 16}, "optim": {"name": "rmsprop"}},
    "word2vec": {
        "task.args": {"text": TEXT, "min_count": 1, "width": 8},
        "optim": {"name": "adagrad", "lr": 0.1},
    },
    "resnet": {
        "task.args": {"depth": 18, "size": 16, "samples": 64, "classes": 4, "width": 8},
        "train.global_batch": 16,
    },
}
NORMALISED = {"resnet"}
"""BatchNorm sees micro batches, whose statistics depend on the number of ranks."""


def settings(name: str, directory: Path, **changes: Any) -> Config:
    """A small config; dotted keys of TASKS and `changes` replace parts."""
    tree: dict[str, Any] = {
        "name": name,
        "run_dir": str(directory),
        "seed": 3,
        "task": {"name": name},
        "train": {"steps": 8, "global_batch": 16, "micro_batch": 4},
        "log": {"every": 1},
        "eval": {"every": 4},
        "checkpoint": {"every": 4},
    }
    for key, value in {**TASKS[name], **changes}.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Config.model_validate(tree)


def start(world: World, config: Config) -> Job:
    run = RunDir(Path(config.directory))
    number = open_run(config).new_attempt().number if world.is_root else None
    return build(config, run, int(str(world.comm.broadcast(number))), world, Clock())


def finish(job: Job) -> None:
    train(job)
    job.sinks.close()
    job.close()


class StopAt:
    """Asks for a stop when the given step is logged, 0: before the first one."""

    reason = "the test"

    def __init__(self, step: int) -> None:
        self.left = step + 1

    def wanted(self) -> bool:
        self.left -= 1
        return self.left == 0


def stop_at(world: World, config: Config, step: int) -> None:
    """Train until a stop after this step, of 8; the state is saved. Collective."""
    job = start(world, config)
    object.__setattr__(job, "stop", StopAt(step))
    with pytest.raises(Stopped, match=f"step {step} of 8"):
        train(job)
    job.close()


def bits(job: Job) -> list[torch.Tensor]:
    """Parameters, optimizer state and averages, in a fixed order."""
    state = job.update.optimizer.state_dict()["state"]
    found = [parameter.detach().clone() for parameter in job.model.parameters()]
    for key in sorted(state):
        found += [torch.as_tensor(value).clone() for _, value in sorted(state[key].items())]
    return found + ([] if job.ema is None else [value.clone() for _, value in sorted(job.ema.shadow.items())])


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), f"tensor {number} differs by {(a.double() - b.double()).abs().max()}"


def directory(world: World, name: str) -> Path:
    path = OUT / f"{world.size}-{name}"
    if world.is_root:
        shutil.rmtree(path, ignore_errors=True)
    world.comm.barrier()
    return path


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("name", TASKS)
def test_the_same_run_twice_is_the_same_by_bits(world: World, name: str) -> None:
    results = []
    for again in ("a", "b"):
        path = directory(world, f"{name}-{again}")
        job = start(world, settings(name, path))
        finish(job)
        results.append(bits(job))
        assert job.progress.step == 8
    assert_same_bits(*results)
    curve = [record["loss"] for record in records(path, "train")]
    assert len(curve) == 8
    if world.is_root and name not in NORMALISED:
        evals = [record["loss"] for record in records(path, "eval")]
        (OUT / f"curve-{name}-{world.size}.json").write_text(json.dumps(curve + evals))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in TASKS),
        ("charlm", {"train.precision": "bf16", "train.ema": 0.9, "data.workers": 1, "task.args.dropout": 0.1}),
        ("digits", {"train.ema": 0.9, "data.workers": 1, "train.clip_norm": 0.5, "horovod": {"compression": "fp16"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_a_run_stopped_anywhere_and_resumed_is_the_same_by_bits(
    world: World, name: str, changes: dict[str, Any]
) -> None:
    straight = start(world, settings(name, directory(world, f"{name}-straight"), **changes))
    finish(straight)
    path = directory(world, f"{name}-resumed")
    config = settings(name, path, **changes)
    stop_at(world, config, 3)
    resumed = start(world, config)
    finish(resumed)
    assert_same_bits(bits(resumed), bits(straight))
    if world.is_root:
        curves = [
            {record["step"]: record["loss"] for record in records(OUT / f"{world.size}-{name}-{way}", "train")}
            for way in ("straight", "resumed")
        ]
        assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("changes", "asked", "step"),
    [
        ({"checkpoint": {"every": 2}, "eval": {}}, 2, 2),  # after the first step, and where it saves
        ({"checkpoint": {}, "eval": {"every": 2}}, 2, 2),
        ({"checkpoint": {}, "eval": {}}, 2, 5),  # nothing else: after at most so many times as many steps
    ],
)
def test_a_stop_does_not_wait_for_a_log_line(world: World, changes: dict[str, Any], asked: int, step: int) -> None:
    path = directory(world, "seldom")
    config = settings("linear", path, log={"every": 1000}, **changes)
    job = start(world, config)
    object.__setattr__(job, "stop", StopAt(asked))
    with pytest.raises(Stopped, match=f"step {step} of 8 .* state saved"):
        train(job)
    job.sinks.close()
    job.close()
    again = start(world, config)
    object.__setattr__(again, "stop", StopAt(0))
    with pytest.raises(Stopped, match=rf"stopped at step {step} of 8 \(the test\), before anything was done"):
        train(again)
    again.sinks.close()
    again.close()
    assert len(list((path / "checkpoints").glob(f"step-{step:08d}"))) == 1
    finish(start(world, config))
    if world.is_root:
        assert [record["step"] for record in records(path, "train")] == [8]
    finished = start(world, config)
    object.__setattr__(finished, "stop", StopAt(0))
    with pytest.raises(Stopped, match="at step 8 of 8"):
        train(finished)
    finished.close()


def test_early_stopping_ends_all_ranks_at_the_same_step_and_a_restart_does_not_go_on(world: World) -> None:
    config = settings(
        "digits",
        directory(world, "early"),
        **{"optim.lr": 1e-12, "eval": {"every": 2, "stop": {"metric": "accuracy", "mode": "max", "patience": 2}}},
    )
    job = start(world, config)
    finish(job)
    assert world.comm.all_gather(job.progress.step) == [6] * world.size
    again = start(world, config)
    finish(again)
    assert again.progress.step == 6


def test_the_end_of_a_run_may_be_moved(world: World) -> None:
    path = directory(world, "longer")
    finish(start(world, settings("linear", path)))
    job = start(world, settings("linear", path, **{"train.steps": 11}))
    finish(job)
    assert job.progress.step == 11


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_sample_on_one_rank(world: World, policy: str) -> None:
    path = directory(world, f"bad-{policy}")
    job = start(world, settings("digits", path, **{"train.nonfinite": policy}))
    bad = int(job.order.ids(0, 64)[63])  # the last sample of step 4: it falls to the last rank
    job.task.images[bad] = float("nan")
    if policy == "skip":
        finish(job)
        assert all(value.isfinite().all() for value in bits(job))
        return
    with pytest.raises(InternalError, match=rf"step 4: the loss is not finite .* on rank {world.size - 1}"):
        train(job)
    job.sinks.close()
    job.close()
    if world.is_root:
        report = json.loads((path / "nonfinite-step-4.json").read_text())
        assert bad in report["ids_by_rank"][str(world.size - 1)]
