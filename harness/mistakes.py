"""Sentences for what is wrong in a config: pydantic's errors in the user's words, with place and suggestion. Pure.

Not here: finding the errors (`resolve.py`). `fields()` is the schema as a flat list of dotted paths.

>>> suggest("optim.learning_rate"), suggest("train.lr"), suggest("optmi")
('optim.lr', 'optim.lr', 'optim')
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness.config import Config
from harness.errors import Mistake
from harness.yamlfile import Node

OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "optimizer": "optim",
    "batch_size": "train.global_batch",
    "max_steps": "train.steps",
    "num_epochs": "train.epochs",
    "grad_clip": "train.clip_norm",
    "scheduler": "schedule",
    "lr_schedule": "schedule",
    "warmup_steps": "schedule.warmup",
    "num_workers": "data.workers",
    "model": "task",
}
"""What other tools call it."""

KINDS = {
    "int_type": "a whole number",
    "int_parsing_size": "a whole number of this size",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
}

MAX_TOLD = 100
"""Mistakes told at once."""

_Error = Mapping[str, Any]


@cache
def fields() -> dict[str, FieldInfo]:
    """Every section and field of the schema by its dotted path, in order."""
    return dict(_fields(Config, ""))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, also of one that may be null."""
    for kind in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def is_free_form(path: str) -> bool:
    """Whether keys below this path are the user's own, as in task.args."""
    field = fields().get(path)
    return field is not None and typing.get_origin(field.annotation) is dict


def suggest(path: str) -> str | None:
    """The key that was probably meant by an unknown one."""
    section, _, key = path.rpartition(".")
    if key in OTHER_NAMES:
        return OTHER_NAMES[key]
    known = list(fields())
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.8):  # a slip of the pen
        return siblings[near[0]]
    same = [name for name in known if name.rpartition(".")[2] == key]
    if same:  # the key exists in another section: the one whose name is nearest
        return max(same, key=lambda name: difflib.SequenceMatcher(None, name, path).ratio())
    if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.6):
        return siblings[near[0]]
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    return near[0] if near else None


def find(tree: Node, parts: tuple[Any, ...]) -> tuple[Node, int]:
    """The deepest node on the way to a path, and how many of its parts exist."""
    node = tree
    for depth, part in enumerate(parts):
        inside: Any = node.value if isinstance(node.value, dict) else {}
        if isinstance(node.value, list):
            inside = dict(enumerate(node.value))
        if part not in inside:
            return node, depth
        node = inside[part]
    return node, len(parts)


def explain(errors: list[_Error], tree: Node) -> list[Mistake]:
    """One mistake per place for pydantic's errors about the values of `tree`."""
    by_path: dict[tuple[Any, ...], list[_Error]] = {}
    for error in errors:
        loc = tuple(error["loc"])
        _, depth = find(tree, loc)
        if error["type"] == "missing":
            depth = len(loc)
        by_path.setdefault(loc[:depth], []).append(error)  # what is cut off names a branch of a union
    told = [_mistake(parts, found, tree) for parts, found in list(by_path.items())[:MAX_TOLD]]
    if len(told) < len(by_path):
        told.append(Mistake(tree.place, f"{len(by_path)} mistakes in all, of which {MAX_TOLD} are told"))
    return told


def _mistake(parts: tuple[Any, ...], errors: list[_Error], tree: Node) -> Mistake:
    path = ".".join(map(str, parts))
    error = errors[0]
    kinds = [str(KINDS[other["type"]]) for other in errors if other["type"] in KINDS]
    if len(errors) > 1 and len(kinds) == len(errors):
        node, _ = find(tree, parts)
        return Mistake(node.place, f"{path}: {show(node)} is neither {' nor '.join(kinds)}")
    node, _ = find(tree, parts)
    tell = _SENTENCES.get(error["type"], _fallback)
    message, hint = tell(error, path, node)
    if error["type"] in ("value_error", "assertion_error"):
        node = _place_named_in(message, tree) or node
    return Mistake(node.place, message, hint)


def show(node: Node) -> str:
    """A value as a message quotes it."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "null"
    text = repr(node.value) if isinstance(node.value, str) else node.text or str(node.value)
    return text if len(text) <= 60 else text[:57] + "..."


def _extra(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    if path == "<<":
        return "YAML 1.2 has no merge key <<", "use `base: other.yaml`"
    if path == "base":
        return "base is a key of config files only", None
    if path in fields():  # a dotted key in a file
        section, _, key = path.rpartition(".")
        return f"unknown key {path!r}", f"write it as {section}: {{{key}: ...}}"
    near = suggest(path)
    return f"unknown key {path}", None if near is None else f"did you mean {near}?"


def _missing(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    if path.rpartition(".")[2].isdecimal():
        count = len(node.value) if isinstance(node.value, list) else 0
        return f"{path.rpartition('.')[0]} has too few values ({count})", None
    return f"{path} is missing: {_description(path)}", None


def _type(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    wanted = KINDS[error["type"]]
    hint = None
    if error["type"] == "int_type" and isinstance(node.value, float) and node.value.is_integer():
        hint = f"write {int(node.value)}"
    elif error["type"] == "bool_type" and str(node.value).lower() in ("yes", "on", "no", "off"):
        hint = f"write {str(str(node.value).lower() in ('yes', 'on')).lower()}"
    elif error["type"] == "string_type" and node.text is not None:
        hint = f'quote it: "{node.text}"'
    elif error["type"] in ("list_type", "tuple_type") and node.text is not None:
        hint = f"write [{node.text}]"
    return f"{path}: {show(node)} is not {wanted}", hint


def _section(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    if not path:
        return "a config is a mapping", None
    hint = f"did you mean {path}.name?" if f"{path}.name" in fields() and node.text is not None else None
    return f"{path} is a section with keys of its own; {show(node)} is not", hint


def _choice(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    field = fields().get(path)
    options = [str(option) for option in _literals(field.annotation)] if field else []
    if not options:
        return f"{path}: {show(node)} is not {error['ctx']['expected']}", None
    near = difflib.get_close_matches(str(node.value), options, n=1)
    return f"{path}: {show(node)} is not one of {', '.join(options)}", f"did you mean {near[0]}?" if near else None


def _bound(phrase: str, key: str) -> Callable[[_Error, str, Node], tuple[str, str | None]]:
    def tell(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
        return f"{path}: {show(node)} is out of range, it must be {phrase} {error['ctx'][key]:g}", None

    return tell


def _length(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    context = error["ctx"]
    few = "min_length" in context
    bound = context["min_length" if few else "max_length"]
    unit = "characters" if error["type"].startswith("string") else "values"
    if few and bound == 1:
        return f"{path} is empty: {_description(path)}", None
    much, limit = ("few", "least") if few else ("many", "most")
    return f"{path} has too {much} {unit}, at {limit} {bound} are allowed", None


def _pattern(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    return f"{path}: {show(node)} does not fit: {_description(path)}", None


def _value(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    message = str(error.get("ctx", {}).get("error", error["msg"]))
    return f"{path}: {message}" if path else message, None


def _not_finite(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    return f"{path}: {show(node)} is not a finite number", None


def _fallback(error: _Error, path: str, node: Node) -> tuple[str, str | None]:
    message = str(error["msg"])
    return f"{path}: {show(node)} does not fit: {message[:1].lower()}{message[1:]}", None


_SENTENCES: dict[str, Callable[[_Error, str, Node], tuple[str, str | None]]] = {
    "extra_forbidden": _extra,
    "missing": _missing,
    "model_type": _section,
    "model_attributes_type": _section,
    "literal_error": _choice,
    "greater_than": _bound("greater than", "gt"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than": _bound("less than", "lt"),
    "less_than_equal": _bound("at most", "le"),
    "finite_number": _not_finite,
    "string_too_short": _length,
    "string_too_long": _length,
    "too_short": _length,
    "too_long": _length,
    "string_pattern_mismatch": _pattern,
    "value_error": _value,
    "assertion_error": _value,
} | dict.fromkeys(KINDS, _type)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if (section := section_of(field)) is not None:
            yield from _fields(section, f"{prefix}{name}.")


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in _literals(part)]


def _description(path: str) -> str:
    field = fields().get(path)
    if field is None:
        return "a value is needed"
    return (field.description or getattr(section_of(field), "__doc__", None) or "").split("\n")[0]


def _place_named_in(message: str, tree: Node) -> Node | None:
    """A message about several sections names dotted keys: the first that was written down is the place."""
    for word in message.replace("=", " ").replace(",", " ").split():
        if "." in word and word in fields():
            node, depth = find(tree, tuple(word.split(".")))
            if depth == len(word.split(".")):
                return node
    return None
