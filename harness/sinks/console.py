"""Metrics for people: a progress bar on a terminal, plain lines elsewhere.

A rank cannot see for itself whether anyone watches: mpirun gives it a pseudo-terminal even when its own output goes to
a file. `harness run` says so in HARNESS_TTY, which holds the terminal's width in columns.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

from harness.clock import OWN_WORK
from harness.env import identify
from harness.sinks import Record
from harness.units import show_duration

if TYPE_CHECKING:
    from rich.progress import Progress

HIDDEN = {"kind", "step"}
SLOW, NOTICEABLE = 1.3, 0.02
"""A rank is named whose own work takes this many times the mean, and so many seconds per step more: less is noise."""


class Console:
    """Writes to stdout; on a terminal the bar goes there alone, and the log file still gets plain lines."""

    def __init__(self, *, steps: int) -> None:
        self.steps = steps
        columns = os.environ.get("HARNESS_TTY", "")
        self.stream = getattr(sys.stdout, "console", sys.stdout)  # under harness.log.Tee: the console alone
        self.file = getattr(sys.stdout, "file", None)
        self.bar: Progress | None = None
        alone = identify().launcher == "none"
        if columns.isdecimal() or (alone and self.stream.isatty()):
            self.bar = _bar(self.stream, steps, max(40, min(int(columns), 400)) if columns.isdecimal() else None)
            self.task = self.bar.add_task("", total=steps, told="starting")
            self.bar.start()

    def record(self, record: Record) -> None:
        step = record["step"]
        assert isinstance(step, int)
        if record["kind"] == "train":
            told = describe(record)
            if self.bar is not None:
                with contextlib.suppress(OSError):  # nobody looks any more, as in Tee
                    self.bar.update(self.task, completed=step, told=told, refresh=True)
                self._note(f"step {step}/{self.steps}  {told}")
            else:
                print(f"step {step}/{self.steps}  {told}", flush=True)
        elif record["kind"] == "eval":
            values = [f"{key} {number(value)}" for key, value in record.items() if key not in HIDDEN]
            self.say(f"evaluation at step {step}: " + ", ".join(values))
        elif record["kind"] == "checkpoint":
            seconds, waited = record.get("seconds"), record.get("waited")
            took = f" in {seconds:.2f} s" if isinstance(seconds, float) else ""
            took += f", training waited {waited:.2f} s" if isinstance(waited, float) else ""
            self.say(f"checkpoint at step {step}: {record.get('path', '')}{took}")

    def say(self, text: str) -> None:
        if self.bar is not None:
            from rich.text import Text

            with contextlib.suppress(OSError):
                self.bar.console.print(Text(text))
            self._note(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.stop()

    def _note(self, text: str) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # as in Tee
                self.file.write(text + "\n")


def _bar(stream: Any, steps: int, width: int | None) -> Progress:
    """rich is imported where there is a terminal only: a start need not wait for it."""
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[told]}", table_column=Column(no_wrap=True)),
        console=Terminal(file=stream, force_terminal=True, width=width),
        auto_refresh=False,
    )


def describe(record: Record) -> str:
    """A train record in one line: 'loss 2.3100  lr 0.001  812 samples/s  eta 42 s'."""
    parts = [f"loss {number(record.get('loss'))}", f"lr {number(record.get('lr'))}"]
    rate = record.get("samples_per_s")
    if isinstance(rate, float):
        parts.append(f"{rate:,.0f} samples/s")
    waiting = record.get("share/communication")
    if isinstance(waiting, float) and waiting >= 0.005:
        parts.append(f"{waiting:.0%} communication")
    slowdown, work = record.get("slowdown"), own_work(record)
    if isinstance(slowdown, float) and slowdown >= SLOW and work * (slowdown - 1) >= NOTICEABLE:
        parts.append(f"rank {record.get('slowest_rank')} ({record.get('slowest_host')}) {slowdown:.1f}x slower")
    eta = record.get("eta_s")
    if isinstance(eta, float):
        parts.append(f"eta {show_duration(eta)}")
    return "  ".join(parts)


def own_work(record: Record) -> float:
    """Mean seconds per step that ranks spend on work of their own."""
    values = (record.get(f"seconds/{name}") for name in OWN_WORK)
    return sum(value for value in values if isinstance(value, float))


def number(value: object) -> str:
    """Four significant digits; 'nan' stays visible."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
