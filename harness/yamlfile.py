"""YAML 1.2 with places: every value knows the file and line it was written on. Not here: what a key means.

Text is hostile until read: events of ruamel.yaml's safe parser are turned into `Node`s under limits, scalars by the
core schema of YAML 1.2 (`3e-4` is a number, `no` is a string), so no tag can construct an object.

>>> node = parse("optim:\\n  lr: 3e-4\\n", "run.yaml")
>>> optim = node.value["optim"]; optim.value["lr"]
Node(value=0.0003, place='run.yaml:2', text='3e-4')
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.representer import SafeRepresenter

from harness.errors import ConfigError, InputMissing, Mistake

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_KEY = 200  # characters
MAX_NODES = 20_000  # with aliases expanded

Scalar: TypeAlias = bool | int | float | str | None

_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,100}")
_BASED = re.compile(r"0o[0-7]{1,100}|0x[0-9a-fA-F]{1,100}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = ("int", "float", "bool", "null")


@dataclass(frozen=True)
class Node:
    """A value and where it was written ("run.yaml:7", "command line"); `text` is a scalar as it stood there."""

    value: Scalar | list[Node] | dict[str, Node]
    place: str
    text: str | None = None


def scalar(text: str) -> Scalar:
    """What a plain (unquoted) scalar means in YAML 1.2's core schema (chapter 10.3.2 of the standard)."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text[2:], 8 if text[1] == "o" else 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _INF.fullmatch(text):
        return float(f"{match[1]}inf")
    return float("nan") if _NAN.fullmatch(text) else text


def read(path: Path, name: str | None = None) -> Node:
    """The mapping in a file; `name` is what messages call it.

    Raises InputMissing when it is not there or cannot be read, ConfigError with the line of what is wrong in it.
    """
    name = str(path) if name is None else name
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputMissing(f"{name} cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than 1 MiB: that is no config file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([Mistake(f"{name}:{line}", "this is not text in UTF-8")]) from error
    node = parse(text, name)
    if node.value is None:
        return Node({}, name)
    if not isinstance(node.value, dict):
        raise ConfigError([Mistake(node.place, "a config file is a mapping, as in `name: my-run`")])
    return Node(node.value, name)


def parse(text: str, name: str, *, numbered: bool = True) -> Node:
    """One YAML document; places are "name:line", or `name` alone. Raises ConfigError with every mistake found."""
    builder = _Builder(text, name, numbered)
    try:
        node = builder.document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark is not None and numbered else name
        context = f" {error.context}" if error.context else ""
        problem = f"this is not YAML: {error.problem}{context}"
        raise ConfigError([*builder.mistakes, Mistake(place, problem, _syntax_hint(str(error.problem)))]) from error
    except YAMLError as error:  # a character that YAML does not allow; the reader tells its position only
        position = getattr(error, "position", 0)
        place = f"{name}:{text.count(chr(10), 0, position) + 1}" if numbered else name
        problem = f"the character {text[position : position + 1]!r} is not allowed in YAML"
        raise ConfigError([*builder.mistakes, Mistake(place, problem)]) from error
    if builder.mistakes:
        raise ConfigError(builder.mistakes)
    return node


def merge(below: Node, above: Node) -> Node:
    """Mappings merge key by key; anything else in `above` replaces what is below."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    # a section's place is the line of a file where it has one, also when the command line adds a value
    return Node(merged, above.place if ":" in above.place or ":" not in below.place else below.place)


def dump(value: Any, *, inline: bool = False) -> str:
    """YAML text of plain values that `parse` reads back equal; `inline` on one line, as in an override."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = inline
    yaml.width = sys.maxsize if inline else 100
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # annotated as None only
    yaml.Representer = _Representer
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("...\n").rstrip("\n") if inline else stream.getvalue()


class _Representer(SafeRepresenter):
    """Quotes every string that our own reading of plain scalars would take for something else."""

    def represent_str(self, data: str) -> Any:
        plain = isinstance(scalar(data), str) and re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./ +-]*(?<! )", data)
        return self.represent_scalar(f"{_TAG}str", data, style=None if plain else '"')

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Representer.add_representer(str, _Representer.represent_str)


class _Builder:
    """Turns the parser's events into nodes. The parser keeps no stack of Python calls, so depth is checked in time."""

    def __init__(self, text: str, name: str, numbered: bool) -> None:
        self.name = name
        self.numbered = numbered
        self.mistakes: list[Mistake] = []
        self.events: Iterator[Any] = iter(YAML(typ="safe", pure=True).parse(text))
        self.anchors: dict[str, tuple[Node, int]] = {}
        self.count = 0

    def document(self) -> Node:
        next(self.events)  # start of the stream
        if isinstance(next(self.events), StreamEndEvent):
            return Node(None, self.name)
        node = self.node(next(self.events), 1)
        assert isinstance(next(self.events), DocumentEndEvent)
        if not isinstance(event := next(self.events), StreamEndEvent):
            self.mistakes.append(Mistake(self.place(event), "one YAML document is allowed, here begins another"))
        return node

    def node(self, event: Any, depth: int) -> Node:
        before = self.count
        self._grow(1, event)
        if depth > MAX_DEPTH:
            raise ConfigError([*self.mistakes, Mistake(self.place(event), f"nested more than {MAX_DEPTH} levels deep")])
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                self.mistakes.append(Mistake(self.place(event), f"*{event.anchor} has no &{event.anchor} above it"))
                return Node(None, self.place(event))
            node, size = self.anchors[event.anchor]
            self._grow(size, event)
            return node
        if isinstance(event, MappingStartEvent):
            self._tag(event, ("map",))
            node = self.mapping(event, depth)
        elif isinstance(event, SequenceStartEvent):
            self._tag(event, ("seq",))
            items: list[Node] = []
            while not isinstance(item := next(self.events), SequenceEndEvent):
                items.append(self.node(item, depth + 1))
            node = Node(items, self.place(event))
        else:
            node = self.scalar(event)
        if event.anchor is not None:
            self.anchors[event.anchor] = node, self.count - before
        return node

    def mapping(self, start: Any, depth: int) -> Node:
        values: dict[str, Node] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            place = self.place(event)
            if key.text is not None and len(key.text) > MAX_KEY:
                self.mistakes.append(Mistake(place, f"a key is longer than {MAX_KEY} characters"))
            elif key.text is None:
                self.mistakes.append(Mistake(place, "a key is text, not a list or a mapping"))
            elif not isinstance(key.value, str):
                self.mistakes.append(Mistake(place, f"the key {key.text} is not text", f'quote it: "{key.text}"'))
            elif key.value in values:
                first = f", first on line {lines[key.value]}" if self.numbered else ""
                self.mistakes.append(Mistake(place, f"the key {key.value!r} is here twice{first}"))
            else:
                # a mapping is found where its key stands; a scalar or a list's items where they stand themselves
                values[key.value] = Node(value.value, place, value.text)
                lines[key.value] = event.start_mark.line + 1
        return Node(values, self.place(start))

    def scalar(self, event: ScalarEvent) -> Node:
        self._tag(event, ("str", *_SCALAR_TAGS))
        text = str(event.value)
        plain = event.style is None and event.tag in (None, *(f"{_TAG}{kind}" for kind in _SCALAR_TAGS))
        return Node(scalar(text) if plain else text, self.place(event), text)

    def place(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}" if self.numbered else self.name

    def _grow(self, nodes: int, event: Any) -> None:
        self.count += nodes
        if self.count > MAX_NODES:
            raise ConfigError(
                [*self.mistakes, Mistake(self.place(event), f"more than {MAX_NODES} values (aliases counted in full)")]
            )

    def _tag(self, event: Any, known: tuple[str, ...]) -> None:
        if event.tag not in (None, "!", *(f"{_TAG}{kind}" for kind in known)):
            self.mistakes.append(Mistake(self.place(event), f"the tag {event.tag} is not supported", "leave it out"))


def _syntax_hint(problem: str) -> str | None:
    if r"'\t'" in problem:
        return "indent with spaces, not tabs"
    if "mapping values" in problem:
        return "a value with `: ` in it needs quotes, and keys of one section the same indentation"
    if "cannot start any token" in problem or "but got '<stream end>'" in problem or "end of stream" in problem:
        return "a value that begins with a special character needs quotes, and every bracket and quote its partner"
    return None
