"""What things in a checkpoints directory are called.

    step-00001200           a checkpoint of step 1200
    step-00001200-2         saved again at this step; the higher number is the newer
    step-00001300.tmp-...   being written, or left by a program that ended
    tags/                   names that people gave to checkpoints (`tags`)
    lease/                  who saves here (`lease`)

In a checkpoint, beside `commit.DATA` and `commit.MANIFEST`, there may be one of the two marks below.

>>> parse_name("step-00001200-2"), make_name(1200, 2)
((1200, 2), 'step-00001200-2')
"""

from __future__ import annotations

import re

DAMAGED = "damaged.json"
"""It was found damaged: nobody uses it again."""
ASIDE = "aside.json"
"""Somebody went back to an older one: nobody uses it until it is brought back."""

_NAME = re.compile(r"step-([0-9]{8,18})(?:-([0-9]{1,9}))?")


def parse_name(name: str) -> tuple[int, int] | None:
    """(step, number of the save at this step) of a checkpoint's directory; None for any other name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def make_name(step: int, number: int = 1) -> str:
    """The name of the directory of a step's n-th save."""
    return f"step-{step:08d}" if number == 1 else f"step-{step:08d}-{number}"
