"""The directions of DESIGN section 2: who may import whom, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

HEAVY = {"torch", "mpi4py", "h5py", "numpy", "horovod", "scipy", "sklearn"}
LAUNCH_MAY = {
    "config",
    "resolve",
    "env",
    "errors",
    "units",
    "batch",
    "rundir",
    "heartbeat",
    "optim",
    "frozen",
    "named",
    "jsonschema",
    "stop",
    "parallel.groups",
}
"""The parts of `harness` that the launcher may use: they import nothing of HEAVY themselves (checked below)."""
COMMANDS_MAY = LAUNCH_MAY | {"checkpoint", "bench"}
"""The parts that `launch/ckpt*.py` may use: it reads checkpoints, which takes numpy, but only when a command runs."""
DATA_MAY = LAUNCH_MAY | {"checkpoint", "hdf5data", "partition"}
"""The parts that `launch/data.py` may use, when a command runs."""
CHECKPOINT_MAY = {"errors", "units", "env", "checkpoint"}
PURE = ("schema", "layout", "plan", "shards", "tiling")
"""Modules of `harness.checkpoint` that only compute."""


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names of imported modules; blocks under `if TYPE_CHECKING` do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            yield child
            yield from walk(child)

    for node in walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(package: str, name: str) -> str:
    """The first part of `name` under `package`; with the module, in a package of which the launcher may use one."""
    parts = name.removeprefix(package + ".").split(".")
    return ".".join(parts[:2]) if parts[0] == "parallel" else parts[0]


@pytest.mark.parametrize("path", modules("harness"), ids=str)
def test_ranks_never_import_the_launcher(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "launch"]


@pytest.mark.parametrize("path", modules("launch"), ids=str)
def test_the_launcher_stays_light(path: Path) -> None:
    used = set(imports(path))
    assert not {name for name in used if name.split(".")[0] in HEAVY}
    may = COMMANDS_MAY if path.name.startswith("ckpt") else DATA_MAY if path.name == "data.py" else LAUNCH_MAY
    assert {below("harness", name) for name in used if name.startswith("harness.")} <= may
    at_once = {name for name in imports(path, top_level_only=True) if name.startswith("harness.")}
    assert {below("harness", name) for name in at_once} <= LAUNCH_MAY


@pytest.mark.parametrize("path", modules("harness/checkpoint"), ids=str)
def test_the_checkpoint_package_stands_alone(path: Path) -> None:
    assert {below("harness", name) for name in imports(path) if name.startswith("harness.")} <= CHECKPOINT_MAY
    assert not {
        name for name in imports(path, top_level_only=True) if name.split(".")[0] in {"torch", "horovod", "mpi4py"}
    }


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io(name: str) -> None:
    path = ROOT / "harness" / "checkpoint" / f"{name}.py"
    assert not {
        used for used in imports(path) if used.split(".")[0] in {"os", "io", "pathlib", "h5py", "torch", "shutil"}
    }


def loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules after a statement, in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", sorted(LAUNCH_MAY))
def test_what_the_launcher_uses_imports_nothing_heavy(name: str) -> None:
    assert not loaded_by(f"import harness.{name}") & HEAVY


def test_importing_checkpoints_needs_neither_torch_nor_horovod() -> None:
    assert not loaded_by("import harness.checkpoint") & {"torch", "horovod", "mpi4py"}


def test_loader_processes_stay_free_of_mpi() -> None:
    """They import the main module and the data layer; MPI_Init there would join the job a second time."""
    code = "import harness.__main__, harness.data, harness.hdf5data, harness.tasks.charlm, harness.tasks.word2vec"
    assert "mpi4py" not in loaded_by(code)


def test_files_stay_small() -> None:
    long = {
        str(path): n for path in modules("harness") + modules("launch") if (n := len(path.open().readlines())) > 400
    }
    assert not long
    loop = (ROOT / "harness" / "loop.py").read_text().count("\n")
    assert loop <= 300
