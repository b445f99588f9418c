"""Start ranks of a program as a run would start them, hear what they print, and end them whatever happens.

    ended = run_ranks(plan, ("-m", "harness.probe"), timeout=60)
    print(ended.output, ended.late)

For short jobs of our own (a probe, a benchmark); runs are supervised by `supervise`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import BinaryIO

from launch import processes
from launch.command import build
from launch.plan import Plan

MOST = 4_000_000
"""Bytes of output that are kept."""
_LONGEST = 16_000_000
"""A line is no longer."""


@dataclass(frozen=True)
class Ended:
    """`output`: what nobody took. `late`: the ranks were ended because their time was up, or they said nothing."""

    output: str
    returncode: int
    late: bool = False


def run_ranks(
    plan: Plan,
    arguments: Sequence[str],
    *,
    timeout: float | None = None,
    silence: float | None = None,
    heard: Callable[[str], bool] = lambda line: False,
    environ: Mapping[str, str] = os.environ,
) -> Ended:
    """Run `python *arguments` on the plan's ranks. Returns when they, and all that they have started, have ended.

    timeout: seconds they may take. silence: seconds for which they may print nothing. heard: is given each line that
    they print, and takes it by returning True. A Ctrl-C or TERM that comes meanwhile ends them first.
    """
    run_id = uuid.uuid4().hex
    program = (sys.executable, *arguments)
    job = replace(plan.job, program=program, env=plan.job.env | {processes.RUN_ID: run_id})
    command = build(job, plan.mpi)
    # a file, not a pipe: a process that outlives its parent cannot hold it open
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as kept, _interruptible():
        lines = _Lines(output, kept, heard)
        try:
            process = subprocess.Popen(
                command.argv,
                env={**environ, **command.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.ends_with(os.getpid()),
            )
        except OSError as error:
            return Ended(f"{command.argv[0]} cannot be started: {error.strerror}", 127)
        try:
            late = _wait(process, lines, timeout, silence)
        finally:
            processes.end(process.pid, run_id, grace=2.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        lines.read(last=True)
        kept.seek(0)
        text = kept.read(MOST).decode(errors="replace")
        return Ended(text, process.returncode if process.returncode is not None else 137, late)


def _wait(process: subprocess.Popen[bytes], lines: _Lines, timeout: float | None, silence: float | None) -> bool:
    """Until the launcher has ended; True where it did not in time."""
    began = heard = time.monotonic()
    while True:
        try:
            process.wait(0.1)
            return False
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        heard = now if lines.read() else heard
        if (timeout is not None and now > began + timeout) or (silence is not None and now > heard + silence):
            return True


class _Lines:
    """What is added to a file by others, line by line; lines that nobody takes are kept."""

    def __init__(self, source: BinaryIO, kept: BinaryIO, heard: Callable[[str], bool]) -> None:
        self._source, self._kept, self._heard = source.fileno(), kept, heard
        self._at, self._rest = 0, b""

    def read(self, *, last: bool = False) -> bool:
        """What has come since; whether anything has."""
        some = False
        while data := os.pread(self._source, 1 << 20, self._at):
            some = True
            self._at += len(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._take(line)
            if len(self._rest) > _LONGEST:
                self._take(self._rest)
                self._rest = b""
        if last and self._rest:
            self._take(self._rest)
            self._rest = b""
        return some

    def _take(self, line: bytes) -> None:
        if not self._heard(line.decode(errors="replace")) and self._kept.tell() < MOST:
            self._kept.write(line + b"\n")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """TERM and HUP, which would end this process at once, become an exception: the ranks are ended before."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, leave)
    except ValueError:  # not the main thread: whoever runs it there has to see to it
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
