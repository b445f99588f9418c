"""The README's code blocks run: files are written as it says, commands are run in the order it gives them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, needs_mpirun

from harness.errors import Exit
from harness.resolve import resolve

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)(?: +(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, mark: str | None = None) -> list[tuple[str | None, str]]:
    found = [(m[2], m[3]) for m in BLOCK.finditer(README) if m[1] == language]
    return [(info, text) for info, text in found if mark is None or (info or "").startswith(mark)]


def shell(script: str, directory: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


@needs_mpirun
@pytest.mark.mpi
def test_the_own_task_runs(tmp_path: Path) -> None:
    files = [entry for language in ("python", "yaml") for entry in blocks(language, "file=")]
    assert {info for info, _ in files} == {"file=mytask.py", "file=mytask.yaml"}
    for info, text in files:
        (tmp_path / str(info).removeprefix("file=")).write_text(text)
    task = next(text for info, text in files if info == "file=mytask.py")
    assert len([line for line in task.splitlines() if line.strip()]) <= 20
    ((_, script),) = blocks("sh", "run")
    done = shell(script, tmp_path, 200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 256" in done.stdout
    assert "global batch 64 = 4 ranks x 1 accumulation x 16 samples; lr 0.001" in done.stdout
    assert re.search(r"/model/0\.weight\s+Dataset \{32, 1\}", done.stdout)


def test_the_config_example_resolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    (text,) = (text for info, text in blocks("yaml") if info is None)
    (tmp_path / "charlm.yaml").write_bytes((ROOT / "configs" / "charlm.yaml").read_bytes())
    (tmp_path / "big.yaml").write_text(text)
    config = resolve(tmp_path / "big.yaml").config
    assert config.train.global_batch == 512
    assert config.launch.env["DATA"] == "/scratch/me/data"


@needs_mpirun
@pytest.mark.mpi
def test_the_quickstart_runs_and_says_what_to_try_next() -> None:
    """The main job for a few steps only; the set-up before it has nothing to do here."""
    (_, script) = blocks("sh")[0]
    first = script.splitlines()[0].split("#")[0].strip()
    assert first == "bash launch/quickstart.sh"
    done = shell(f"{first} train.steps=4 eval.every=2 task.args.limit=200000", ROOT, 250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bits_per_byte" in done.stdout
    assert "finished at step 4" in done.stdout
    assert "harness run" in done.stdout.splitlines()[-1] + done.stdout.splitlines()[-2]


def test_files_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for config in re.findall(r"`(configs/[\w./]+\.yaml)`", README):
        if "NAME" not in config:
            assert (ROOT / config).exists(), config


def test_the_diff_is_that_of_the_examples() -> None:
    """Every line that it takes away or adds, in order; the docstring aside."""
    import difflib

    examples = ROOT / "tests" / "checkpoint" / "examples"
    before, after = ((examples / name).read_text().splitlines() for name in ("before.py", "after.py"))
    real = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if line[:1] in "-+"][2:]
    ((_, shown),) = blocks("diff")
    told = [line for line in shown.splitlines() if line[:1] in "-+"]
    assert sorted(told) == sorted(line for line in real if '"""' not in line and line.strip("-+"))
    kept = [line[1:] for line in shown.splitlines() if line[:1] == " " and line.strip()]
    assert set(kept) <= set(before) & set(after)


def test_the_table_of_exit_codes_has_all_of_them() -> None:
    table = README[README.index("### Exit codes") :]
    rows = re.findall(r"^\| (\d+) \| .+? \| \| (\S+) \| .+? \|$", table, re.MULTILINE)
    assert [code for row in zip(*rows, strict=True) for code in row] == [*(str(int(code)) for code in Exit), "128+n"]
