"""When the ranks of a start must be gone, and why: what the supervisor sees of them from the outside.

Order: an error file, a run that is over, ranks that have gone, heartbeats that have stopped. What becomes of an elastic
run after the first and the third is for horovodrun to decide. How old a heartbeat is
counts by this process's clock, since it was last seen to change: no two clocks are compared. Ranks on other hosts, or
that srun started, are seen by their heartbeats only.

    watch = Watch(run, attempt, program, run_id, settings)
    while process.poll() is None:
        if watch.overdue(): ...                      # `watch.reason`, `watch.hang`
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.heartbeat import Heartbeat, last_seen, limit, others
from harness.rundir import Attempt, RunDir
from harness.units import show_duration
from launch import processes
from launch.hosts import is_local

if TYPE_CHECKING:
    from harness.config import Watchdog

PATIENCE = 5.0
"""Seconds the ranks have to end by themselves after the first error file or the first rank that is gone."""
LINGER = 60.0
"""The same after rank 0 has said that the run is over."""
LATE = 60.0
"""Seconds beyond a section's limit that a silent rank gets: it ends by itself before, unless it cannot."""
STACKS = signal.SIGQUIT
"""Ranks that have a heartbeat write their stacks on it."""


@dataclass(frozen=True)
class Hang:
    """A rank that does not get on, told as a sentence. `lost`: its whole host is silent."""

    rank: int
    host: str
    text: str
    lost: bool = False


@dataclass
class Pulse:
    """The heartbeats of an attempt, and since when each has not changed."""

    attempt: Attempt
    settings: Watchdog
    last: dict[int, Heartbeat] = field(default_factory=dict)
    changed: dict[int, float] = field(default_factory=dict)
    looked: float | None = None

    def look(self, now: float) -> None:
        """Read them all; now is time.monotonic()."""
        if self.looked is not None and (pause := now - self.looked) > 20:  # this process was stopped itself
            self.changed = {rank: when + pause for rank, when in self.changed.items()}
        self.looked = now
        found = self.attempt.heartbeats()
        for rank in self.last.keys() - found.keys():  # of an elastic run that has fewer ranks now
            del self.last[rank], self.changed[rank]
        for rank, one in found.items():
            if rank not in self.last or self.last[rank].beat != one.beat:
                self.last[rank], self.changed[rank] = one, now

    def hang(self, now: float) -> Hang | None:
        """The rank that has been silent for longest, if that is too long."""
        silence = self.settings.silence or float("inf")
        for rank in sorted(self.last, key=lambda rank: self.changed[rank]):
            one, age = self.last[rank], now - self.changed[rank]
            if age <= silence:
                return None
            stopped = is_local(one.host) and processes.stopped(one.pid)
            lost = self._lost(one.host, silence, now)
            if not (stopped or lost) and one.seconds + age <= max(limit(self.settings, one.section), silence) + LATE:
                continue
            why = "is stopped (SIGSTOP)" if stopped else "is silent, as is all of its host" if lost else "is silent"
            text = f"rank {rank} of {one.size} on {one.host} {why}, {last_seen(one)}, {show_duration(age)} ago"
            return Hang(rank, one.host, text + others(self.last.values(), rank), lost)
        return None

    def _lost(self, host: str, silence: float, now: float) -> bool:
        """Whether all ranks of another host are silent, and those of the others are not."""
        if is_local(host):
            return False
        silent = {rank for rank in self.last if now - self.changed[rank] > silence}
        of_host = {rank for rank, one in self.last.items() if one.host == host}
        return of_host <= silent and bool(self.last.keys() - silent)


@dataclass
class Watch:
    """When the ranks must be gone, and why."""

    run: RunDir
    attempt: Attempt
    program: Sequence[str]
    run_id: str
    settings: Watchdog
    elastic: bool = False
    began: float = field(default_factory=time.monotonic)
    seen: set[int] = field(default_factory=set)
    until: float = float("inf")
    reason: str | None = None
    hang: Hang | None = None
    _next: float = 0.0
    _beat: float = 0.0

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.attempt, self.settings)

    def overdue(self) -> bool:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (1.0 if self.seen or now - self.began > 30 else 0.25)  # often, until the ranks are known
            self._look(now)
        return now > self.until

    def _look(self, now: float) -> None:
        if not self.elastic and any((self.attempt.root / "errors").glob("rank-*.json")):
            self._by(now + PATIENCE, "a rank failed, and the others did not end")
            return
        status = self.run.read_status()
        over = status.get("attempt") == self.attempt.number and status.get("state") in ("finished", "stopped")
        running = processes.ranks(self.program, self.run_id)
        if over:
            self._by(now + LINGER, "the run was over, but its processes did not end")
        if self.elastic:
            pass
        elif self.seen and not running:
            self._by(now + PATIENCE, "the ranks of this host have ended, but the launcher did not")
        elif (gone := self.seen - running) and not over:
            self._by(now + PATIENCE, f"{self._who(gone)} ended without a word, and the others waited for it")
        self.seen |= running
        if now >= self._beat and self.until == float("inf"):
            self._beat = now + max(1.0, len(self.pulse.last) / 64)
            self.pulse.look(now)
            self.hang = self.pulse.hang(now)
            if self.hang is not None:
                ask_for_stacks(self.attempt, running)
                self._by(now + PATIENCE, self.hang.text)

    def _who(self, gone: set[int]) -> str:
        for one in self.pulse.last.values():
            if one.pid in gone and is_local(one.host):
                return f"rank {one.rank} of {one.size} on {one.host}, {last_seen(one)},"
        return "a rank"

    def _by(self, until: float, reason: str) -> None:
        if until < self.until:
            self.until, self.reason = until, reason


def ask_for_stacks(attempt: Attempt, running: set[int]) -> None:
    """Have every rank write the stacks of its threads: here by a signal, elsewhere by a file it looks for."""
    for one in attempt.heartbeats().values():
        if is_local(one.host) and one.pid in running:
            with contextlib.suppress(OSError):
                os.kill(one.pid, STACKS)
    with contextlib.suppress(OSError):
        attempt.stacks.touch()


def oom_kills() -> int:
    """How many processes were ended for lack of memory so far, in this process's control group or on this machine."""
    places = [Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if not names:
                places.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
            elif "memory" in names.split(","):
                places.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    return sum(map(_oom_kills, places))


def _oom_kills(place: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in place.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
