"""Which checkpoints a run has, by their names: for programs that start and watch runs, and read none of them.

What counts is what `harness.checkpoint.store.listing` counts; reading checkpoints takes more imports than a start does.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"step-([0-9]{8,18})(?:-([0-9]{1,9}))?")


def checkpoints(directory: Path) -> list[str]:
    """Names of the checkpoints in use, oldest first: complete, not found damaged, not set aside."""
    found = []
    for path in directory.glob("step-*"):
        match = _NAME.fullmatch(path.name)
        marked = any((path / mark).exists() for mark in ("damaged.json", "aside.json"))
        if match and (path / "manifest.json").is_file() and not marked:
            found.append((int(match[1]), int(match[2] or 1), path.name))
    return [name for _, _, name in sorted(found)]


def step_of(name: str | None) -> int:
    """The step of a checkpoint's name, -1 for None."""
    match = _NAME.fullmatch(name or "")
    return int(match[1]) if match else -1
