"""Text from local files: a file, a folder, or the sources of Python's standard library. The same bytes on every rank.

>>> text = read_text(None, limit=1_000_000)          # the standard library's sources
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from harness.errors import DataError, InputMissing
from harness.rundir import storage_errors

SKIPPED = (
    *("site-packages", "dist-packages", "test", "idle_test", "lib-dynload", "__pycache__", "_bundled"),
    *("encodings", "pydoc_data", "config-", "lib2to3"),
)
"""Folders of the standard library whose names begin so are left out: installed packages, tests, generated tables."""
COMMENT = re.compile(rb"^[ \t]*#+[ \t!]*(.+)$", re.MULTILINE)


def read_text(path: str | None, *, limit: int) -> bytes:
    """The bytes of a file or of all files in a folder, or the standard library's `*.py` for None; at most `limit`.

    Files are joined in the order of a hash of their relative paths: so the last part of the text, which is held out, is
    of the same kind as the rest, and so is what a small `limit` leaves. Hidden files are left out.
    Raises InputMissing, StorageError, DataError when there is no text.
    """
    root = Path(path).expanduser() if path is not None else standard_library()
    if not root.exists():
        raise InputMissing(f"{root}: no such file or folder", hint="task.args.text is a file or folder of text")
    parts, length = [], 0
    for file in [root] if root.is_file() else _files(root, ".py" if path is None else ""):
        with storage_errors(file), open(file, "rb") as opened:
            part = opened.read(limit - length)
        parts.append(part)
        length += len(part)
        if length >= limit:
            break
    if length == 0:
        raise DataError(f"there is no text in {root}")
    return b"".join(parts)


def standard_library() -> Path:
    """The folder of Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def prose(source: bytes) -> str:
    """Docstrings and lines of comment of a Python source; "" for what does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = [comment.decode(errors="replace") for comment in COMMENT.findall(source)]
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node, clean=False) or "")
        for part in ("body", "orelse", "handlers", "finalbody"):  # statements only: expressions hold no docstrings
            inside = getattr(node, part, [])
            nodes.extend(inside if isinstance(inside, list) else [])
    return "\n".join(found)


def standard_prose(*, limit: int) -> bytes:
    """Docstrings and comments of the standard library, in the order of `read_text`; at most `limit` bytes."""
    parts, length = [], 0
    for file in _files(standard_library(), ".py"):
        parts.append(prose(file.read_bytes()).encode()[: limit - length])
        length += len(parts[-1])
        if length >= limit:
            break
    if length == 0:
        raise DataError(f"there is no Python source in {standard_library()}", hint="give task.args.text")
    return b"\n".join(parts)


def _files(root: Path, suffix: str) -> Iterator[Path]:
    skipped = SKIPPED if root == standard_library() else ()
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith((".", *skipped))]
        for path in (Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")):
            if path.is_file():
                found.append((hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path))
    return (path for _, path in sorted(found))
