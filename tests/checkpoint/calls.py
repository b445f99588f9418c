"""Calls of the operating system that do what a test wants."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(name: str, act: Callable[..., Any]) -> Iterator[list[int]]:
    """os.NAME becomes act(number of the call, original, *arguments); yields a list of how many calls there were."""
    original, lock, calls = getattr(os, name), threading.Lock(), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            number, calls[0] = calls[0], calls[0] + 1
        return act(number, original, *args, **kwargs)

    setattr(os, name, call)
    try:
        yield calls
    finally:
        setattr(os, name, original)


def fcntl_flags(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)
