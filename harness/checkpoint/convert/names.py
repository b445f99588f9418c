"""Which tensors, under which names.

chosen = choose(source, only=["model/*"], strip=None)       # "model/fc.weight" becomes "fc.weight"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from harness.checkpoint import schema
from harness.checkpoint.convert.tensor import Source, Tensor
from harness.errors import DataError, InputMissing

_SHOWN = 5


def unescape(path: str) -> str:
    """What `schema.escape` made the components of a path from; the separators between them stay.

    >>> unescape("a%2Fb/%2E%2E/100%25")
    'a/b/../100%'
    """
    return "/".join(map(schema.unescape, path.split("/")))


def choose(
    source: Source, only: Sequence[str], strip: str | None, rename: Callable[[str], str] = str
) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors whose name, or one of whose names, matches one of the globs (all where there are none), renamed.

    The names lose the prefix `strip`, where they have it, and pass through `rename`. Returns (tensors, second names).
    Raises InputMissing where nothing matches, DataError where two tensors would have the same name.
    """
    chosen = _matching(source, only)
    if not chosen:
        if not only:
            raise InputMissing("there are no tensors in it")
        held = ", ".join(sorted({name.partition("/")[0] for name, _ in _matching(source, ())})[:_SHOWN])
        raise InputMissing(
            f"no tensor is called {' or '.join(only)}", hint=f"the names begin with: {held}" if held else None
        )
    final: dict[str, str] = {}
    for name, _ in chosen:
        new = rename(name.removeprefix(strip or ""))
        if new == "":
            raise DataError(f"nothing is left of the name {name!r} without {strip!r}")
        if new in final:
            raise DataError(f"{final[new]!r} and {name!r} would both be called {new!r}")
        final[new] = name
    new_name = {name: new for new, name in final.items()}
    by_name = {tensor.name: tensor for tensor in source.tensors}
    first: dict[str, str] = {}  # what a tensor is called in the source -> the first of its new names
    tensors: list[Tensor] = []
    aliases: dict[str, str] = {}
    for name, target in chosen:
        if target in first:
            aliases[new_name[name]] = first[target]
        else:
            first[target] = new_name[name]
            tensors.append(replace(by_name[target], name=new_name[name]))
    return tensors, aliases


def matches(name: str, only: Sequence[str]) -> bool:
    """Whether a name matches one of the globs; all do where there are none."""
    return not only or any(fnmatchcase(name, glob) for glob in only)


def _matching(source: Source, only: Sequence[str]) -> list[tuple[str, str]]:
    """(name, name of the tensor): first and second names that match."""
    names = [*((tensor.name, tensor.name) for tensor in source.tensors), *source.aliases.items()]
    return [(name, target) for name, target in names if matches(name, only)]


def common_entry(source: Source, only: Sequence[str]) -> str:
    """`model/` where all names that match begin so; nothing where they begin with different components."""
    entries = {name.partition("/")[0] for name, _ in _matching(source, only)}
    return f"{entries.pop()}/" if len(entries) == 1 else ""
