"""A rank's watchdog: it tells where the rank is, and ends it when it stays in one section for too long.

A daemon thread reads the rank's clock every few seconds, writes it to `heartbeats/rank-K.json`, and compares it with
the limits of the config. When one has passed, the stacks of all threads go into the rank's log, an error file tells
what hangs, the other ranks write their stacks too, and this rank ends, which ends the job. A rank that only waits for
others looks at their heartbeats first: one of them that is at work may take its time.

A rank stuck in C code that never gives Python's lock back cannot run this thread: faulthandler's timer, which needs no
lock, then writes the stacks. It also ends the rank, unless `harness run` is there, which sees that the rank is silent:
the timer cannot tell a rank that hangs from a machine that was suspended. `kill -QUIT PID` makes any rank write its
stacks and go on.

    watchdog = Watchdog(clock, attempt, environment, config.watchdog, log)
    watchdog.start()
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from harness.clock import Clock
from harness.env import Environment
from harness.errors import Exit, StorageError
from harness.heartbeat import LIMITS, WAITING, Heartbeat, last_seen, limit, others
from harness.rundir import Attempt, write_json
from harness.units import show_duration

if TYPE_CHECKING:
    from harness.config import Watchdog as Settings

STACKS = signal.SIGQUIT
"""Makes a rank write the stacks of its threads into its log, as it does to a Java program."""
WAITS = ("horovod.torch.mpi_ops", "harness.world", "harness.checkpoint.comm", "harness.checkpoint.ballot")
"""Modules in which a rank waits for others."""
LATE = 10.0
"""Seconds after which faulthandler's timer takes over from the thread, besides what that may take itself."""
LOOKERS = 16
"""So many ranks may tell that others hang: thousands that read each other's files would be a load of its own."""


def interval(size: int, settings: Settings) -> float:
    """Seconds between heartbeats: 2, more where many ranks write to one file system, less where limits are short."""
    limits = [value for value in settings.model_dump().values() if value]
    return min([10.0, max(2.0, size / 64), max(0.2, min(limits, default=10.0) / 4)])


class Watchdog:
    """The thread and what it remembers. Everything it does is best effort but ending a rank that hangs."""

    def __init__(
        self, clock: Clock, attempt: Attempt, environment: Environment, settings: Settings, log: TextIO
    ) -> None:
        self.clock, self.attempt, self.environment, self.settings, self.log = clock, attempt, environment, settings, log
        self._file = attempt.heartbeat(environment.rank)
        self._every = interval(environment.size, settings)
        self._main = threading.main_thread().ident
        self._supervised = "HARNESS_RUN_ID" in os.environ and settings.silence > 0
        self._beats = 0
        self._last = time.perf_counter()
        self._asleep = (0.0, 0.0)  # when the section that was slept in began, and seconds that do not count
        self._dumped = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """From now on. Main thread only."""
        faulthandler.register(STACKS, file=self.log, all_threads=True, chain=False)
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(exist_ok=True)
        self._beat()
        self._thread.start()

    def move(self, environment: Environment, log: TextIO) -> None:
        """From now on this rank has another number, or another log."""
        self.environment, self.log = environment, log
        self._file = self.attempt.heartbeat(environment.rank)
        self._every = interval(environment.size, self.settings)
        faulthandler.register(STACKS, file=log, all_threads=True, chain=False)

    def _run(self) -> None:
        while True:
            time.sleep(self._every)
            self._beat()

    def _beat(self) -> None:
        now = time.perf_counter()
        section, since = self.clock.place
        asleep = now - self._last - self._every
        if asleep > 5 * self._every:  # stopped by somebody who has let it go on: that time does not count
            self._asleep = (since, asleep + (self._asleep[1] if self._asleep[0] == since else 0.0))
        self._last = now
        seconds = now - since - (self._asleep[1] if self._asleep[0] == since else 0.0)
        allowed = limit(self.settings, section)
        here = self._here(section, seconds)
        self._write(here)
        if allowed < float("inf"):
            late = max(allowed - seconds, 0.0) + LATE + 8 * self._every
            faulthandler.dump_traceback_later(late, exit=not self._supervised, file=self.log)
        else:
            faulthandler.cancel_dump_traceback_later()
        if seconds > allowed:
            self._overdue(here, since, allowed)
        elif not self._dumped and os.path.exists(self.attempt.stacks):
            self._dump("asked for")

    def _here(self, section: str, seconds: float) -> Heartbeat:
        me = self.environment
        self._beats += 1
        waits = section in ("communication", WAITING) or self._is_waiting()
        return Heartbeat(
            me.rank, me.size, me.host, os.getpid(), section, self.clock.step, round(seconds, 1), waits, self._beats
        )

    def _is_waiting(self) -> bool:
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            if frame.f_globals.get("__name__") in WAITS:
                return True
            frame = frame.f_back
        return False

    def _write(self, here: Heartbeat) -> None:
        """Replaced as a whole, never synced: a heartbeat that is lost with its machine is told by its absence."""
        temporary = self._file.with_name(f".{self._file.name}")
        text = json.dumps(asdict(here) | {"time": time.time()}) + "\n"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self._file)
        except OSError:  # on a full disk in its place, where it takes no more room: a rank that is silent is ended
            with contextlib.suppress(OSError), open(self._file, "r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()

    def _overdue(self, here: Heartbeat, since: float, allowed: float) -> None:
        culprit, why = (
            here,
            f"longer than watchdog.{LIMITS.get(here.section, 'step')} ({show_duration(allowed)}) allows",
        )
        if here.waits and here.size > 1:
            # one rank after the other, so that not all of them look
            if here.rank >= LOOKERS or here.seconds < allowed + 2 * self._every * here.rank:
                return
            found = self._look(here)
            if found is None:
                return
            culprit, why = found
        if self.clock.place[1] != since:
            return  # it went on while we looked
        known = self.attempt.heartbeats() | {here.rank: here}
        seconds = max(culprit.seconds, here.seconds)
        message = f"{last_seen(culprit)} for {show_duration(seconds)}, {why}{others(known.values(), culprit.rank)}"
        self._end(culprit, message)

    def _look(self, here: Heartbeat) -> tuple[Heartbeat, str] | None:
        """Which rank the others wait for; None as long as one of them is at work within its limit."""
        before = self.attempt.heartbeats()
        time.sleep(3 * self._every)
        after = self.attempt.heartbeats() | {here.rank: here}
        for rank, one in sorted(after.items(), key=lambda item: item[1].waits):
            if rank == here.rank:
                continue
            silent = rank in before and before[rank].beat == one.beat
            if silent and here.seconds > limit(self.settings, one.section):
                return one, "and silent since"
            if silent or not one.waits:
                return None
        return here, "and all ranks wait for each other"

    def _end(self, culprit: Heartbeat, message: str) -> None:
        """The job cannot go on: say so, let the others write their stacks, leave. Never through MPI, which may hang."""
        self._dump(message)
        entry = {
            "kind": "hang",
            "rank": culprit.rank,
            "size": culprit.size,
            "host": culprit.host,
            "pid": culprit.pid,
            "time": time.time(),
            "step": culprit.step,
            "section": culprit.section,
            "type": "Hang",
            "message": message,
            "hint": None,
            "sentence": False,
            "code": int(Exit.CRASH),
            "traceback": "",
            "told_by": self.environment.rank,
        }
        with contextlib.suppress(OSError):
            self.attempt.stacks.touch()
        with contextlib.suppress(StorageError, OSError):
            write_json(self.attempt.error(self.environment.rank), entry)
        if self.environment.size > 1:
            time.sleep(2 * self._every + 0.5)
        os._exit(Exit.CRASH)

    def _dump(self, why: str) -> None:
        self._dumped = True
        with contextlib.suppress(OSError, ValueError):
            self.log.write(f"watchdog: rank {self.environment.rank}: {why}; stacks of all threads:\n")
            self.log.flush()
            faulthandler.dump_traceback(self.log, all_threads=True)
