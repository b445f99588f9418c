"""One start of a run, from the outside: run the command, pass its output on, stop it when asked, end it when it hangs.

The launcher gets a session of its own, so a terminal's Ctrl-C reaches only this process: the first asks the ranks to
save and stop (the stop file), the second ends them. Nothing is decided in a signal handler. Starting again after an
end is the caller's (`start.py`), by the `Ending`.

    with handling() as requests:
        ending = supervise(command, program, run, attempt, run_id=uuid4().hex, requests=requests, settings=watchdog)
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from harness.errors import Exit, Unavailable
from harness.rundir import Attempt, RunDir, storage_errors
from launch import processes
from launch.command import Command
from launch.console import Parted
from launch.losses import Losses
from launch.report import Ending, judge
from launch.stall import Stall, Told, explain, where_to_look
from launch.stop import BY_SIGNAL
from launch.watch import Watch, oom_kills

if TYPE_CHECKING:
    from harness.config import Watchdog

GRACE = 3.0
"""Seconds between TERM and KILL; with PATIENCE a failed job is gone within 10 s."""
LOG_LIMIT = 256 * 2**20
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Besides Ctrl-C; USR2, or what `slurm.signal` says, is what Slurm sends to the batch script before the time limit."""


@dataclass
class Requests:
    """Signals that came, by count; filled by the handler, read by whoever waits."""

    interrupts: int = 0
    stops: int = 0
    asked: bool = False
    """The ranks have been asked to stop."""
    first: str = ""
    """The name of the first signal that came."""
    at_once: bool = False
    """Nothing is there to save: every signal ends the ranks. Goes with `asked`."""

    def take(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number).name.removeprefix("SIG")
        if number == signal.SIGINT or self.at_once:
            self.interrupts += 1
        else:
            self.stops += 1


def supervise(
    command: Command,
    program: Sequence[str],
    run: RunDir,
    attempt: Attempt,
    *,
    run_id: str,
    requests: Requests,
    settings: Watchdog,
    least: int | None = None,
) -> Ending:
    """Run a command to its end, print what there is to say, and return how it ended.

    `requests` are those of `handling`, which the caller is in. No process of the start is left on this machine,
    whatever happens. `least`: it is an elastic run, of so many ranks at least.

    Raises Unavailable when the command cannot be started, StorageError when its log cannot be written.
    """
    environment = os.environ | command.env | {processes.RUN_ID: run_id}
    memory = oom_kills()
    with storage_errors(attempt.root):
        log = open(attempt.root / "launcher.log", "wb", buffering=0)  # noqa: SIM115 - closed below
    with log:
        try:
            process = subprocess.Popen(
                command.argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=processes.ends_with(os.getpid()),
            )
        except OSError as error:
            raise Unavailable(f"{command.argv[0]} cannot be started: {error.strerror}", hint="harness check") from error
        tagged = Path(command.argv[0]).name == "horovodrun"
        streams = _Streams(process, log, tagged)
        watch = Watch(run, attempt, program, run_id, settings, least is not None)
        losses = Losses(attempt, least) if least is not None else None
        try:
            killed = _follow(process, streams, watch, losses, requests, run, run_id)
            if (process.returncode or 0) < 0:  # killed; TERM would ask its ranks to save and stop, which nobody wants
                processes.kill(process.pid, run_id)
            processes.end(process.pid, run_id, grace=GRACE)
            streams.drain()
        finally:
            processes.end(process.pid, run_id, grace=0.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    if killed == "interrupted":
        return Ending(Exit.INTERRUPTED, "failed", "ended at once", kind="interrupted")
    if killed == "stopped":
        text = "stopped while it waited for ranks"
        if attempt.heartbeats():
            text += "; what they did after the last checkpoint was in memory only"
        return Ending(Exit.STOPPED, "stopped", text, kind="stopped")
    return judge(
        attempt.errors(),
        run.read_status(),
        attempt=attempt.number,
        returncode=process.returncode if process.returncode is not None else -signal.SIGKILL,
        noise=streams.noise(),
        killed=killed,
        hang=watch.hang,
        heartbeats=attempt.heartbeats(),
        memory=oom_kills() > memory,
        elastic=least is not None,
        stall=streams.stall(),
    )


def _follow(
    process: subprocess.Popen[bytes],
    streams: _Streams,
    watch: Watch,
    losses: Losses | None,
    requests: Requests,
    run: RunDir,
    run_id: str,
) -> str | None:
    """Until the launcher has ended. Returns why the ranks were ended from here, if they were."""
    stalls = Told()
    while process.poll() is None:
        streams.pump(0.1)
        if (stall := streams.stall()) is not None and stalls.is_news(stall, time.monotonic()):
            beats = watch.attempt.heartbeats()
            say("\n  ".join(filter(None, [f"warning: {explain(stall, beats)}", where_to_look(stall, beats)])))
        if losses is not None:
            for text in losses.hear(streams.ended(), watch.pulse.last.values()):
                say(text)
            wanted = requests.asked or requests.interrupts + requests.stops
            if (wanted or run.stop.exists()) and losses.waiting():  # nobody trains who could save and stop
                requests.asked = True
                processes.end(process.pid, run_id, grace=GRACE)
                return "stopped"
        if requests.interrupts + requests.stops and not requests.asked:
            requests.asked = True
            _ask_to_stop(run, requests.first, "Ctrl-C again ends now" if requests.interrupts else "SIGINT ends now")
            requests.interrupts = max(0, requests.interrupts - 1)
        elif requests.asked and requests.interrupts:
            say("ending now")
            processes.end(process.pid, run_id, grace=GRACE)
            return "interrupted"
        elif watch.overdue():
            processes.end(process.pid, run_id, grace=GRACE)
            return watch.reason
    return None


def _ask_to_stop(run: RunDir, signals: str, then: str) -> None:
    try:
        with contextlib.suppress(FileExistsError), open(run.stop, "x") as file:
            file.write(f"{BY_SIGNAL} {signals}\n")
    except OSError as error:
        say(f"the stop file {run.stop} cannot be written ({error.strerror}); {then}")
    else:
        say(f"saving and stopping, in about 10 s or after this step; {then}")


class _Streams:
    """The launcher's stdout and stderr: raw into the log, without noise onto ours."""

    def __init__(self, process: subprocess.Popen[bytes], log: FileIO, tagged: bool) -> None:
        self._selector = selectors.DefaultSelector()
        self._log = log
        self._logged = 0
        self._parts: list[tuple[Parted, int]] = []
        assert process.stdout is not None and process.stderr is not None
        for stream, target in ((process.stdout, 1), (process.stderr, 2)):
            os.set_blocking(stream.fileno(), False)
            part = (Parted(errors=target == 2, tagged=tagged), target)
            self._parts.append(part)
            self._selector.register(stream, selectors.EVENT_READ, part)

    def pump(self, timeout: float) -> bool:
        """Pass on what there is, waiting at most `timeout` seconds for it; whether anything came."""
        if not self._selector.get_map():
            time.sleep(timeout)
            return False
        events = self._selector.select(timeout)
        for key, _ in events:
            parted, target = key.data
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fileobj)
                _write(target, parted.close())
                continue
            if self._logged < LOG_LIMIT:
                self._logged += len(data)
                with contextlib.suppress(OSError):  # a full disk is the ranks' to report, and no reason to end them
                    self._log.write(data)
            _write(target, parted.feed(data))
        if not events:
            for parted, target in self._parts:
                _write(target, parted.idle())
        return bool(events)

    def drain(self) -> None:
        """The rest, once no process writes any more."""
        while self._selector.get_map() and self.pump(0.2):
            pass
        for parted, target in self._parts:
            _write(target, parted.close())
        self._selector.close()

    def stall(self) -> Stall | None:
        """The last that Horovod said of operations that only some ranks have come to."""
        return next((parted.stalls.last for parted, _ in self._parts if parted.stalls.last is not None), None)

    def ended(self) -> list[str]:
        """What horovodrun has said of ranks that have ended since it was last asked for."""
        return [parted.ended.popleft() for parted, _ in self._parts for _ in range(len(parted.ended))]

    def noise(self) -> list[str]:
        return [line for parted, _ in self._parts for line in parted.noise]


@contextlib.contextmanager
def handling(requests: Requests | None = None) -> Iterator[Requests]:
    """Take the signals over that ask for a stop, for as long as the block runs. Main thread only."""
    requests = requests or Requests()
    numbers = (signal.SIGINT, *STOP_SIGNALS)
    before = {number: signal.signal(number, requests.take) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    _write(2, f"\n{text}\n".encode())


def _write(target: int, data: bytes) -> None:
    """To the terminal or file behind our stdout or stderr. A reader that has gone away does not end the run."""
    with contextlib.suppress(OSError, ValueError):
        (sys.stdout if target == 1 else sys.stderr).flush()
        while data:
            data = data[os.write(target, data) :]
