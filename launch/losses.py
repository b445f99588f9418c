"""Which ranks an elastic run has lost, told once each, and whether those that are left wait for more.

horovodrun says how a process has ended, by the number with which it began; whose that is now, and where, the heartbeats
say. The heartbeat of a rank that is gone is taken away: those that are left may be fewer for hours.

    losses = Losses(attempt, least=2)
    for text in losses.hear(lines): say(text)        # "rank 0 of 2 on a was ended by SIGKILL, ..."
    if losses.waiting(): ...                         # nobody trains
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from harness.errors import Exit
from harness.heartbeat import WAITING, Heartbeat, last_seen
from harness.rundir import Attempt
from launch import processes
from launch.hosts import is_local
from launch.report import ENDED, signal_name


@dataclass
class _Exit:
    """A process that has ended, and the rank that it was, where that is known."""

    number: int
    code: int
    lost: Heartbeat | None = None


@dataclass
class Losses:
    """Of one attempt. `least`: fewer ranks than that do not go on."""

    attempt: Attempt
    least: int
    _exits: list[_Exit] = field(default_factory=list)
    _told: set[tuple[str, int]] = field(default_factory=set)
    _short: bool = False

    def hear(self, lines: Iterable[str], known: Iterable[Heartbeat] = ()) -> list[str]:
        """Take what the launcher has said; give what there is to tell. `known`: heartbeats of a moment ago.

        Of what is said now the next call tells: the others have seen it by then.
        """
        told: list[str] = []
        if self._exits:
            now = {(one.host, one.pid): one for one in (*known, *self.attempt.heartbeats().values())}
            self._exits = [one for one in self._exits if not self._is_told(one, now, told)]
        for line in lines:
            if match := ENDED.match(line):
                self._exits.append(_Exit(int(match[1]), int(match[2])))
        return told

    def waiting(self) -> bool:
        """Whether nobody trains: no rank has started yet, or those that are left are too few and wait for more."""
        wait = [one.section == WAITING for one in self.attempt.heartbeats().values()]
        if not wait:
            return True
        if self._short:
            if len(wait) < self.least or any(wait):
                return all(wait)
            self._short = False
        return False

    def _is_told(self, ended: _Exit, now: Mapping[tuple[str, int], Heartbeat], told: list[str]) -> bool:
        """Whether nothing more is to be told of an exit; False while nobody is seen to go on."""
        if ended.code in (Exit.FINISHED, Exit.STOPPED):  # also of a rank that was taken away
            return True
        gone = [one for who, one in now.items() if who not in self._told and _ended(one)]
        if ended.lost is None:
            # the numbers have been given anew after the first loss, and other hosts' processes cannot be looked at
            there = [] if self._told else [one for one in now.values() if not is_local(one.host)]
            mine = [one for one in (*gone, *there) if one.rank == ended.number]
            ended.lost = next(iter(mine or gone), None)
            if ended.lost is not None:
                self._told.add((ended.lost.host, ended.lost.pid))
        lost = ended.lost
        # horovodrun drops the whole host
        left = [one for one in now.values() if not _ended(one) and (lost is None or one.host != lost.host)]
        if not left:
            return False  # if that stays so, `judge` tells
        if lost is not None:
            self._forget(lost)
        code = ended.code
        how = f"was ended by {signal_name(code - 128)}" if code > 128 else f"ended with code {code}"
        who = f"rank {lost.rank} of {lost.size} on {lost.host}" if lost else f"what began as rank {ended.number}"
        seen = f", {last_seen(lost)}" if lost else ""
        told.append(f"{who} {how}{seen}; {self._others(len(left))}")
        return True

    def _others(self, left: int) -> str:
        others = "the other" if left == 1 else f"the {left} others"
        self._short = left < self.least
        if not self._short:
            return f"{others} go{'es' * (left == 1)} on from memory"
        return f"{others} wait{'s' * (left == 1)} until there are {self.least} ranks again"

    def _forget(self, lost: Heartbeat) -> None:
        """Unless another rank has its number by now."""
        if (now := self.attempt.heartbeats().get(lost.rank)) is not None and now.pid == lost.pid:
            with contextlib.suppress(OSError):
                self.attempt.heartbeat(lost.rank).unlink()


def _ended(one: Heartbeat) -> bool:
    return is_local(one.host) and not processes.runs(one.pid)
