"""Whether a failed run is started again, after how long, from which checkpoint and on how many ranks. All pure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config import Config, Restart
from harness.rundir import RunDir, write_json
from launch.command import Job, build
from launch.hosts import Allocation
from launch.mpi import Mpi
from launch.nodelist import Host
from launch.plan import Plan
from launch.report import Ending
from launch.restart import (
    AGAIN,
    Next,
    Tried,
    next_start,
    progressed,
    sentence,
    table,
    without,
)
from launch.saved import checkpoints, step_of
from launch.start import next_step

CRASH = Ending(1, "failed", "error: it broke\n  details", 1)


def tried(*attempts: tuple[int, int], ending: Ending = CRASH) -> list[Tried]:
    """Attempts by (newest step that was saved at their end or -1, furthest step)."""
    found: list[Tried] = []
    for saved, step in attempts:
        began = found[-1].saved if found else None
        found.append(Tried(len(found) + 1, ending, 2.0, began, name(saved) if saved >= 0 else None, step, 2))
    return found


def name(step: int) -> str:
    return f"step-{step:08d}"


def test_what_is_said_of_a_restart() -> None:
    assert sentence(Next(0.0, 1), 2, 2, name(40)) == (
        "starting again at once (at most 2 restarts without progress), on 2 ranks, from step-00000040"
    )
    assert sentence(Next(10.0, 2), 2, 1, None) == (
        "starting again in 10 s (restart 2 of at most 2 without progress), on 1 rank, from the beginning"
    )


def test_the_state_that_a_run_goes_on_from_is_the_one_on_the_disk(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.status, {"last_checkpoint": 20})  # rank 0 was ended before it could tell of the next one
    assert next_step(run) == f"start again with: harness run {tmp_path}"
    for step in (20, 40):
        (run.checkpoints / name(step)).mkdir(parents=True)
        (run.checkpoints / name(step) / "manifest.json").touch()
    assert next_step(run) == f"the state of step 40 is saved; go on with: harness run {tmp_path}"


@pytest.mark.parametrize("kind", ["finished", "stopped", "user", "interrupted"])
def test_no_restart_after_what_it_cannot_mend(kind: Any) -> None:
    assert kind not in AGAIN
    assert next_start(tried((4, 5), ending=replace(CRASH, kind=kind)), Restart(most=9), []) is None


@pytest.mark.parametrize("kind", ["crash", "hang", "memory", "lost", "io"])
def test_a_restart_after_what_it_may_mend(kind: Any) -> None:
    attempts = tried((4, 5), ending=replace(CRASH, kind=kind))
    assert next_start(attempts, Restart(most=1), [name(4)]) == Next(0.0, 1)
    assert next_start(attempts, Restart(), [name(4)]) is None, "off unless it is asked for"


def test_a_row_without_progress_ends_and_progress_begins_a_new_one() -> None:
    twice = Restart(most=2, backoff=1.0)
    assert next_start(tried((-1, 3)), twice, []) == Next(0.0, 1)
    assert next_start(tried((-1, 3), (-1, 3)), twice, []) == Next(1.0, 2)
    assert next_start(tried((-1, 3), (-1, 3), (-1, 2)), twice, []) is None
    assert next_start(tried((-1, 3), (-1, 3), (-1, 4)), twice, []) == Next(0.0, 1), "a further step"
    assert next_start(tried((-1, 3), (-1, 3), (2, 3)), twice, [name(2)]) == Next(0.0, 1), "a first checkpoint"
    assert next_start(tried((8, 9), (8, 9), (12, 9)), twice, [name(8), name(12)]) == Next(0.0, 1)
    assert next_start(tried((8, 9), (8, 9), (4, 6)), twice, [name(4)]) is None, "no further than ever"


def test_the_first_restart_comes_at_once_then_waits_double_up_to_the_longest() -> None:
    settings = Restart(most=1000, backoff=10.0, longest=300.0)
    waits = []
    for count in range(1, 9):
        following = next_start(tried(*[(-1, 0)] * count), settings, [])
        assert following is not None
        waits.append(following.wait)
    assert waits == [0, 10, 20, 40, 80, 160, 300, 300]
    long = next_start(tried(*[(-1, 0)] * 900), settings, [])
    assert long is not None and long.wait == 300


@given(st.lists(st.tuples(st.integers(-1, 9), st.integers(0, 9)), min_size=1, max_size=30), st.integers(0, 5))
def test_a_run_that_stands_still_is_given_up(attempts: list[tuple[int, int]], most: int) -> None:
    settings = Restart(most=most)
    still = [*attempts, *[(-1, 0)] * (most + 1)]
    assert next_start(tried(*still), settings, []) is None
    following = next_start(tried(*attempts), settings, [])
    assert following is None or 1 <= following.row <= most


def test_after_two_failures_from_one_checkpoint_the_one_before() -> None:
    settings, names = Restart(most=9), [name(4), name(8)]

    def back(attempts: list[Tried], names: list[str]) -> str | None:
        following = next_start(attempts, settings, names)
        assert following is not None
        return following.back_to

    assert back(tried((8, 9)), names) is None
    assert back(tried((8, 9), (8, 9)), names) is None, "only one began from it"
    assert back(tried((8, 9), (8, 9), (8, 9)), names) == name(4)
    assert back(tried((8, 9), (8, 9), (8, 10)), names) is None, "it got further"
    assert back(tried((8, 9), (8, 9), (8, 9)), [name(8)]) is None, "there is none before"
    assert back(tried((-1, 0), (-1, 0), (-1, 0)), []) is None
    # set aside, saved again, and failed from twice again
    again = [*tried((8, 9), (8, 9), (8, 9)), Tried(4, CRASH, 1.0, name(4), name(8) + "-2", 9)]
    assert back(again, [name(4), name(8) + "-2"]) is None
    again += [Tried(number, CRASH, 1.0, name(8) + "-2", name(8) + "-2", 9) for number in (5, 6)]
    assert back(again, [name(4), name(8) + "-2"]) == name(4)


def test_progress_is_a_later_step_than_ever() -> None:
    attempts = tried((8, 9), (4, 9), (8, 9), (8, 10), (12, 10))
    assert [progressed(attempts, index) for index in range(1, 5)] == [False, False, True, True]


def test_checkpoints_in_use(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none") == []
    for folder in ("step-00000008", "step-00000008-2", "step-00000004", "step-00000012.tmp-x", "step-99", "tags"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").touch()
    for mark, step in (("damaged.json", 16), ("aside.json", 20)):
        (tmp_path / name(step)).mkdir()
        (tmp_path / name(step) / "manifest.json").touch()
        (tmp_path / name(step) / mark).touch()
    (tmp_path / name(24)).mkdir()
    assert checkpoints(tmp_path) == ["step-00000004", "step-00000008", "step-00000008-2"]
    assert [step_of(one) for one in ("step-00000008-2", None)] == [8, -1]


def plan_on(*hosts: Host, ranks: int) -> Plan:
    job = Job(("python",), "mpirun", tuple(Host(host.name, host.slots) for host in hosts))
    job = replace(job, hosts=(Host("a", ranks),) if len(hosts) == 1 else job.hosts)
    return Plan(job, Mpi("openmpi", (4, 1, 4)), build(job, Mpi("openmpi", (4, 1, 4))), Allocation("given", "-H", hosts))


def config_of(global_batch: int, min_ranks: int | None) -> Config:
    tree = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": global_batch}}
    return Config.model_validate(tree | {"restart": {"min_ranks": min_ranks}})


def test_without_a_host_as_many_ranks_as_the_batch_divides_by() -> None:
    plan = plan_on(Host("a", 4), Host("b", 4), Host("c.cluster", 4), ranks=12)
    less = without(plan, "c", config_of(48, 4))
    assert less is not None
    assert less.job.hosts == (Host("a", 4), Host("b", 4))
    assert "a:4,b:4" in less.command.argv
    less = without(plan, "b", config_of(36, 4))
    assert less is not None
    assert less.job.ranks == 6, "8 and 7 do not divide 36"
    assert without(plan, "b", config_of(36, 7)) is None
    assert without(plan, "b", config_of(36, None)) is None, "only with all ranks"
    assert without(plan, "elsewhere", config_of(36, 1)) is None
    assert without(plan_on(Host("a", 4), ranks=4), "a", config_of(36, 1)) is None


def test_spare_hosts_take_over_the_ranks() -> None:
    plan = plan_on(Host("a", 4), Host("b", 4), ranks=8)
    spare = replace(plan, allocation=replace(plan.allocation, hosts=(*plan.allocation.hosts, Host("c", 4))))
    less = without(spare, "a", config_of(64, None))
    assert less is not None
    assert less.job.hosts == (Host("b", 4), Host("c", 4))


def test_the_table_of_attempts() -> None:
    done = Tried(3, Ending(0, "finished", "", kind="finished"), 60.0, name(8), name(12), 12, 2)
    lines = table([*tried((-1, 0), (8, 9)), done]).splitlines()
    assert lines[0].split() == ["attempt", "ranks", "took", "step", "saved", "ended"]
    assert lines[1].split() == ["1", "2", "2.0", "s", "-", "-", "crash:", "it", "broke"]
    assert lines[2].split()[5] == "8"
    assert lines[3].endswith("finished: finished")
