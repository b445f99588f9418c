"""Tables and plots of what `saving.py` has measured, as Markdown.

    text = page(results, command="...")         # `results`: what saving.py wrote, of all numbers of ranks
    plot(results, Path("checkpoints.png"))      # where matplotlib is installed

The targets are those that the project has set itself; a figure beside each says whether this run meets it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from plots import Panel, draw

from harness.bench.rounds import Rounds, Spread
from harness.units import show_size

OURS = ("direct", "lazy", "mpio")
LABELS = {"direct": "**ours, direct**", "lazy": "**ours, direct, lazy**", "mpio": "**ours, mpio**"}
Result = Mapping[str, Any]


def page(results: Sequence[Result], command: str, plots: str | None = None, *, judged: bool = True) -> str:
    """The whole Markdown text. `judged`: with the targets, which say nothing where the states are tiny."""
    first = results[0]
    parts = [
        "# Checkpoints beside what users pick today",
        f"`{command}`\n\n{_machine()}; {first['filesystem']}; {len(first['rounds']) - 1} round(s) after a first one"
        " that warms up. Medians of the slowest rank, ratios within a round; the limit is the best of plain writes"
        " (O_DIRECT with one and two writers per rank, buffered), or reads, of the same bytes by the same ranks in that"
        " round. Files and folders are synced, what was restored was compared byte by byte with what was saved."
        " Where the limits are and what was tried is told in tests/bench/README.md.",
    ]
    if judged:
        parts.append("## Targets\n\n" + table(("what", "target", "found", ""), list(targets(results))))
    if not all(one["cold"] for one in results):
        parts.append("The page cache could not be emptied each time: what is called cold may have come from memory.")
    if plots is not None:
        parts.append(f"![Share of the limit]({plots})")
    for result in results:
        head = f"## {result['workload']}: {show_size(result['bytes'])} in {result['tensors']} tensors, "
        parts.append(head + ("1 rank" if result["ranks"] == 1 else f"{result['ranks']} ranks"))
        parts += [saves(result), restores(result)]
    if absent := {name: why for one in results for name, why in one["skipped"].items()}:
        parts.append("Not tried: " + "; ".join(f"{name} ({why})" for name, why in absent.items()) + ".")
    return "\n\n".join(parts) + "\n"


def saves(result: Result) -> str:
    """A table: a row per contender, the fastest first."""
    rounds = rounds_of(result)
    share = result["bytes"] / result["ranks"]
    rows = [["plain writes", _s(rounds.seconds(*limit(rounds, "write"))), "", "1", "", "", "", ""]]
    names = [name.removeprefix("save ") for name in rounds.table[0] if name.startswith("save ")]
    for name in sorted(names, key=lambda one: rounds.seconds(f"save {one}").median):
        durable, held = rounds.seconds(f"save {name}"), rounds.seconds(f"held up {name}")
        memory = rounds.first(f"memory {name}")
        rows.append(
            [
                LABELS.get(name, name),
                _s(durable),
                f"{show_size(result['bytes'] / durable.median)}/s",
                _spread(inverse(rounds.ratio(f"save {name}", *limit(rounds, "write")))),
                f"{held.median * 1e3:.0f} ms",
                f"{rounds.ratio(f'held up {name}', 'memcpy').median:.2f}",
                f"{_s(rounds.first(f'save {name}'))}",
                "" if math.isnan(memory) else f"{show_size(memory)} ({memory / share:.2f})",
            ]
        )
    columns = ("save", "s until durable", "speed", "of the limit", "training held up", "in memcpys of a rank's share",
               "first save, s", "memory added per rank (in shares)")  # fmt: skip
    return table(columns, rows)


def restores(result: Result) -> str:
    """A table: a row per way of reading."""
    rounds = rounds_of(result)
    cold, warm = rounds.seconds(*limit(rounds, "read")), rounds.seconds("raw read warm")
    rows = [["plain reads (warm: of all bytes by each rank)", _s(cold), "1", _s(warm), "1", "1"]]
    if "read and copied" in rounds:
        reached = _spread(inverse(rounds.ratio("read and copied", *limit(rounds, "read"))))
        copied = "plain reads, while as much is copied as a restore puts into tensors"
        rows.append([copied, _s(rounds.seconds("read and copied")), reached, "", "", "1"])
    names = [name.removeprefix("cold ") for name in rounds.table[0] if name.startswith("cold ")]
    for name in sorted(names, key=lambda one: rounds.seconds(f"cold {one}").median):
        rows.append(
            [
                LABELS["direct"] if name == "ours" else name,
                _s(rounds.seconds(f"cold {name}")),
                _spread(inverse(rounds.ratio(f"cold {name}", *limit(rounds, "read")))),
                _s(rounds.seconds(f"warm {name}")),
                _spread(inverse(rounds.ratio(f"warm {name}", "raw read warm"))),
                f"{rounds.seconds(f'device {name}').median / result['bytes']:.2f}",
            ]
        )
    columns = ("restore", "cold, s", "of the limit", "warm, s", "of plain reads", "bytes from disk, in states")
    return table(columns, rows)


def targets(results: Sequence[Result]) -> Iterator[tuple[str, str, str, str]]:
    """(what, target, found, met or missed) for each target that these results can tell of."""
    for result in results:
        rounds, name = rounds_of(result), f"{result['workload']}, {result['ranks']} ranks"
        kind = result["workload"]
        if kind in ("A", "B"):
            least = inverse(rounds.ratio("save direct", *limit(rounds, "write"))).median
            yield f"save, direct, of the limit: {name}", ">= 0.85", f"{least:.2f}", _met(least >= 0.85)
            for other in [one.removeprefix("save ") for one in rounds.table[0] if one.startswith("save ")]:
                if other in OURS:
                    continue
                factor = rounds.ratio(f"save {other}", "save direct").median
                wanted = 5.0 if kind == "B" and other == "rank-0 torch.save" else 1.0
                yield (
                    f"save, direct, faster than {other}: {name}",
                    f"> {wanted:.0f} x",
                    f"{factor:.2f} x",
                    _met(factor > wanted),
                )
        if kind == "A":
            plain = [one for one in limit(rounds, "write") if "buffered" in one]
            least = inverse(rounds.ratio("save mpio", *plain)).median
            yield f"save, mpio, of buffered plain writes: {name}", ">= 0.85", f"{least:.2f}", _met(least >= 0.85)
        if kind == "B" and "save rank-0 torch.save" in rounds:
            factor = rounds.ratio("save rank-0 torch.save", "save mpio").median
            yield f"save, mpio, against rank-0 torch.save: {name}", ">= 1 x", f"{factor:.2f} x", _met(factor >= 1)
        if kind in ("A", "B", "C"):
            held, copy = rounds.seconds("held up direct").median, rounds.seconds("memcpy").median
            most = copy * 1.25 + 0.005
            yield f"training held up: {name}", f"<= {most * 1e3:.0f} ms", f"{held * 1e3:.0f} ms", _met(held <= most)
            yield from _reading(result, rounds, name)
            memory, allowed = rounds.first("memory direct"), 1.1 * result["bytes"] / result["ranks"] + (64 << 20)
            yield (
                f"memory added by a save: {name}",
                f"<= {show_size(allowed)}",
                show_size(memory),
                _met(memory <= allowed),
            )
        if "held up lazy" in rounds:
            lazy = rounds.seconds("held up lazy").median
            yield f"training held up, lazy: {name}", "<= 20 ms", f"{lazy * 1e3:.0f} ms", _met(lazy <= 0.02)
        if kind == "BB":
            first = rounds.first("save direct")
            yield f"first save of {result['tensors']} tensors: {name}", "<= 1.5 s", f"{first:.2f} s", _met(first <= 1.5)


def _reading(result: Result, rounds: Rounds, name: str) -> Iterator[tuple[str, str, str, str]]:
    cold = inverse(rounds.ratio("cold ours", *limit(rounds, "read"))).median
    yield f"restore, cold, of the limit: {name}", ">= 0.85", f"{cold:.2f}", _met(cold >= 0.85)
    read = rounds.seconds("device ours").median / result["bytes"]
    yield f"bytes from disk of a restore: {name}", "<= 1.05", f"{read:.2f}", _met(read <= 1.05)
    for other in ("torch.load by each rank", "rank 0 + broadcast"):
        if f"warm {other}" in rounds:
            factor = rounds.ratio(f"warm {other}", "warm ours").median
            yield f"restore, warm, faster than {other}: {name}", "> 1 x", f"{factor:.2f} x", _met(factor > 1)


def plot(results: Sequence[Result], path: Path) -> bool:
    """Each contender's share of the limit, a panel per workload and number of ranks. False: no matplotlib."""
    columns = sorted({one["ranks"] for one in results})
    kinds = list(dict.fromkeys(one["workload"] for one in results))
    panels = {(one["workload"], one["ranks"]): _shares(one) for one in results}
    return draw([[panels.get((kind, ranks)) for ranks in columns] for kind in kinds], path)


def _shares(result: Result) -> Panel:
    rounds = rounds_of(result)
    found = {
        name.removeprefix("save "): inverse(rounds.ratio(name, *limit(rounds, "write")))
        for name in rounds.table[0]
        if name.startswith("save ")
    }
    bars = {
        f"ours, {name}" if name in OURS else name: one
        for name, one in sorted(found.items(), key=lambda each: each[1].median)
    }
    title = f"{result['workload']}, {result['ranks']} rank(s): share of the limit"
    return Panel(title, bars, ours=[f"ours, {name}" for name in OURS])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rounds_of(result: Result) -> Rounds:
    return Rounds(tuple(result["rounds"]))


def limit(rounds: Rounds, what: str) -> list[str]:
    """Names of the plain ways to write, or to read with a cold cache."""
    return [name for name in rounds.table[0] if name.startswith(f"raw {what}") and not name.endswith("warm")]


def inverse(ratio: Spread) -> Spread:
    return Spread(1 / ratio.median, 1 / ratio.most, 1 / ratio.least, ratio.count)


def _met(good: bool) -> str:
    return "met" if good else "**missed**"


def _s(seconds: float | Spread) -> str:
    value = seconds.median if isinstance(seconds, Spread) else seconds
    return "" if math.isnan(value) else f"{value:.3f}"


def _spread(found: Spread) -> str:
    return f"{found.median:.2f} ({found.least:.2f} to {found.most:.2f})"


def _machine() -> str:
    memory = show_size(psutil.virtual_memory().total)
    return f"{platform.machine()}, {psutil.cpu_count()} cores, {memory} of memory, Linux {platform.release()}"
