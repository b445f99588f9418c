"""`${env:NAME}` and `${env:NAME:-default}` in the values of a config. Pure: the environment is an argument.

A variable that is empty counts as unset, as in the shell. `$${env:` is a literal `${env:`. Where a value is nothing but
one reference, what it stands for is read as a YAML scalar: `workers: ${env:CORES}` is a number.

>>> substitute("${env:SCRATCH:-/tmp}/runs", {"SCRATCH": "/scratch/me"})
'/scratch/me/runs'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.errors import Mistake
from harness.yamlfile import Node, scalar

_REFERENCE = re.compile(r"(?<!\$)(?:\$\$+\{env:|\$\{env:(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\})?)")


def substitute(text: str, environ: Mapping[str, str]) -> str:
    """Text with its references replaced, once: what a variable holds is not looked into. Raises ValueError."""

    def replace(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        name, default = match.groups()
        if name is None:
            raise ValueError(f"{text!r} has a reference that is not ${{env:NAME}} or ${{env:NAME:-default}}")
        value = environ.get(name) or default
        if value is None:
            raise ValueError(f"the environment variable {name} is not set; ${{env:{name}:-...}} would give a default")
        return value

    return _REFERENCE.sub(replace, text)


def escape(text: str) -> str:
    """Text that `substitute` turns back into this one."""
    return re.sub(r"(?<!\$)\$+\{env:", lambda match: f"${match[0]}", text)


def expand(
    node: Node, environ: Mapping[str, str], path: tuple[Any, ...] = ()
) -> tuple[Node, dict[tuple[Any, ...], Mistake]]:
    """A tree with all references replaced, and what was wrong with them, by path."""
    wrong: dict[tuple[Any, ...], Mistake] = {}
    if isinstance(node.value, dict):
        values = {}
        for key, child in node.value.items():
            values[key], more = expand(child, environ, (*path, key))
            wrong |= more
        return Node(values, node.place), wrong
    if isinstance(node.value, list):
        items = []
        for index, child in enumerate(node.value):
            item, more = expand(child, environ, (*path, index))
            items.append(item)
            wrong |= more
        return Node(items, node.place), wrong
    if not isinstance(node.value, str):
        return node, {}
    dotted = ".".join(map(str, path))
    try:
        text = substitute(node.value, environ)
        text.encode()
    except UnicodeEncodeError:
        return node, {path: Mistake(node.place, f"{dotted}: {text!r} is not text in UTF-8")}
    except ValueError as error:
        return node, {path: Mistake(node.place, f"{dotted}: {error}")}
    match = _REFERENCE.fullmatch(node.value)
    whole = match is not None and match[1] is not None
    return Node(scalar(text) if whole else text, node.place, text), {}
