"""Which part of a checkpoint is restored, under which names, and what may differ. The default is: all of it, exactly.

Fine-tuning: the model of a checkpoint into a model with another head, without the optimizer; it was called `backbone`
there, and was in bfloat16:

>>> part = Partial(only="model/*", rename={"model/backbone.*": "model/encoder.*"}, cast=True,
...                missing="keep", unexpected="skip", mismatched="skip")
>>> part.renamed("model/backbone.0.weight"), part.wants("model/encoder.0.weight"), part.wants_entry("optimizer")
('model/encoder.0.weight', True, False)

Nothing here reads a checkpoint; `state.prepare` goes by it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from harness.errors import UsageError

_Missing = Literal["error", "keep"]
_Skip = Literal["error", "skip"]


@dataclass(frozen=True)
class Partial:
    """What to restore. Names are leaf paths, as `harness ckpt inspect` shows them: `model/fc.weight`.

    only: globs on names *here*; `*` stands for any text, also with `/` and `.` in it, `?` for one character, `[ab]` for
        one of these. What no glob matches stays as it is and is asked for nothing. Optimizers, holders of state and
        dicts of plain values are restored as a whole or not at all: `optimizer/*` or `optimizer`.
    rename: names in the checkpoint -> names here, the first that fits counts. One `*` in each carries its text over.
        `ema/*` -> `model/*` also gives an entry another name, and a renamed tensor goes before one that has the name
        already. Of an optimizer, `optimizer/old.*` -> `optimizer/new.*` renames the parameters.
    cast: a tensor may be of another dtype in the checkpoint, and is converted: any float to any float (values beyond
        the range of a narrower one become infinite, and a line says so), any integer to a wider one.
    missing: what is here and not in the checkpoint: an error, or `keep` it as it is.
    unexpected: what is in the checkpoint and not here: an error, or `skip` it.
    mismatched: what has another shape (or a dtype that cannot be converted): an error, or `skip` it.
    """

    only: str | Sequence[str] = ("*",)
    rename: Mapping[str, str] = field(default_factory=dict)
    cast: bool = False
    missing: _Missing = "error"
    unexpected: _Skip = "error"
    mismatched: _Skip = "error"

    def __post_init__(self) -> None:
        for name, allowed in (("missing", _Missing), ("unexpected", _Skip), ("mismatched", _Skip)):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(
                    f"Partial({name}={getattr(self, name)!r}) is unknown; it is {' or '.join(get_args(allowed))}"
                )
        for source, target in self.rename.items():
            if source.count("*") > 1 or target.count("*") != source.count("*"):
                raise UsageError(f"Partial(rename={{{source!r}: {target!r}}}) needs one * on both sides, or none")

    @cached_property
    def _only(self) -> re.Pattern[str]:
        globs = (self.only,) if isinstance(self.only, str) else self.only
        return re.compile("|".join(fnmatch.translate(glob) for glob in globs) or r"(?!)", re.DOTALL)

    def wants(self, name: str) -> bool:
        """Whether this tensor is to be restored, by its name here."""
        return self._only.match(name) is not None

    def wants_entry(self, entry: str) -> bool:
        """Whether an entry that is restored as a whole is to be restored, by its name here."""
        return self.wants(entry) or self.wants(entry + "/")

    def renamed(self, name: str) -> str:
        """The name here of what has this name in the checkpoint."""
        for source, target in self.rename.items():
            before, star, after = source.partition("*")
            if not star:
                if name == source:
                    return target
            elif len(name) >= len(before) + len(after) and name.startswith(before) and name.endswith(after):
                return target.replace("*", name[len(before) : len(name) - len(after)])
        return name

    def renamed_entry(self, entry: str) -> str:
        """The same for an entry: by a rule for its own name, or by one that moves all that is below it."""
        exact = self.renamed(entry)
        below = self.renamed(entry + "/")
        if exact != entry or below.count("/") != 1 or not below.endswith("/"):
            return exact
        return below.removesuffix("/")


EXACT = Partial()
"""All of the checkpoint into all of the state."""
