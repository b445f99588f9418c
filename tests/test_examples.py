"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [
    path.relative_to(ROOT)
    for folder in ("harness", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("path", SHOWN, ids=str)
def test_examples(path: Path) -> None:
    assert doctest.testmod(importlib.import_module(".".join(path.with_suffix("").parts))).failed == 0


def test_there_are_examples() -> None:
    assert len(SHOWN) > 40
