"""The class that a config names: one that comes along, by its short name, or anybody's as `package.module:Class`.

Told before a rank starts, so nothing is imported here: a module is looked for, and its text read, but not run. What
only running it can tell, the ranks tell.

>>> check_name("torch.optim:NAdam", ["sgd"]), missing("torch.optim:NAdam")
('torch.optim:NAdam', None)
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import ConfigError, Mistake

if TYPE_CHECKING:
    from harness.resolve import Resolved

_WORD = re.compile(r"[^\W\d]\w*")
_MODULE = re.compile(r"[^\W\d][\w-]*")
_CLASS = re.compile(r"^ *class (\w+)", re.MULTILINE)
_BY_OTHER_WAYS = re.compile(r"import +\*|__getattr__|sys\.modules|\b(globals|locals|vars|setattr|exec)\(")
"""A module with one of these may have names that do not stand in it."""
_MOST = 10_000_000


def check_name(name: str, known: Collection[str]) -> str:
    """The name itself. Raises ValueError where it is neither among the known ones nor of the form module:Class."""
    module, _, attribute = name.partition(":")
    if name in known or (attribute.isidentifier() and all(map(_MODULE.fullmatch, module.split(".")))):
        return name
    near = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{name!r} is none of {', '.join(known)}, nor of the form package.module:Class{meant}")


def check_classes(resolved: Resolved, *, in_job: bool = False) -> None:
    """Raises ConfigError where a task or optimizer is not there, by its place in the config.

    Nothing is said where ranks look for modules in other places than this process: `launch.env` has a PYTHONPATH, or
    `in_job` a batch script loads modules or runs other commands first.
    """
    config = resolved.config
    if "PYTHONPATH" in config.launch.env or (in_job and (config.slurm.modules or config.slurm.setup)):
        return
    mistakes = []
    for field, name in (("task.name", config.task.name), ("optim.name", config.optim.name)):
        if ":" in name and (found := missing(name)) is not None:
            mistakes.append(Mistake(resolved.origins[field], f"{field} {name!r}: {found[0]}", found[1]))
    if mistakes:
        raise ConfigError(mistakes)


def missing(name: str) -> tuple[str, str | None] | None:
    """What a name of the form module:Class does not lead to, and a suggestion; None where nothing is seen to be wrong.

    The working directory comes first, as for ranks. Imports nothing, also not the packages that the module is in.
    """
    module, _, attribute = name.partition(":")
    here = search_here()
    spec: ModuleSpec | None = None
    so_far = ""
    package: ModuleSpec | None = None
    for part in module.split("."):
        package = spec
        so_far = f"{so_far}.{part}".lstrip(".")
        try:
            spec = find_spec(part) if spec is None else PathFinder.find_spec(part, spec.submodule_search_locations)
        except (ImportError, ValueError):  # a module that a finder of its own takes care of
            return None
        if spec is None:
            if _elsewhere(package):
                return None
            return f"there is no module {so_far!r}", f"it was looked for on sys.path, {here} first"
        if spec.submodule_search_locations is None and so_far != module:
            return f"the module {so_far!r} is no package", None
    text = _text(spec)
    if text is None or attribute in _WORD.findall(text) or _BY_OTHER_WAYS.search(text):
        return None
    near = difflib.get_close_matches(attribute, _CLASS.findall(text), n=1)
    return f"the module {module} has no {attribute}", f"did you mean {module}:{near[0]}?" if near else None


def search_here() -> str:
    """Put the working directory on the import path, as `python -m` does; it itself."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    return here


def _elsewhere(package: ModuleSpec | None) -> bool:
    """Whether a package may have modules that are not in its folders."""
    if package is None:
        return False
    folders = list(package.submodule_search_locations or [])
    return "__path__" in (_text(package) or "") or not all(Path(folder).is_dir() for folder in folders)


def _text(spec: ModuleSpec | None) -> str | None:
    """A module's source; None where it is not written in Python."""
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        with open(spec.origin, encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST + 1)
    except OSError:
        return None
    return text if len(text) <= _MOST else None
