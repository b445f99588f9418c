"""Horovod's stall message, read and told in a sentence: which ranks have not come to which operation, where they are.

Rank 0 prints it on stderr (horovod/common/stall_inspector.cc, 0.28) when some ranks have submitted a tensor and others
have not for `horovod.stall_warn` seconds, and again every so many seconds while that lasts:

    [2026-11-21 17:04:16.370173: E .../stall_inspector.cc:105] One or more tensors were submitted to be reduced,
    gathered or broadcasted by subset of ranks and are waiting for remainder of ranks for more than 60 seconds. This ...
    Missing ranks:
    1!: [allreduce.bias, allreduce.weight]
    One or more rank (marked by "!") is stalled for longer than 120 seconds. Will shutdown.

The message sees operations only; ranks that hang elsewhere are the watchdog's.

    stalls = Stalls()
    stalls.line(line)           # True: it belongs to such a message
    explain(stalls.last, attempt.heartbeats())
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.heartbeat import Heartbeat, last_seen

_HEAD = re.compile(
    r"One or more tensors were submitted to be reduced, gathered or broadcasted by subset of ranks and are waiting for"
    r" remainder of ranks for more than (\d{1,9}) seconds"
)
_MISSING = re.compile(r"(\d{1,9})(!?): \[(.*)\]\s*")
_FATAL = 'One or more rank (marked by "!") is stalled for longer than '
_MOST = 1000


@dataclass(frozen=True)
class Stall:
    """`missing`: per rank the operations it has not come to (Horovod names at most six); `fatal`: Horovod gave up."""

    seconds: int
    missing: Mapping[int, tuple[str, ...]]
    fatal: bool = False


@dataclass
class Stalls:
    """Reads lines of rank 0's stderr; `last` is the newest message so far."""

    last: Stall | None = None
    _seconds: int | None = None
    _missing: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def line(self, text: str) -> bool:
        """Whether a line belongs to a message; `last` then is up to date."""
        if match := _HEAD.search(text):
            self._seconds, self._missing = int(match[1]), {}
            return True
        if self._seconds is None:
            return False
        fatal = text.startswith(_FATAL)
        if match := _MISSING.fullmatch(text):
            if len(self._missing) < _MOST:
                self._missing[int(match[1])] = tuple(match[3].split(", "))
        elif not fatal:
            belongs = text.rstrip() == "Missing ranks:"
            self._seconds = self._seconds if belongs else None
            return belongs
        if self._missing:
            self.last = Stall(self._seconds, dict(self._missing), fatal)
        return True


@dataclass
class Told:
    """Which stall a person has been told of: Horovod repeats its message every so many seconds while it lasts."""

    _last: Stall | None = None
    _heard: float = 0.0

    def is_news(self, stall: Stall, now: float) -> bool:
        """Whether this is another stall than the last one: of other ranks, or after a silence. `now`: seconds."""
        if stall is self._last:
            return False
        before, heard, self._last, self._heard = self._last, self._heard, stall, now
        same = before is not None and before.missing.keys() == stall.missing.keys()
        return not same or now - heard > 3 * stall.seconds


def explain(stall: Stall, heartbeats: Mapping[int, Heartbeat]) -> str:
    """What it means, and where the ranks are that the others wait for.

    >>> here = Heartbeat(rank=1, size=2, host="n7", pid=9, section="data", step=6, seconds=4, waits=False, beat=9)
    >>> explain(Stall(60, {1: ("allreduce.bias",)}, True), {1: here})
    'Horovod waits for rank 1 (n7, last seen in data at step 6), which has not come to allreduce.bias for 60 s'
    """
    ranks = sorted(stall.missing)
    if len(set(stall.missing.values())) > 1:
        each = "; ".join(f"{_who(rank, heartbeats)} not to {_names(stall.missing[rank])}" for rank in ranks[:4])
        more = f"; and {len(ranks) - 4} more ranks" if len(ranks) > 4 else ""
        return (
            f"Horovod's ranks wait for each other for {stall.seconds} s, because they do not run the same operations:"
            f" {each}{more} (is there a condition on the rank, or on its data, in the task?)"
        )
    who = ", ".join(_who(rank, heartbeats) for rank in ranks[:4])
    more = f" and {len(ranks) - 4} more ranks" if len(ranks) > 4 else ""
    has = "which has" if len(ranks) == 1 else "which have"
    names = _names(stall.missing[ranks[0]])
    return f"Horovod waits for {who}{more}, {has} not come to {names} for {stall.seconds} s"


def where_to_look(stall: Stall, heartbeats: Mapping[int, Heartbeat]) -> str:
    """How to see what the first of these ranks does; "" where it is not known."""
    one = heartbeats.get(min(stall.missing))
    if one is None:
        return ""
    return f"`kill -QUIT {one.pid}` on {one.host} writes its stacks into its log, logs/rank-{one.rank}.log"


def _who(rank: int, heartbeats: Mapping[int, Heartbeat]) -> str:
    one = heartbeats.get(rank)
    return f"rank {rank} ({one.host}, {last_seen(one)})" if one is not None else f"rank {rank}"


def _names(names: tuple[str, ...]) -> str:
    shown = [name for name in names[:3] if name != "..."]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
