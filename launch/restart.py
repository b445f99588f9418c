"""Whether, when and how a run that has failed is started again. Pure: it decides, `start.py` acts.

A restart goes on from the newest checkpoint. Restarts that get no further than any attempt before them form a row; a
row has at most `restart.most`, the first at once, the others after waits that double. After two failures from the same
checkpoint the one before is taken. Where a host is gone, the others go on with fewer ranks if `restart.min_ranks`
allows it.

    following = next_start(tried, config.restart, names)
    if following is not None: time.sleep(following.wait)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.batch import plan_of
from harness.errors import ConfigError
from harness.units import show_duration
from launch.command import build
from launch.hosts import place
from launch.plan import Plan
from launch.report import Ending, Kind
from launch.saved import step_of

if TYPE_CHECKING:
    from harness.config import Config, Restart

AGAIN: tuple[Kind, ...] = ("crash", "hang", "memory", "lost", "io")
"""Kinds of ends that a restart may mend."""


@dataclass(frozen=True)
class Tried:
    """One attempt that has ended. Checkpoints are names, None where there was none."""

    number: int
    ending: Ending
    seconds: float
    began: str | None
    """The newest checkpoint when it began."""
    saved: str | None
    """The newest checkpoint when it ended."""
    step: int = 0
    """The furthest step that was seen."""
    ranks: int = 0


@dataclass(frozen=True)
class Next:
    """Start again after `wait` seconds, as the `row`-th restart of a row; `back_to`: from this older checkpoint."""

    wait: float
    row: int
    back_to: str | None = None


def next_start(tried: Sequence[Tried], settings: Restart, names: Sequence[str]) -> Next | None:
    """What to do after the last of these attempts, the oldest first; None: leave it. `names`: usable checkpoints."""
    if tried[-1].ending.kind not in AGAIN:
        return None
    row = 0
    for index in range(1, len(tried)):
        row = 0 if progressed(tried, index) else row + 1
    if row >= settings.most:
        return None
    # the first at once: most ends have a cause that is gone with them
    wait = min(settings.longest, settings.backoff * 2.0 ** min(row - 1, 60)) if row else 0.0
    return Next(wait, row + 1, _older(tried, names))


def progressed(tried: Sequence[Tried], index: int) -> bool:
    """Whether an attempt saved a later step, or reached one, than all before it."""
    before = tried[:index]
    return step_of(tried[index].saved) > max((step_of(one.saved) for one in before), default=-1) or tried[
        index
    ].step > max((one.step for one in before), default=0)


def sentence(following: Next, most: int, ranks: int, origin: str | None) -> str:
    """What is about to happen, in a line. `most`: restarts of a row; `origin`: the checkpoint that it goes on from."""
    when = f"in {following.wait:g} s" if following.wait else "at once"
    if following.row > 1:
        count = f"restart {following.row} of at most {most} without progress"
    else:
        count = f"at most {most} restart{'s' * (most != 1)} without progress"
    where = f"on {ranks} rank{'s' * (ranks != 1)}, from {origin or 'the beginning'}"
    return f"starting again {when} ({count}), {where}"


def _older(tried: Sequence[Tried], names: Sequence[str]) -> str | None:
    """The checkpoint before the one from which the last two attempts failed in vain."""
    if len(tried) < 2 or not names:
        return None
    last = {one.began for one in tried[-2:]} | {one.saved for one in tried[-2:]}
    vain = last == {names[-1]} and not progressed(tried, len(tried) - 1)
    return names[-2] if vain and len(names) > 1 else None


def without(plan: Plan, host: str, config: Config) -> Plan | None:
    """The same start without a host: as many ranks as the others have room for and the global batch divides by.

    None where that is fewer than `restart.min_ranks`, or the host is not one of several; also for an elastic run, whose
    launcher finds the hosts by itself.
    """
    if plan.job.elastic is not None:
        return None
    short = host.split(".")[0]
    left = tuple(one for one in plan.allocation.hosts if one.name.split(".")[0] != short)
    if not left or len(left) == len(plan.allocation.hosts):
        return None
    allocation = replace(plan.allocation, hosts=left)
    least = config.restart.min_ranks or plan.job.ranks
    for ranks in range(min(plan.job.ranks, allocation.slots), least - 1, -1):
        try:
            plan_of(config, ranks)
        except ConfigError:
            continue
        job = replace(plan.job, hosts=place(allocation, ranks).hosts)
        return replace(plan, job=job, allocation=allocation, command=build(job, plan.mpi))
    return None


def table(tried: Sequence[Tried]) -> str:
    """All attempts, a line each."""
    rows = [("attempt", "ranks", "took", "step", "saved", "ended")]
    for one in tried:
        saved = str(step_of(one.saved)) if one.saved is not None and one.saved != one.began else "-"
        took, step = show_duration(round(one.seconds, 1)), str(one.step or "-")
        rows.append((str(one.number), str(one.ranks), took, step, saved, f"{one.ending.kind}: {one.ending.cause}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows
    ]
    return "\n".join(line if len(line) <= 160 else line[:157] + "..." for line in lines)
