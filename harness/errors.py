"""Every error a user can meet; each class knows its exit code.

A message is a sentence that says what is wrong and where; `hint` says what to do. The command line prints both and no
traceback. Codes follow BSD sysexits (`os.EX_*`), so that a batch script can decide by them:

>>> ConfigError("global_batch 100 does not divide by 3 ranks", hint="use 99 or 102").code
<Exit.CONFIG: 78>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


def some(things: Sequence[object], most: int = 10) -> str:
    """A list in a sentence, however long it is.

    >>> some(["a", "b"]), some(range(100), most=3)
    ('a, b', '0, 1, 2 and 97 more')
    """
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more


class Exit(IntEnum):
    """Exit codes of every `harness` command and of every rank."""

    FINISHED = 0
    CRASH = 1  # what a restart may mend: an unexpected exception, also in a user's task, a hang, a lost host
    USAGE = 64  # bad command line
    DATA = 65  # corrupt data or checkpoint
    NO_INPUT = 66  # an input file is not there
    UNAVAILABLE = 69  # something needed (MPI, GPU, library, hosts, ...) is missing, in use or does not fit
    INTERNAL = 70  # replicas diverged, or a check of our own failed
    IO = 74  # disk full, read-only, I/O error
    STOPPED = 75  # stopped early, state saved: run me again
    CONFIG = 78  # bad config
    INTERRUPTED = 130  # Ctrl-C, second time: ended at once


class HarnessError(Exception):
    """Base of the errors that are told as a sentence, without a traceback."""

    code: Exit = Exit.INTERNAL

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class UsageError(HarnessError):
    code = Exit.USAGE


class DataError(HarnessError):
    code = Exit.DATA


class InputMissing(HarnessError):
    code = Exit.NO_INPUT


class Unavailable(HarnessError):
    code = Exit.UNAVAILABLE


class InternalError(HarnessError):
    code = Exit.INTERNAL


class StorageError(HarnessError):
    code = Exit.IO


class Stopped(HarnessError):
    """Not a failure: the run was asked to stop, its state is saved."""

    code = Exit.STOPPED


@dataclass(frozen=True)
class Mistake:
    """One mistake in a config: `where` is "file:line" or "command line"."""

    where: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}"
        return text if self.hint is None else f"{text} ({self.hint})"


class ConfigError(HarnessError):
    """One or more mistakes in a config, all told at once."""

    code = Exit.CONFIG

    def __init__(self, problem: str | Sequence[Mistake], *, hint: str | None = None) -> None:
        if isinstance(problem, str):
            self.mistakes: tuple[Mistake, ...] = ()
            super().__init__(problem, hint=hint)
        else:
            self.mistakes = tuple(problem)
            count = len(self.mistakes)
            head = "1 mistake in the config:" if count == 1 else f"{count} mistakes in the config:"
            super().__init__("\n  ".join([head, *map(str, self.mistakes)]), hint=hint)
