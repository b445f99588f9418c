"""Durations (`90`, `30s`, `10m`, `1.5h`, `2d`, `100ms`, `1:30:00`) and sizes (`64MB`, `8GiB`, `1024`), both ways.

>>> duration("10m"), size("64MB"), size("64MiB")
(600.0, 64000000, 67108864)
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
BYTES = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}
_UNITS = {unit.lower(): factor for unit, factor in BYTES.items()}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


MAX_LENGTH = 40  # no number is longer, and the pattern would take long over much longer ones


def duration(value: object) -> float:
    """Seconds. A bare number is seconds; `h:mm:ss` and `d-hh:mm:ss` are accepted as in Slurm. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("give a duration such as 30s, 10m or 2h")
    if isinstance(value, str):
        if len(value) > MAX_LENGTH:
            raise ValueError("this is not a duration; write it as 30s, 10m, 2h or 1:30:00")
        if re.fullmatch(r"\d+:\d{1,2}(:\d{1,2})?", value):
            parts = [int(part) for part in value.split(":")]
            seconds = float(sum(part * 60**power for power, part in enumerate(reversed(parts))))
        elif match := re.fullmatch(r"(\d+)-(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?", value):
            days, hours, minutes, rest = (int(part or 0) for part in match.groups())
            seconds = float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
        else:
            match = _NUMBER.fullmatch(value)
            unit = match[2].lower() if match else ""
            if not match or (unit and unit not in SECONDS):
                raise ValueError(f"{value!r} is not a duration; write it as 30s, 10m, 2h or 1:30:00")
            seconds = float(match[1]) * SECONDS.get(unit, 1.0)
    else:
        seconds = float(value)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError("a duration is a finite number that is not negative")
    return seconds


def size(value: object) -> int:
    """Bytes. MB is 1000**2, MiB is 1024**2. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("give a size such as 64MB or 8GiB")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value) if len(value) <= MAX_LENGTH else None
        unit = match[2].lower() if match else ""
        if not match or (unit and unit not in _UNITS):
            raise ValueError(f"{value[:MAX_LENGTH]!r} is not a size; write it as 64MB or 8GiB")
        text, factor = match[1], _UNITS.get(unit, 1)
    else:
        text, factor = repr(value), 1
    if not 0 <= float(text) * factor < 1e24:  # also false for nan
        raise ValueError("a size is a finite number of bytes that is not negative")
    return int(Decimal(text) * factor)  # a float would lose bytes of large sizes


def show_duration(seconds: float) -> str:
    """'0.8 s', '42 s', '3 min 05 s', '2 h 10 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def show_seconds(seconds: float) -> str:
    """'12.3 ms', '1.23 s': of what is measured."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def show_size(count: float) -> str:
    """'512 B', '3.4 MB', '1.2 GB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


Duration = Annotated[
    float,
    BeforeValidator(duration),
    WithJsonSchema({"type": ["number", "string"], "minimum": 0, "examples": ["30s", "10m", "2h", "1:30:00"]}),
]
Size = Annotated[
    int,
    BeforeValidator(size),
    WithJsonSchema({"type": ["number", "string"], "minimum": 0, "examples": ["64MB", "8GiB"]}),
]
