"""ruff and mypy --strict are clean."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import ROOT


@pytest.mark.parametrize(
    "arguments",
    [
        ["ruff", "check", "harness", "launch", "tests"],
        ["ruff", "format", "--check", "harness", "launch", "tests"],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_clean(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
