"""What `harness ckpt bench` makes of its measurements: rows of a table, sentences, and what to put into the config.

    rows(result)[0].what, advise(result).yaml      # `result`: what `checkpoints.measure` returned

It measures nothing. Ratios are taken within a round; see `rounds`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.bench.rounds import Rounds, Spread
from harness.units import show_seconds, show_size

LAZY_GAIN = 0.005
"""Seconds of training per save for which another mode is worth a line in the config."""
SLOWER = 2.0
"""An engine that is durable so many times later than the fastest is not advised, whatever it saves the training."""
UNSTEADY = 3.0
NAMES = {
    "raw write odirect": "plain writes, O_DIRECT",
    "raw write odirect 2": "plain writes, O_DIRECT, two at a time",
    "raw write buffered": "plain writes through the page cache",
    "raw read odirect": "plain reads, cold, O_DIRECT",
    "raw read buffered": "plain reads, cold",
    "raw read warm": "plain reads of all bytes by each rank, warm",
}


@dataclass(frozen=True)
class Row:
    """One measurement. `moved`: bytes, where a speed makes sense. `ratio` to what `of` says, as a share or as times."""

    what: str
    seconds: Spread
    moved: int | None = None
    ratio: Spread | None = None
    of: str = ""
    share: bool = False


@dataclass(frozen=True)
class Advice:
    """`yaml`: fields of the config's section `checkpoint` that should differ from their defaults."""

    sentences: tuple[str, ...]
    yaml: dict[str, str]


def rows(result: Mapping[str, Any]) -> list[Row]:
    """The table."""
    rounds, size, ranks = _rounds(result), int(result["bytes"]), int(result["ranks"])
    writes, reads = _of(rounds, "raw write"), ("raw read odirect", "raw read buffered")
    found = [
        Row(text, rounds.seconds(name), size * ranks if name == "raw read warm" else size)
        for name, text in NAMES.items()
        if name in rounds
    ]
    at = len(writes)
    saves: list[Row] = []
    for name in _of(rounds, "save "):
        what = name.removeprefix("save ")
        if what == "without digests":
            saves.append(
                Row("engine direct: digests", rounds.seconds("digest"), None,
                    rounds.ratio("save direct", name), "the save without them")
            )  # fmt: skip
            continue
        text = "mode lazy" if what == "lazy" else f"engine {what}"
        share = _inverse(rounds.ratio(name, *writes))
        saves.append(Row(f"{text}: until durable", rounds.seconds(name), size, share, "the best plain writes", True))
        held = rounds.ratio(f"held up {what}", "memcpy")
        saves.append(
            Row(f"{text}: training held up", rounds.seconds(f"held up {what}"), None, held, "memcpy of a rank's share")
        )
    found[at:at] = saves
    for kind, to in (("cold", reads), ("warm", ("raw read warm",))):
        name = f"restore {kind}"
        if name in rounds:
            text = "the best plain reads" if kind == "cold" else "plain reads, warm"
            moved = size if kind == "cold" else size * ranks
            found.append(
                Row(f"restore, {kind}", rounds.seconds(name), moved, _inverse(rounds.ratio(name, *to)), text, True)
            )
    return found


def advise(result: Mapping[str, Any]) -> Advice:
    """Which settings are best here, in words and as config."""
    rounds = _rounds(result)
    engines = [name for name, problem in result["engines"].items() if problem is None]
    told = [f"engine {name} cannot be used here: {why}" for name, why in result["engines"].items() if why is not None]
    yaml: dict[str, str] = {}
    if engines:
        best = _best(rounds, engines)
        told.append(_why(rounds, best, engines))
        if best != "direct":
            yaml["engine"] = best
        told += _mode(rounds, best, yaml)
    if result["read"] and result["read"]["device"]:
        told.append(f"a cold restore read {result['read']['device'] / result['bytes']:.2f} times the state from disk")
    if not result["cold"]:
        told.append("the page cache could not be emptied: what is called cold may have come from memory")
    writes = rounds.seconds(*_of(rounds, "raw write"))
    if writes.count and writes.most > UNSTEADY * writes.least:
        told.append(
            f"plain writes took {show_seconds(writes.least)} in one round and {show_seconds(writes.most)} in another:"
            " others use this disk, so measure again, with more --rounds, before you rely on it"
        )
    return Advice(tuple(told), yaml)


def _best(rounds: Rounds, engines: list[str]) -> str:
    """The engine that holds training up least, of those that are not much later durable."""
    durable = {name: rounds.seconds(f"save {name}").median for name in engines}
    near = [name for name in engines if durable[name] <= SLOWER * min(durable.values())]
    return min(near, key=lambda name: rounds.seconds(f"held up {name}").median)


def _why(rounds: Rounds, best: str, engines: list[str]) -> str:
    def of(name: str) -> str:
        durable, held = rounds.seconds(f"save {name}").median, rounds.seconds(f"held up {name}").median
        return f"is durable after {show_seconds(durable)} and holds training up for {show_seconds(held)}"

    others = [f"{name} {of(name)}" for name in engines if name != best]
    head = f"engine {best} is the best here: it {of(best)}" if others else f"engine {best} {of(best)}"
    return "; ".join([head, *others])


def _mode(rounds: Rounds, best: str, yaml: dict[str, str]) -> Iterator[str]:
    held = rounds.seconds(f"held up {best}").median
    if best == "direct" and "save lazy" in rounds:
        lazy, copied = rounds.seconds("held up lazy").median, rounds.seconds("copied lazy").median
        if lazy < held / 2 and held - lazy > LAZY_GAIN:
            yaml["mode"] = "lazy"
            yield (
                f"mode lazy holds it up for {show_seconds(lazy)} only, where forward and backward pass take"
                f" {show_seconds(copied)} or more, in which the copy is made"
            )
            held = lazy
        else:
            yield f"mode lazy would hold it up for {show_seconds(lazy)}, which gains nothing worth having"
    yield f"one save per minute holds training up for {held / 60:.2%} of the time"
    first = rounds.first(f"save {best}")
    yield f"the first save of a run takes {show_seconds(first)}"


def _rounds(result: Mapping[str, Any]) -> Rounds:
    return Rounds(tuple(result["rounds"]))


def _of(rounds: Rounds, start: str) -> list[str]:
    return [name for name in rounds.table[0] if name.startswith(start)]


def _inverse(ratio: Spread) -> Spread:
    """Of times a share: half the speed for twice the time."""
    return Spread(1 / ratio.median, 1 / ratio.most, 1 / ratio.least, ratio.count)


def speed(row: Row) -> str:
    """'1.8 GB/s', of the median; empty where nothing is moved."""
    return "" if row.moved is None else f"{show_size(row.moved / row.seconds.median)}/s"
