"""A tree of values -> `Config`, or every mistake in it. Pure; not here: where the tree comes from (`resolve.py`).

>>> config, mistakes = validate(read(Path("run.yaml")))                               # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from harness.config import Config
from harness.errors import Mistake
from harness.mistakes import explain, fields, find, is_free_form
from harness.yamlfile import Node

_STAND_INS: dict[str, Any] = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 1}}
"""The least config that is right."""


def validate(tree: Node, known_bad: Collection[tuple[Any, ...]] = ()) -> tuple[Config | None, list[Mistake]]:
    """The config, or None and all mistakes but those at the places `known_bad`.

    A number where text is wanted is taken as it was written: `launch: {env: {OMP_NUM_THREADS: 4}}`.
    """
    values = _plain(tree)
    config, errors = _check(values)
    if any(error["type"] == "string_type" for error in errors):
        for error in errors:
            if error["type"] == "string_type":
                _take_as_text(values, tree, tuple(error["loc"]))
        config, errors = _check(values)
    if config is not None:
        return config, []
    told = [error for error in _all(values, errors) if not any(error["loc"][: len(loc)] == loc for loc in known_bad)]
    return None, explain(told, tree)


def _plain(node: Node, path: str = "", free: bool = False) -> Any:
    """Plain values for pydantic. A null in a section is left out, so that the default holds."""
    if isinstance(node.value, list):
        return [_plain(child, path, True) for child in node.value]
    if not isinstance(node.value, dict):
        return node.value
    values = {}
    for key, child in node.value.items():
        below = f"{path}.{key}" if path else key
        if child.value is not None or free or below not in fields():
            values[key] = _plain(child, below, free or is_free_form(below))
    return values


def _check(values: Any) -> tuple[Config | None, list[Any]]:
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        return None, list(error.errors(include_url=False))


def _take_as_text(values: Any, tree: Node, loc: tuple[Any, ...]) -> None:
    node, depth = find(tree, loc)
    if isinstance(node.value, (int, float)) and not isinstance(node.value, bool) and node.text is not None:
        for part in loc[: depth - 1]:
            values = values[part]
        values[loc[depth - 1]] = node.text


def _all(values: Any, errors: list[Any]) -> list[Any]:
    """pydantic checks across the fields of a section, and across sections, only once every part is right. So what is
    wrong is taken out, and what was waiting behind it shows, until nothing is left."""
    found = list(errors)
    touched: set[Any] = set()
    for _ in range(5):
        if not errors or not all(error["loc"] for error in errors):
            break
        for error in errors:
            section, *rest = error["loc"]
            touched.add(section)
            if rest and isinstance(values.get(section), dict):
                values[section].pop(rest[0], None)
            else:
                values.pop(section, None)
        for key, stand_in in _STAND_INS.items():
            if isinstance(stand_in, dict):
                required = {name: value for name, value in stand_in.items() if name != "steps" or key not in values}
                values[key] = {**required, **values.get(key, {})}
            values.setdefault(key, stand_in)
        errors = _check(values)[1]
        found += [
            error
            for error in errors
            if error["type"] == "value_error" and not (error["loc"] and error["loc"][0] in touched)
        ]
    return found
