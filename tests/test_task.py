"""Finding and making a task: what a user can get wrong is told in a sentence, with exit code 78."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import ConfigError, Exit
from harness.task import BUILT_IN, Task, find_task, make_task

GOOD = """
import torch
from typing import Literal, Optional

class Opaque: ...

class Line:
    def __init__(self, width: int = 8, rate: float = 0.1, kind: Literal["a", "b"] = "a", other: "Opaque | None" = None,
                 free=None, unknown: "NotThere" = None):
        self.args = (width, rate, kind, other, free)
    def model(self): return torch.nn.Linear(self.args[0], 1)
    def data(self, split): return [torch.zeros(8)] * 4
    def loss(self, model, batch): return model(batch).mean()

class Typed(Line):
    def __init__(self, width: int = 8, rate: float = 0.1, kind: Literal["a", "b"] = "a",
                 other: Opaque = None, free=None):
        super().__init__(width, rate, kind, other, free)

class Half:
    def model(self): ...

def function(): ...
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "good_task.py").write_text(GOOD)
    (tmp_path / "broken_task.py").write_text("1 / 0\n")
    (tmp_path / "needy_task.py").write_text("import not_installed_here\n")
    yield
    for name in set(sys.modules) - before:
        if name.endswith("_task"):
            del sys.modules[name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_are_found(name: str) -> None:
    assert issubclass(find_task(name), Task)


def test_any_class_with_three_methods_is_a_task() -> None:
    task = make_task("good_task:Line", {"width": 3})
    assert isinstance(task, Task)
    assert task.args[0] == 3  # type: ignore[attr-defined]
    model = task.model()
    assert set(task.evaluate(model, torch.zeros(2, 3))) == {"loss"}
    assert task.report(model) is None
    assert task.summarize(model, {}) == {}
    assert task.export(model, Path()) is None
    assert list(task.parameters(model)) == list(model.parameters())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone_task:Line", "there is no module 'gone_task'"),
        ("needy_task:Line", "there is no module 'not_installed_here'"),
        ("good_task:Lime", "the module good_task has no Lime"),
        ("good_task:Half", "is not a task: it has no data and no loss"),
        ("good_task:function", "is not a task"),
        ("broken_task:Line", "importing broken_task raised ZeroDivisionError: division by zero"),
    ],
)
def test_tasks_that_cannot_be_used(name: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find_task(name)
    assert told in str(raised.value)
    assert raised.value.code == Exit.CONFIG


def test_arguments_are_converted_by_their_annotations() -> None:
    task: Any = make_task("good_task:Typed", {"width": "16", "rate": 1, "kind": "b", "other": None, "free": [1]})
    assert task.args == (16, 1.0, "b", None, [1])
    assert [type(value) for value in task.args[:2]] == [int, float]
    unchecked: Any = make_task("good_task:Line", {"width": "16"})
    assert unchecked.args[0] == "16", "annotations that cannot be followed are left alone"


def test_all_arguments_that_do_not_fit_are_told() -> None:
    with pytest.raises(ConfigError) as raised:
        make_task("good_task:Typed", {"width": "wide", "kind": "c", "rate": 0.5})
    first, second = raised.value.mistakes
    assert (first.where, second.where) == ("task.args.width", "task.args.kind")
    assert "'wide' does not fit: Input should be a valid integer" in str(first)
    assert "Input should be 'a' or 'b'" in str(second)
    with pytest.raises(ConfigError, match=r"(?s)task.args do not fit .*'depth'.*it takes \(width"):
        make_task("good_task:Typed", {"depth": 3})
    with pytest.raises(ConfigError, match=r"task.args.limit: 'much' does not fit: 'much' is not a size"):
        make_task("charlm", {"limit": "much"})
