"""Classes that a config names: looked for without importing anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from support import ROOT

from harness.errors import ConfigError
from harness.named import check_classes, check_name, missing
from harness.resolve import resolve

CONFIG = """
name: run
task: {name: "gone:Task"}
train: {steps: 1, global_batch: 1}
optim: {name: "pack.deep:Optimiser"}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that cannot be imported, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path or ".").resolve() != tmp_path])
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("1 / 0\n")
    (tmp_path / "pack" / "deep.py").write_text("1 / 0\nclass Optimizer: ...\nfrom elsewhere import Other as Mine\n")
    (tmp_path / "pack" / "open.py").write_text("from elsewhere import *\n")
    (tmp_path / "pack" / "lazy.py").write_text("def __getattr__(name): ...\n")
    (tmp_path / "plain.py").write_text("def make(kind):\n    class Inner: ...\n")
    (tmp_path / "own.py").write_text("import sys\nsys.modules[__name__] = 1\n")
    (tmp_path / "my-tasks.py").write_text("class Task: ...\n")
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "__init__.py").write_text("__path__.append('/elsewhere')\n")
    (tmp_path / "spread").mkdir()
    (tmp_path / "spread" / "inner.py").write_text("class Task: ...\n")
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "pack.deep:Optimizer",
        "pack.deep:Mine",
        "pack.open:Anything",
        "pack.lazy:Anything",
        "plain:Inner",  # the ranks tell
        "spread.inner:Task",
        "own:Task",
        "my-tasks:Task",
        "wide.part:Task",
        "torch.optim:NAdam",
        "math:sqrt",
        "sys:Anything",
        "harness.tasks.digits:Digits",
    ],
)
def test_nothing_is_seen_to_be_wrong(name: str) -> None:
    assert missing(name) is None
    assert "pack" not in sys.modules


@pytest.mark.parametrize(
    ("name", "told", "hint"),
    [
        ("gone:Task", "there is no module 'gone'", "it was looked for on sys.path, "),
        ("pack.gone:Task", "there is no module 'pack.gone'", "it was looked for on sys.path, "),
        ("pack.deep.er:Task", "the module 'pack.deep' is no package", ""),
        ("pack.deep:Optimiser", "the module pack.deep has no Optimiser", "did you mean pack.deep:Optimizer?"),
        ("plain:Task", "the module plain has no Task", ""),
    ],
)
def test_what_is_not_there(name: str, told: str, hint: str, here: Path) -> None:
    found = missing(name)
    assert found is not None and found[0] == told
    assert (found[1] or "") == (f"{hint}{here} first" if hint.endswith(", ") else hint)


def test_a_module_of_megabytes_is_not_read(here: Path) -> None:
    (here / "plain.py").write_text("#" * 10_000_001)
    assert missing("plain:Task") is None


@pytest.mark.parametrize("name", ["", "a", ":", "a:", ":b", "a:b:c", "a..b:c", "a b:c", "a:b.c", "../a:b", "1:2"])
def test_names_of_no_form(name: str) -> None:
    with pytest.raises(ValueError, match=r"is none of linear, digits, nor of the form package.module:Class"):
        check_name(name, ["linear", "digits"])


def test_each_is_told_by_its_place_unless_ranks_look_elsewhere(here: Path) -> None:
    (here / "run.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError) as raised:
        check_classes(resolve(here / "run.yaml"))
    assert [mistake.where.rpartition("/")[2] for mistake in raised.value.mistakes] == ["run.yaml:3", "run.yaml:5"]
    check_classes(resolve(here / "run.yaml", ["launch.env.PYTHONPATH=/elsewhere"]))
    modules = resolve(here / "run.yaml", ["slurm.modules=[mine]"])
    check_classes(modules, in_job=True)
    with pytest.raises(ConfigError):
        check_classes(modules)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_that_come_along_pass(path: Path) -> None:
    check_classes(resolve(path))
