"""Retention rules as people write them: `last 3 | every 1000 | best val/loss 2 min`. Pure.

    last N              the newest N
    every N             those whose step is a multiple of N
    best METRIC [N] [min|max]   the N (1) with the lowest (highest) value of a metric
    all                 everything
    tagged              nothing more: those with a tag are kept in any case

>>> keep_rule("last 1 | every 1000").select([(500, {}), (1000, {}), (1500, {}), (1600, {})])
{1, 3}
"""

from __future__ import annotations

import difflib
import re
from typing import Literal

from harness.checkpoint.policy import Keep, keep_all, keep_best, keep_every, keep_last

WORDS = ("last", "every", "best", "all", "tagged")
MAX_LENGTH = 2000
_EXAMPLE = "write it as in: last 3 | every 1000 | best val/loss 2 min"


def keep_rule(text: str) -> Keep:
    """The rules of a text. Raises ValueError with a sentence that says what is wrong and how it is written."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a rule of {len(text)} characters is none")
    kept: Keep | None = None
    for part in text.split("|"):
        words = part.split()
        if not words:
            raise ValueError(f"there is an empty rule in {text!r}; {_EXAMPLE}")
        rule = _rule(words)
        kept = rule if kept is None else kept | rule
    assert kept is not None
    return kept


def _rule(words: list[str]) -> Keep:
    word, *rest = words
    if word == "last":
        return keep_last(_only_number(word, rest, "checkpoints"))
    if word == "every":
        rest = rest[:-1] if len(rest) == 2 and rest[1] in ("steps", "step") else rest
        return keep_every(steps=_only_number(word, rest, "steps"))
    if word == "best":
        return _best(rest)
    if word in ("all", "tagged"):
        if rest:
            raise ValueError(f"`{word}` stands alone, without {' '.join(rest)[:40]!r}")
        return keep_all() if word == "all" else Keep(())
    close = difflib.get_close_matches(word.lower(), WORDS, 1)
    meant = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(WORDS)}"
    raise ValueError(f"there is no rule {word[:40]!r}; {meant}")


def _best(rest: list[str]) -> Keep:
    if not rest:
        raise ValueError("`best` needs a metric, as in `best val/loss 2 min`")
    metric, *rest = rest
    mode: Literal["min", "max"] = "min"
    if rest and rest[-1] in ("min", "max"):
        mode = "max" if rest.pop() == "max" else "min"
    if len(rest) > 1 or (rest and not rest[0].isdecimal()):
        raise ValueError(f"`best {metric} {' '.join(rest)[:40]}` is not understood; {_EXAMPLE}")
    return keep_best(metric, _number("best", rest[0]) if rest else 1, mode=mode)


def _only_number(word: str, rest: list[str], what: str) -> int:
    if len(rest) != 1:
        raise ValueError(f"`{word}` needs one number of {what}, as in `{word} {3 if word == 'last' else 1000}`")
    return _number(word, rest[0])


def _number(word: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) == 0:
        raise ValueError(f"`{word}` needs a whole number of at least 1, not {text[:40]!r}")
    return int(text)
