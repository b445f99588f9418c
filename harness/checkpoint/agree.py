"""What one rank cannot do, all ranks hear of: each works for itself, then one exchange, then the same end for all.

    result, messages = together(comm, step, "while it wrote its part", work)

This is not the commit itself (`commit`): it is how ranks vote before and after each of its phases.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.space import explain
from harness.errors import HarnessError, StorageError, some

T = TypeVar("T")
VISIBLE = 10.0
"""Seconds within which a file that rank 0 has made must be there for the other ranks."""

LEFT_OUT = "saving is for all ranks: is one slower, stuck, or left out by an `if`?"


class SaveFailed(StorageError):
    """A checkpoint was not saved. Raised on all ranks alike; the earlier checkpoints are as they were."""


def together(comm: Comm, step: int, when: str, work: Callable[[], tuple[T, Json]]) -> tuple[T, list[Any]]:
    """Work that every rank does by itself and that returns (result, message): its result, all ranks' messages.

    Raises SaveFailed on all ranks where one of them could not do it. Collective.
    """
    done, failure = attempt(work)
    votes: list[Any] = comm.all_gather(
        {"message": None if done is None else done[1], "error": describe(failure), "host": socket.gethostname()}
    )
    refused = refusal(dict(enumerate(votes)), [], [vote["host"] for vote in votes], when, "", 0.0)
    if refused is not None:
        told = f"the checkpoint of step {step} was not saved: {refused['failed']}"
        raise SaveFailed(told, hint=refused["hint"]) from failure
    assert done is not None
    return done[0], [vote["message"] for vote in votes]


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of some work, or what it raised."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def refusal(
    said: Mapping[int, Any], missing: Sequence[int], hosts: Sequence[str], when: str, absent: str, timeout: float
) -> dict[str, Any] | None:
    """Why a save cannot go on, as {"failed": sentence, "hint": ...}; None where it can.

    `said`: what each rank said, its `error` being `describe`d; `missing`: ranks that `absent` within `timeout` seconds.
    """
    if missing:
        named = some([f"{rank} ({hosts[rank]})" for rank in missing], 8)
        return {
            "failed": f"rank{'s' if len(missing) > 1 else ''} {named} {absent} within {timeout:g} s",
            "hint": LEFT_OUT,
        }
    failed = [(rank, message["error"]) for rank, message in sorted(said.items()) if message["error"]]
    if not failed:
        return None
    rank, told = failed[0]
    others = f" (and {len(failed) - 1} other ranks)" if len(failed) > 1 else ""
    place = f"rank {rank} on {told['host']}{others}" if len(hosts) > 1 else "it"
    return {"failed": f"{place} failed {told.get('when') or when}: {told['message']}", "hint": told["hint"]}


def describe(error: BaseException | None) -> Json:
    """An error in words for the other ranks, None where there is none."""
    if error is None:
        return None
    hint = error.hint if isinstance(error, HarnessError) else None
    if isinstance(error, OSError):
        message = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        _, hint = explain(error) or (None, None)
    else:
        message = error.message if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
    return {"host": socket.gethostname(), "message": message, "hint": hint}


def wait_for(path: Path, size: int) -> tuple[None, Json]:
    """Until the file that rank 0 made is there. Raises StorageError where this rank does not get to see it."""
    deadline = time.monotonic() + VISIBLE
    while True:
        try:
            found = os.stat(path).st_size
            if found == size:
                return None, None
        except FileNotFoundError:
            found = None
        if time.monotonic() > deadline:
            raise StorageError(
                f"{path} is not there" if found is None else f"{path} has {found} bytes here, not {size}",
                hint="all ranks must see the same directory: is it on a shared file system?",
            )
        time.sleep(0.05)
