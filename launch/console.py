"""What a launcher prints, parted into what ranks printed and the launcher's own noise about ranks that ended.

mpirun answers every failed run with a screenful ("Primary job terminated normally, but ..."), which hides the cause.
The noise is kept, not lost: where no rank left a report, it is all there is (`Parted.noise`). So are Horovod's stall
messages (`Parted.stalls`), which the supervisor tells in its own words, and what horovodrun says of ranks that have
ended (`Parted.ended`), which matters at once where the others go on.

    parted = Parted(errors=True)
    os.write(1, parted.feed(data))      # data as read from the launcher's stderr
"""

from __future__ import annotations

import re
from collections import deque

from launch.stall import Stalls

_RULE = re.compile(rb"-{70,}\s*")
_LINE = re.compile(
    rb"\[[^\]\s]+:\d+\] "  # [host:pid] of Open MPI
    rb"|\[(proxy:|mpiexec@)"
    rb"|(srun|slurmstepd(-[^\s:]+)?|mpirun|prterun|mpiexec): "
    rb"|application called MPI_Abort|Abort\(-?\d+\) on node"
)
_HYDRA = re.compile(  # Hydra says on stdout that ranks have ended badly
    rb"={70,}\s*$|=   |YOUR APPLICATION TERMINATED WITH|This typically refers to a problem|Please see the FAQ page for"
)
_HOROVODRUN = re.compile(  # on either stream, about ranks that have ended; the shell tells of its own children
    rb"Process \d+ exit with status code \d+\.|Terminating remaining workers after failure|(WARNING|ERROR):root:"
    rb"|\[[^\]]{1,300}: E [^\]]{1,1000}\.cc:\d+\]|(Killed|Terminated|Aborted)( \(core dumped\))?\s*$"
    rb"|ssh not successful for host \S+:|Launching horovod task function was not successful:"
)
_SSH = re.compile(rb"ssh: ")
"""Why a host cannot be reached, or which: shown and kept."""
_TRACE = re.compile(rb"Traceback \(most recent call last\):|Exception in thread ")
_AFTER = re.compile(  # the lines of its message, and what Python says at its end
    rb"Process name: |Exit code: \d|$|\S+: UserWarning: resource_tracker: |  warnings\.warn\('resource_tracker: "
)
_TAG = re.compile(rb"\[(?:\d+,)?\d+\]<std(?:out|err)>:?")  # horovodrun's, before every piece that a rank wrote
_START = (b"---", b"===", b"=   ", b"[", b"srun:", b"slurmstepd", b"mpirun:", b"application", b"Abort(")
_MOST = 60
"""Lines between two rules that may belong to one notice; more are somebody's table."""


class Parted:
    """One stream of a launcher. `errors`: its stderr, where notices stand between two rules of dashes."""

    def __init__(self, *, errors: bool, tagged: bool = False) -> None:
        self.noise: deque[str] = deque(maxlen=200)
        self.ended: deque[str] = deque(maxlen=10_000)
        self.stalls = Stalls()
        self._errors = errors
        self._tagged = tagged
        self._rest = b""
        self._begun = False  # the first part of the current line has been passed on already
        self._block: list[bytes] | None = None
        self._trace = False  # within a traceback of horovodrun itself

    def feed(self, data: bytes) -> bytes:
        """Take what was read; give what a user should see of it. Complete lines only; see `idle`."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        shown = bytearray()
        for line in lines:
            shown += self._line(line + b"\n")
        return bytes(shown)

    def idle(self) -> bytes:
        """Nothing came for a moment: pass on the line that has begun (a progress bar) unless it may become noise."""
        if not self._rest or self._block is not None or (not self._begun and self._may_be_noise(self._rest)):
            return b""
        shown, self._rest = self._untagged(self._rest), b""
        self._begun = True
        return shown

    def close(self) -> bytes:
        """The stream has ended: what is still held back."""
        shown = self._line(self._rest) if self._rest else b""
        self._rest = b""
        if self._block is not None:
            shown += b"".join(self._block)
            self._block = None
        return shown

    def _line(self, line: bytes) -> bytes:
        if self._tagged and not self._begun and self._of_horovodrun(line):
            self._keep([line])
            return b""
        line = self._untagged(line)
        if self._begun:
            self._begun = False
            return line
        if self._block is not None:
            self._block.append(line)
            if _RULE.fullmatch(line):
                self._keep(self._block)
                self._block = None
            elif len(self._block) > _MOST:
                block, self._block = self._block, None
                return b"".join(block)
            return b""
        if _SSH.match(line):
            self._keep([line])
            return line
        if self._errors and self.stalls.line(line.decode(errors="replace").rstrip("\r\n")):
            return b""
        if self._errors and _RULE.fullmatch(line):
            self._block = [line]
            return b""
        if (_LINE if self._errors else _HYDRA).match(line) or (self._tagged and _HOROVODRUN.match(line)):
            self._keep([line])
            if self._tagged and _HOROVODRUN.match(line):
                self.ended.append(self.noise[-1])
            return b""
        return line

    def _of_horovodrun(self, line: bytes) -> bool:
        """Whether it belongs to a traceback of horovodrun: what ranks write has a tag."""
        if _TAG.match(line):
            return False
        within, self._trace = self._trace, bool(_TRACE.match(line)) or (self._trace and line[:1] in (b" ", b"\n"))
        return within or self._trace or bool(_AFTER.match(line))

    def _untagged(self, line: bytes) -> bytes:
        return _TAG.sub(b"", line) if self._tagged else line

    def _may_be_noise(self, line: bytes) -> bool:
        return self._tagged or line.startswith(_START if self._errors else (b"===", b"=   "))

    def _keep(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line.decode(errors="replace").strip()
            if text and not set(text) <= {"-", "="}:
                self.noise.append(text)
