"""From files, a site, environment and command line to one validated `Config`, with the origin of every value.

Layers, from the lowest: the files named by `base:`, site files, the file itself, overrides. Mappings merge key by key,
anything else replaces; `null` resets a field to its default. A run directory's frozen config states every field, so
there a site comes above it.

>>> resolve(None, ["name=x", "task.name=linear", "train.steps=9", "train.global_batch=8"]).origins["train.steps"]
'command line'
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from harness.config import Config
from harness.errors import ConfigError, InputMissing, Mistake
from harness.frozen import freeze, leaves
from harness.jsonschema import schema
from harness.mistakes import find
from harness.references import expand, substitute
from harness.rundir import RunDir
from harness.validate import validate
from harness.yamlfile import MAX_DEPTH, MAX_KEY, Node, merge, parse, read, scalar

__all__ = ["Resolved", "freeze", "resolve", "schema"]

COMMAND_LINE = "command line"
DEFAULT = "default"
MAX_FILES = 50
_EMPTY = Node({}, COMMAND_LINE)


@dataclass(frozen=True)
class Resolved:
    """A config and where each of its values comes from.

    `origins` has every leaf by its dotted path: "configs/charlm.yaml:7", "command line" or "default".
    """

    config: Config
    origins: Mapping[str, str]


def resolve(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str] = os.environ,
    sites: Sequence[str] = (),
) -> Resolved:
    """Read and check a config. `path` is a file, a run directory (its frozen config is read) or None.

    A site is a path, or the name of a file in `sites/` beside the config or in `configs/sites/`. Raises InputMissing
    when a file is not there, ConfigError with all mistakes that were found.
    """
    loader = _Loader(environ)
    file = None if path is None else _config_file(path)
    in_run = path is not None and file != path
    below, own = (_EMPTY, _EMPTY) if file is None else loader.load(file)
    for site in sites:
        layer = merge(*loader.load(_site_file(site, path)))
        below, own = (below, merge(own, layer)) if in_run else (merge(below, layer), own)
    tree = merge(below, own)
    if in_run and not _states(tree, str(path)):  # the run was moved, or is named from another working directory
        tree = merge(tree, Node({"run_dir": Node(str(path), str(path))}, tree.place))
    mistakes = loader.mistakes
    unreadable = bool(mistakes)
    for text in overrides:
        try:
            tree = merge(tree, _override(text))
        except ConfigError as error:
            mistakes.extend(error.mistakes)
    tree, unset = expand(Node(tree.value, COMMAND_LINE if file is None else os.path.normpath(file)), environ)
    mistakes.extend(unset.values())
    config, more = validate(tree, unset)
    if not unreadable:  # what a file that cannot be read leaves out is no mistake of its own
        mistakes.extend(more)
    if mistakes or config is None:
        raise ConfigError(_in_order(mistakes))
    return Resolved(config, MappingProxyType({".".join(leaf): _origin(tree, leaf) for leaf in leaves(config)}))


class _Loader:
    """Reads a file and those it is based on, gathering mistakes."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.mistakes: list[Mistake] = []
        self.files = 0

    def load(self, path: Path, chain: tuple[Path, ...] = ()) -> tuple[Node, Node]:
        """What lies below a file (its merged bases) and the file's own mapping, without `base`."""
        name = os.path.normpath(path)
        self.files += 1
        try:
            node = read(path, name)
        except ConfigError as error:
            self.mistakes.extend(error.mistakes or [Mistake(name, error.message)])
            return _EMPTY, _EMPTY
        assert isinstance(node.value, dict)
        chain = (*chain, Path(os.path.realpath(path)))
        below = _EMPTY
        for base, place in self._bases(node.value.get("base")):
            file = path.parent / base
            real = Path(os.path.realpath(file))
            if real in chain:
                names = " -> ".join(os.path.relpath(step) for step in (*chain[chain.index(real) :], real))
                self.mistakes.append(Mistake(place, f"base goes in a circle: {names}"))
            elif self.files >= MAX_FILES:
                self.mistakes.append(Mistake(place, f"base leads to more than {MAX_FILES} files"))
                break
            else:
                try:
                    below = merge(below, merge(*self.load(file, chain)))
                except InputMissing as error:
                    self.mistakes.append(Mistake(place, f"base: {error.message}"))
        return below, Node({key: value for key, value in node.value.items() if key != "base"}, node.place)

    def _bases(self, node: Node | None) -> Iterator[tuple[str, str]]:
        if node is None or node.value is None:
            return
        for item in node.value if isinstance(node.value, list) else [node]:
            if not isinstance(item.value, str) or not item.value or "\0" in item.value:
                self.mistakes.append(Mistake(item.place, "base is the path of a config file, or a list of such paths"))
                continue
            try:
                yield substitute(item.value, self.environ), item.place
            except ValueError as error:
                self.mistakes.append(Mistake(item.place, f"base: {error}"))


def _config_file(path: Path) -> Path:
    if os.path.isdir(path):
        if not os.path.exists(RunDir(path).config):
            raise InputMissing(
                f"{path} is a directory without config.yaml", hint="give a config file, or the directory of a run"
            )
        return RunDir(path).config
    if not os.path.lexists(path):
        near = sorted(file for file in Path("configs").glob("*.yaml") if path.name in (file.name, file.stem))
        raise InputMissing(f"there is no config file {path}", hint=f"did you mean {near[0]}?" if near else None)
    return path


def _site_file(site: str, path: Path | None) -> Path:
    if "/" in site or site.endswith((".yaml", ".yml")):
        return Path(site)
    folders = ([] if path is None else [path.parent / "sites"]) + [Path("configs/sites")]
    for folder in folders:
        if os.path.exists(file := folder / f"{site}.yaml"):
            return file
    places = " or ".join(dict.fromkeys(os.path.normpath(folder) for folder in folders))
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    hint = f"there are {', '.join(known)}" if known else "give the path of a site file"
    raise InputMissing(f"there is no site {site!r} in {places}", hint=hint)


def _states(tree: Node, path: str) -> bool:
    """Whether the tree's own run directory is this path."""
    values = tree.value if isinstance(tree.value, dict) else {}
    stated = values["run_dir"].value if "run_dir" in values else None
    if stated is None and "name" in values:
        stated = f"runs/{values['name'].value}"
    return isinstance(stated, str) and "\0" not in stated and os.path.realpath(stated) == os.path.realpath(path)


def _override(text: str) -> Node:
    """`a.b=value` as a tree. The value is a YAML scalar, taken whole, or a flow collection or quoted text."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not all(key.split(".")) or key.count(".") >= MAX_DEPTH or len(key) > MAX_KEY:
        raise ConfigError([Mistake(COMMAND_LINE, f"{text[:100]!r} is no override", "write it as optim.lr=3e-4")])
    if value[:1] in ("[", "{", '"', "'"):
        try:
            node = parse(value, COMMAND_LINE, numbered=False)
        except ConfigError as error:
            found = [Mistake(COMMAND_LINE, f"{key}: {mistake.message}", mistake.hint) for mistake in error.mistakes]
            raise ConfigError(found) from error
    else:
        node = Node(scalar(value), COMMAND_LINE, value)
    for part in reversed(key.split(".")):
        node = Node({part: node}, COMMAND_LINE)
    return node


def _in_order(mistakes: list[Mistake]) -> list[Mistake]:
    def key(mistake: Mistake) -> tuple[str, int]:
        name, _, line = mistake.where.rpartition(":")
        return (name, int(line)) if line.isdecimal() else (mistake.where, 0)

    return sorted(dict.fromkeys(mistakes), key=key)


def _origin(tree: Node, leaf: tuple[str, ...]) -> str:
    node, depth = find(tree, leaf)
    return node.place if depth == len(leaf) or (depth and node.value is None) else DEFAULT
