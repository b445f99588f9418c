"""What the `harness ckpt` commands print: tables for people, JSON for programs. Knows nothing of checkpoints' files.

print_table(["step", "size"], [[1200, "3.4 MB"]], right=["step", "size"])
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from harness.checkpoint.forecast import Forecast
    from harness.checkpoint.leasefile import Holder
    from harness.checkpoint.manifest import Manifest
    from harness.checkpoint.schema import Leaf
    from harness.checkpoint.survey import Entry
    from harness.checkpoint.values import Statistics

WIDE = 160
"""Columns where the output is no terminal."""
_STATES = {"good": "green", "damaged": "bold red", "set aside": "yellow", "incomplete": "dim", "newer": "magenta"}


def show_survey(directory: Path, found: Sequence[Entry], holder: Holder | None, *, as_json: bool) -> None:
    """`harness ckpt ls`. `holder`: the job that saves there now."""
    from harness.units import show_size

    if as_json:
        told = [{**asdict(entry), "path": str(entry.path)} for entry in found]
        job = {"host": holder.host, "pid": holder.pid, "job": holder.job, "started": holder.started} if holder else None
        print_json({"directory": str(directory), "in_use_by": job, "checkpoints": told})
        return
    rows = []
    for entry in found:
        step = f"{entry.step}" if entry.number == 1 else f"{entry.step}-{entry.number}"
        rows.append(
            [step, age(entry.created), show_size(entry.bytes), _or(entry.world), _or(entry.tensors),
             metrics(entry.metrics), ", ".join(entry.tags), state_text(entry.state)]
        )  # fmt: skip
    if rows:
        columns = ("step", "age", "size", "ranks", "tensors", "metrics", "tags", "state")
        print_table(columns, rows, right=("step", "age", "size", "ranks", "tensors"))
    for entry in found:
        if entry.note:
            print_line(f"{entry.path.name}: {entry.note}")
    good = sum(entry.state == "good" for entry in found)
    total = show_size(sum(entry.bytes for entry in found))
    noun = "checkpoint" if len(found) == 1 else "checkpoints"
    print_line(f"{len(found)} {noun}, {good} good, {total} in {directory}")
    if holder is not None:
        print_line(f"in use by {holder}")


def show_tensors(
    path: Path,
    manifest: Manifest,
    chosen: Sequence[tuple[Leaf, int]],
    numbers: Mapping[str, Statistics],
    *,
    limit: int,
    as_json: bool,
) -> None:
    """`harness ckpt inspect`: `chosen` are leaves with their offsets."""
    from harness.units import show_size

    if as_json:
        tensors = [
            {"name": leaf.name, "dtype": leaf.dtype, "shape": leaf.shape, "bytes": leaf.nbytes, "offset": offset,
             "placement": leaf.placement, **({"stats": asdict(numbers[leaf.name])} if numbers else {})}
            for leaf, offset in chosen
        ]  # fmt: skip
        print_json(
            {"path": str(path), "step": manifest.step, "uuid": manifest.uuid, "created": manifest.created,
             "world": manifest.world, "file_bytes": manifest.layout.data_end, "block": manifest.layout.block,
             "metrics": manifest.metrics, "info": manifest.info, "aliases": manifest.aliases,
             "state": sorted(manifest.state), "tensors": tensors}
        )  # fmt: skip
        return
    noun, size = "rank" if manifest.world == 1 else "ranks", show_size(manifest.layout.data_end)
    told = [
        f"{path}",
        f"step {manifest.step}, {age(manifest.created)}, by {manifest.world} {noun}, {size}",
    ]
    told += [f"metrics: {metrics(manifest.metrics)}"] if manifest.metrics else []
    told += [f"state: {', '.join(sorted(manifest.state))}"] if manifest.state else []
    told += [f"second names: {len(manifest.aliases)}, as {_first(manifest.aliases)}"] if manifest.aliases else []
    for line in told:
        print_line(line)
    columns = ["name", "shape", "dtype", "bytes", "offset", "placement"]
    right = ["bytes", "offset"]
    if numbers:
        columns += ["least", "greatest", "mean", "nan", "inf"]
        right += columns[-5:]
    shown = chosen if limit == 0 else chosen[:limit]
    rows = []
    for leaf, offset in shown:
        row = [leaf.name, list(leaf.shape), leaf.dtype, leaf.nbytes, offset, leaf.placement]
        if numbers:
            found = numbers[leaf.name]
            row += [number(found.least), number(found.greatest), number(found.mean), found.nan, found.infinite]
        rows.append(row)
    if rows:
        print_table(columns, rows, right=right)
    if len(shown) < len(chosen):
        print(f"and {len(chosen) - len(shown)} more: choose by a pattern, or --limit 0")
    count = "1 tensor" if len(chosen) == 1 else f"{len(chosen)} tensors"
    print(f"{count}, {show_size(sum(leaf.nbytes for leaf, _ in chosen))}")


def show_forecast(found: Forecast, *, as_json: bool) -> None:
    """`harness ckpt plan`."""
    from harness.errors import some
    from harness.units import show_seconds, show_size

    if as_json:
        print_json(asdict(found))
        return
    ranges = some([f"[{lo}, {hi})" for lo, hi in found.ranges], 8)
    cold, warm = found.seconds_cold, found.seconds_warm
    several = "" if len(found.ranges) == 1 else "s"
    spread = f"{show_size(found.least)} to {show_size(found.most)} a rank, of {found.looked_at} looked at"
    rows = [
        ("tensors", f"{found.tensors}, in a file of {show_size(found.file_bytes)}, blocks of {show_size(found.block)}"),
        ("ranks", f"{found.ranks}, each {show_size(found.mean)} on average"),
        ("balance", spread),
        (f"rank {found.rank}", f"{show_size(found.bytes)} in {len(found.ranges)} range{several} of the file"),
        ("its ranges", ranges or "none: there are more ranks than blocks"),
        ("planning", f"{show_seconds(cold)} for the first save, {show_seconds(warm)} for the next ones"),
        ("memory", f"{show_size(found.memory)} at most, for planning"),
        *_cost(found),
    ]
    print_table(("", ""), rows)


def _cost(found: Forecast) -> Iterator[tuple[str, str]]:
    """What a save after the first one asks of the file system and of the network."""
    from harness.units import show_size

    root, other = found.cost.root, found.cost.other
    yield (
        "file system",
        f"rank 0: {root.opens} opens, {root.names} names made or removed, {root.syncs} syncs, {root.writes} writes",
    )
    if other is None:
        return
    each = f"{other.opens} opens, {other.syncs} sync, {other.writes} writes, as rank {found.rank or 1}"
    yield "other ranks", f"each {each}; {root.opens + other.opens * (found.ranks - 1)} opens in all"
    sent = show_size(root.message_bytes + other.message_bytes * (found.ranks - 1))
    yield "messages", f"{root.received} to rank 0, {root.sent} from it, about {sent} in all"


def print_json(value: object) -> None:
    """One JSON document. What JSON has no number for (nan, infinities) becomes text."""
    print(json.dumps(_plain(value), indent=1, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table without a frame; `right`: columns of numbers. Long text is folded, not cut. Without names no heading."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns))
    for column in columns:
        number = column in right
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(clean(str(cell))) for cell in row))
    console().print(table)


def print_line(line: str) -> None:
    """A line as long as it is."""
    console().print(Text(clean(line)), soft_wrap=True)


def console() -> Console:
    """Where tables go: as wide as the terminal, or WIDE."""
    return Console(highlight=False, markup=False, soft_wrap=False, width=None if sys.stdout.isatty() else WIDE)


def state_text(state: str) -> Text:
    """A checkpoint's state in its colour."""
    return Text(state, style=_STATES.get(state, ""))


def clean(text: str) -> str:
    """Text of a checkpoint for a terminal: signs that would steer it are written out."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def age(created: float | None) -> str:
    """'3 min 05 s ago', for times that make sense."""
    from harness.units import show_duration

    if created is None or not math.isfinite(created):
        return "?"
    seconds = time.time() - created
    if seconds >= 172_800:
        return f"{seconds / 86400:.0f} days ago"
    return f"{show_duration(seconds)} ago" if seconds >= 0 else "in the future"


def number(value: object) -> str:
    """A metric or statistic: numbers short, everything else as JSON."""
    if isinstance(value, bool) or value is None:
        return {None: "-", True: "true", False: "false"}[value]
    if isinstance(value, dict) and set(value) == {"$float"}:
        return clean(str(value["$float"]))
    if isinstance(value, (int, float)):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    text = clean(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def metrics(values: dict[str, Any]) -> str:
    """'accuracy 0.91, val/loss 0.314'."""
    return ", ".join(f"{name} {number(value)}" for name, value in sorted(values.items()))


@contextmanager
def bar(text: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar over bytes on stderr, where that is a terminal; yields what to call with (done, total)."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(clean(text), total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def tell(line: str) -> None:
    """A line beside the result, on stderr."""
    print(clean(line), file=sys.stderr, flush=True)


def _or(value: object) -> str:
    return "-" if value is None else str(value)


def _first(aliases: Mapping[str, str]) -> str:
    name, target = next(iter(sorted(aliases.items())))
    return f"{name} = {target}"


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict) and set(value) == {"$float"}:
        return value["$float"]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
