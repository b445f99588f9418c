"""Which checkpoint is meant: `latest`, a step, a tag, the best by a metric; and the way people write it, `RUN@WHICH`.

select(Path("runs/exp7/checkpoints"), "best:val/loss")
resolve("runs/exp7@1200")           # a run directory, a checkpoints directory, or one checkpoint

latest              the newest that looks good
1200, 1200-2        the (second) save of this step; `step-00001200-2` too
paper               a tag
best:val/loss       the lowest value of a metric; `best:accuracy:max` the highest; of equal ones the newer
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint.commit import MANIFEST
from harness.checkpoint.manifest import NewerVersion
from harness.checkpoint.names import DAMAGED, parse_name
from harness.checkpoint.store import Stored, check, committed, latest, listing
from harness.checkpoint.survey import survey
from harness.checkpoint.tags import tagged
from harness.errors import DataError, InputMissing, UsageError, some

LATEST = "latest"
_STEP = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,9}))?")
_BEST = re.compile(r"best:(.+?)(?::(min|max))?", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """What `RUN@WHICH` means: a checkpoints directory and which of its checkpoints, or one checkpoint by its path.

    `which` is None where nothing was said.
    """

    directory: Path
    which: str | None = None
    path: Path | None = None


def select(directory: str | os.PathLike[str], which: str | int = LATEST, *, aside: bool = False) -> Path:
    """The path of a checkpoint. `aside`: also one that was set aside, if it is asked for by step, name or tag.

    Raises InputMissing (there is none; what there is instead), UsageError (a meaningless `which`), NewerVersion,
    OSError. What is asked for by step, name or tag is not looked into: whoever opens it does that.
    """
    directory = Path(directory)
    text = str(which)
    if text == LATEST:
        path = latest(directory)
        if path is None:
            raise InputMissing(_nothing(directory), hint=_why_not(directory))
        return path
    if match := _BEST.fullmatch(text):
        return _best(directory, match[1], match[2] or "min")
    if text == "best":
        raise UsageError("`best` needs a metric", hint="as in best:val/loss or best:accuracy:max")
    if name := parse_name(text):
        return _usable(_exactly(directory, *name), aside)
    if match := _STEP.fullmatch(text):
        if match[2] is not None:
            return _usable(_exactly(directory, int(match[1]), int(match[2])), aside)
        return _step(directory, int(match[1]), aside)
    return _usable(directory / tagged(directory, text), aside)


def locate(text: str | os.PathLike[str]) -> Place:
    """The place that `RUN` or `RUN@WHICH` means. RUN: a run directory, a checkpoints directory, or one checkpoint.

    A path that exists is never cut at its `@`. Raises InputMissing where there is no such directory, UsageError for
    an empty WHICH or one after a single checkpoint.
    """
    text = os.fspath(text)
    cut, which = len(text), None
    while not os.path.isdir(text[:cut]):
        cut = text.rfind("@", 0, cut)
        if cut <= 0:
            raise InputMissing(f"there is no directory {text.rpartition('@')[0] or text}")
        which = text[cut + 1 :]
    if which == "":
        raise UsageError(f"{text!r} ends in an @", hint="say which: @latest, @1200, @best:val/loss or a tag")
    path = Path(text[:cut])
    if (path / MANIFEST).exists() or parse_name(path.resolve().name):
        if which is not None:
            raise UsageError(f"{path} is one checkpoint, so there is nothing to choose from by @{which}")
        return Place(path.parent if path.name else path.resolve().parent, path=path)
    inside = path / "checkpoints"
    # A run that has saved nothing yet has no such directory; it is known by its config.
    return Place(inside if inside.is_dir() or (path / "config.yaml").is_file() else path, which)


def resolve(text: str | os.PathLike[str]) -> Path:
    """The checkpoint that `RUN@WHICH` means; the newest where WHICH is missing. Raises as `locate` and `select` do."""
    place = locate(text)
    if place.path is not None:
        if not (place.path / MANIFEST).is_file():
            raise InputMissing(f"{place.path} is no checkpoint: there is no {MANIFEST} in it")
        return place.path
    return select(place.directory, place.which or LATEST, aside=True)


def _step(directory: Path, step: int, aside: bool) -> Path:
    of_step = [stored for stored in committed(directory) if stored.step == step]
    if not of_step:
        raise InputMissing(f"there is no checkpoint of step {step} in {directory}; {_there(listing(directory))}")
    usable = [stored for stored in listing(directory) if stored.step == step]
    return usable[-1].path if usable else _usable(of_step[-1].path, aside)


def _exactly(directory: Path, step: int, number: int) -> Path:
    for stored in committed(directory):
        if (stored.step, stored.number) == (step, number):
            return stored.path
    raise InputMissing(f"there is no save {number} of step {step} in {directory}; {_there(listing(directory))}")


def _usable(path: Path, aside: bool) -> Path:
    if (path / DAMAGED).exists():
        raise DataError(
            f"{path} was found damaged", hint=f"if that has been mended, remove its {DAMAGED}; else take another one"
        )
    if not aside and path not in [stored.path for stored in listing(path.parent)]:
        raise InputMissing(f"{path} was set aside", hint="`harness ckpt rollback` brings it back")
    return path


def _best(directory: Path, metric: str, mode: str) -> Path:
    scored, known = [], set()
    for entry in survey(directory) if directory.is_dir() else ():
        if entry.state == "newer":
            raise NewerVersion(f"{entry.path}: {entry.note}", hint="use a newer program")
        if entry.state != "good" or entry.step is None:
            continue
        known |= set(entry.metrics)
        value = entry.metrics.get(metric)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
            scored.append((-value if mode == "min" else value, Stored(entry.step, entry.number, entry.path)))
    for _, stored in sorted(scored, reverse=True):
        try:
            check(stored.path)
        except DataError:
            continue
        return stored.path
    there = f"there are {some(sorted(known), 8)}" if known else "they have no metrics"
    if not listing(directory):
        raise InputMissing(_nothing(directory), hint=_why_not(directory))
    raise InputMissing(f"no good checkpoint in {directory} has a number for the metric {metric!r}; {there}")


def _nothing(directory: Path) -> str:
    if not directory.is_dir():
        return f"there are no checkpoints yet: {directory} is not there"
    return f"there is no good checkpoint in {directory}" if committed(directory) else f"no checkpoint in {directory}"


def _why_not(directory: Path) -> str | None:
    stored = committed(directory)
    if not stored:
        return None
    damaged = sum((one.path / DAMAGED).exists() for one in stored)
    left_out = len(stored) - len(listing(directory)) - damaged
    told = [f"{damaged} found damaged"] * (damaged > 0) + [f"{left_out} set aside"] * (left_out > 0)
    return f"of {len(stored)}: {', '.join(told)}" if told else f"none of {len(stored)} looks good"


def _there(stored: Sequence[Stored]) -> str:
    steps = sorted({one.step for one in stored}, reverse=True)
    return f"there are steps {some(steps, 8)}" if steps else "there is none at all"
