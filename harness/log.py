"""One log file per rank; rank 0's output is also on the console.

Ranks other than 0 write only to their file, whatever prints: Python, C libraries or an interpreter that crashes. Rank
0 keeps its console, and what Python prints there is copied to its file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from pathlib import Path
from typing import TextIO

from harness.rundir import storage_errors

_console: tuple[int, int, TextIO, TextIO] | None = None
"""Where the output went before it was first redirected."""


class Tee:
    """A text stream that writes to the console and to a file.

    What the file has no room for is on the console still; when nobody reads the console any more (the launcher was
    killed, a terminal was closed), the file gets it, and training goes on.
    """

    def __init__(self, console: TextIO, file: TextIO) -> None:
        self.console = console
        self.file = file
        self.encoding = console.encoding

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.file.write(text)
        with contextlib.suppress(OSError):
            self.console.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in (self.file, self.console):
            with contextlib.suppress(OSError):
                stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.console, name)  # buffer, errors, ...

    def isatty(self) -> bool:
        return self.console.isatty()

    def fileno(self) -> int:
        return self.console.fileno()


def redirect(path: Path, *, console: bool) -> TextIO:
    """Send this process's output to `path` (appended), and with `console` also to where it went before.

    Fatal signals write their stacks to the file, which is returned. May be called again: a rank may get another number.
    """
    global _console
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8", buffering=1, errors="backslashreplace")  # noqa: SIM115 - lives on
    faulthandler.enable(file)
    sys.stdout.flush()
    sys.stderr.flush()
    if _console is None:
        _console = os.dup(1), os.dup(2), sys.stdout, sys.stderr
    else:
        _release()
    if console:
        sys.stdout = Tee(sys.stdout, file)
        sys.stderr = Tee(sys.stderr, file)
        return file
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    return file


def _release() -> None:
    """Let this process write where it wrote at first."""
    if _console is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(_console[0], 1)
    os.dup2(_console[1], 2)
    sys.stdout, sys.stderr = _console[2:]
