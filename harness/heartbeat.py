"""What a rank says about where it is, every few seconds; and what the ranks of a run say together, in a sentence.

Light and without side effects, because the supervisor reads heartbeats too. Writing them is `watchdog.py`'s.

>>> here = Heartbeat(rank=5, size=8, host="node07", pid=1, section="data", step=811, seconds=40, waits=False, beat=9)
>>> last_seen(here)
'last seen in data at step 811'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.config import Watchdog

WAITING = "waiting"
"""The section of a rank of an elastic run that waits to be told who goes on."""
LIMITS = {
    "start": "start",
    WAITING: "start",
    "data": "data",
    "evaluation": "evaluation",
    "export": "evaluation",
    "exit": "evaluation",
    "restore": "save",
    "checkpoint": "save",
}
"""Field of the config's `watchdog` by section; all other sections are parts of a step."""


@dataclass(frozen=True)
class Heartbeat:
    """One rank at one moment. `seconds`: how long it has been in the section."""

    rank: int
    size: int
    host: str
    pid: int
    section: str
    step: int | None
    seconds: float
    waits: bool
    """It waits for other ranks, rather than being at work itself."""
    beat: int
    """Counts up: a reader knows that the rank lives by seeing it change, without comparing clocks."""


def parse(value: Mapping[str, Any]) -> Heartbeat | None:
    """A heartbeat from its file; None where it is not one."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "rank": int, "size": int, "host": str, "pid": int, "section": str, "step": (int, type(None)),
        "seconds": (int, float), "waits": bool, "beat": int,
    }  # fmt: skip
    if not all(name in value and isinstance(value[name], kind) for name, kind in kinds.items()):
        return None
    return Heartbeat(**{name: value[name] for name in kinds})


def limit(settings: Watchdog, section: str) -> float:
    """Seconds that a rank may stay in a section; infinite where no limit is set."""
    return getattr(settings, LIMITS.get(section, "step")) or float("inf")


def last_seen(heartbeat: Heartbeat) -> str:
    """'last seen in data at step 811'."""
    at = f" at step {heartbeat.step}" if heartbeat.step is not None else ""
    return f"last seen in {heartbeat.section}{at}"


def others(heartbeats: Iterable[Heartbeat], culprit: int) -> str:
    """'; 7 others wait in communication' (or are, where they do not wait); '' where nobody else is known."""
    where = Counter((one.waits, one.section) for one in heartbeats if one.rank != culprit)
    parts: list[str] = []
    for (waits, section), count in where.most_common(3):
        noun = ("other" if count == 1 else "others") if not parts else ""
        verb = ("waits" if count == 1 else "wait") if waits else ("is" if count == 1 else "are")
        parts.append(" ".join(word for word in (str(count), noun, verb, "in", section) if word))
    return f"; {', '.join(parts)}" if parts else ""
