"""A config as text that states every field, and how two configs differ. Not here: the run directory (`rundir.py`).

>>> compare(frozen, config, under=["optim"])                                          # doctest: +SKIP
['optim.lr is 0.001 there and 0.01 here (optim.lr=0.001 agrees)']
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from harness.config import Config
from harness.errors import ConfigError
from harness.references import escape
from harness.yamlfile import dump


def freeze(config: Config) -> str:
    """YAML text that states every field: `resolve` of it gives an equal config, whatever defaults become later.

    Raises ConfigError for a value (of task.args or the like) that YAML cannot hold.
    """
    head = f"# The config of run {config.name}, every field stated. `harness run <this directory>` goes on with it.\n"
    return head + dump({name: _storable(value, name) for name, value in config.model_dump().items()})


def leaves(config: Config) -> dict[tuple[str, ...], Any]:
    """Every value by its path; free-form mappings (task.args) are gone into, lists are not."""
    return dict(_leaves(config, ()))


def compare(there: Config, here: Config, *, under: Sequence[str], but: Sequence[str] = ()) -> list[str]:
    """A sentence for each leaf below the dotted paths `under`, those below `but` excepted, in which two configs differ.

    It names both values, and the override that gives `here` the value of `there`.
    """

    def chosen(config: Config) -> dict[tuple[str, ...], Any]:
        found = leaves(config).items()
        return {path: value for path, value in found if _below(path, under) and not _below(path, but)}

    left, right = chosen(there), chosen(here)
    sentences = []
    for path in {**left, **right}:
        # compared as text, because nan (of task.args) is not equal to itself, and True is equal to 1
        if path in left and path in right and repr(left[path]) == repr(right[path]):
            continue
        if any(other[: len(path)] == path and other != path for other in (*left, *right)):
            continue  # an empty mapping here, a filled one there: its entries tell
        name = ".".join(path)
        asked = dump(_storable(right[path], name), inline=True) if path in right else "not set"
        if path in left:
            value = dump(_storable(left[path], name), inline=True)
            sentences.append(f"{name} is {value} there and {asked} here ({shlex.quote(f'{name}={value}')} agrees)")
        else:
            sentences.append(f"{name} is not set there and {asked} here (leave it out)")
    return sentences


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _leaves(getattr(value, name), (*path, name))
    elif isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, str(key)))
    else:
        yield path, value


def _below(path: tuple[str, ...], roots: Sequence[str]) -> bool:
    return any(path[: root.count(".") + 1] == tuple(root.split(".")) for root in roots)


def _storable(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _storable(child, f"{path}.{key}") for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(child, path) for child in value]
    if isinstance(value, str):
        return escape(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ConfigError(f"{path} is a {type(value).__name__}, which a config file cannot hold")
