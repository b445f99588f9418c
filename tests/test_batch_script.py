"""The batch script: golden files, a shell that accepts it, and values that must not get out of their place."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import Config
from harness.errors import ConfigError
from launch import slurm

GOLDEN = Path(__file__).parent / "golden" / "batch"
COMMAND = ["/env/bin/harness", "run", "configs/charlm.yaml", "train.steps=500"]
CASES: dict[str, dict[str, Any]] = {
    "smallest": {},
    "gpus": {"slurm": {"nodes": 4, "ranks_per_node": 4, "cpus_per_rank": 8, "gpus_per_node": 4, "time": 86400.0 * 1.5}},
    "spread": {"launch": {"ranks": 6}, "slurm": {"nodes": 2}},
    "uneven": {"launch": {"ranks": 5}, "slurm": {"nodes": 2}},
    "everything": {
        "slurm": {
            "nodes": 2,
            "ranks_per_node": 2,
            "partition": "gpu,long",
            "account": "m123",
            "qos": "normal",
            "constraint": "a100&ib",
            "memory": "64G",
            "signal": "TERM",
            "margin": 90.5,
            "modules": ["openmpi/4.1.4", "my module"],
            "setup": ["ulimit -n 4096", 'export X="$HOME/x"'],
            "extra": {"exclusive": None, "reservation": "maint", "comment": "a b #1", "output": "logs/%j.txt"},
        }
    },
}


def _config(more: dict[str, Any]) -> Config:
    values = {"name": "exp-7", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 8}}
    return Config.model_validate(values | more)


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    text = slurm.render(_config(CASES[case]), COMMAND, cwd="/home/me/work")
    file = GOLDEN / f"{case}.sh"
    if os.environ.get("HARNESS_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


def test_golden_array() -> None:
    tasks = ["runs/exp-7/optim.lr=1e-3", "runs/a b;c"]
    text = slurm.render(_config({}), ["/env/bin/harness", "run"], cwd="/w", output="runs/%A_%a.log", tasks=tasks)
    file = GOLDEN / "array.sh"
    if os.environ.get("HARNESS_UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


@pytest.mark.parametrize(("task", "said"), [("0", "<runs/$(id)><more>"), ("1", "<a b><more>")])
def test_each_task_of_an_array_gets_its_own_argument(task: str, said: str, tmp_path: Path) -> None:
    text = slurm.render(_config({}), ["printf", "<%s>"], cwd="/w", tasks=["runs/$(id)", "a b"])
    env = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": task}
    done = subprocess.run(["bash", "-c", text, "job", "more"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == said


@pytest.mark.parametrize("task", ["2", "", "*", "0)"])
def test_a_task_that_is_not_in_the_script_runs_nothing(task: str) -> None:
    text = slurm.render(_config({}), ["echo"], cwd="/w", tasks=["a", "b"])
    env = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": task}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (64, "")
    assert f"there is no task '{task}' in this script" in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_a_shell_accepts_it(case: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(slurm.render(_config(CASES[case]), COMMAND, cwd="/home/me/work"))
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", str(script)], check=True)


@pytest.mark.parametrize("case", CASES)
def test_last_line_is_the_command(case: str) -> None:
    script = slurm.render(_config(CASES[case]), COMMAND, cwd="/w")
    assert script.endswith("\n")
    assert shlex.split(script.splitlines()[-1]) == ["exec", *COMMAND]
    assert script.splitlines()[0] == "#!/bin/bash"


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_command_arrives_word_for_word(words: list[str]) -> None:
    script = slurm.render(_config({}), ["printf", "%s\\0", *words], cwd="/")
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "memory"])
@pytest.mark.parametrize("value", ["a\nrm -rf x", "a\r", 'a"b', "a'b", "$(id)", "`id`", "a\\", "\0", "a\tb"])
def test_header_values_stay_in_their_line(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        slurm.render(_config({"slurm": {field: value}}), COMMAND, cwd="/w")


@pytest.mark.parametrize(
    "extra",
    [
        {"wrap": "id"},
        {"x\ny": "1"},
        {"--exclusive": None},
        {"Comment": "x"},
        {"nodes": 3},
        {"comment": "a\nb"},
        {"": "x"},
    ],
)
def test_extra_options_are_checked(extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        slurm.render(_config({"slurm": {"extra": extra}}), COMMAND, cwd="/w")


def test_extra_replaces_what_is_only_a_default() -> None:
    text = slurm.render(_config({"slurm": {"extra": {"no-requeue": None, "output": "x.log"}}}), COMMAND, cwd="/w")
    assert "--requeue" not in text
    assert "#SBATCH --no-requeue\n" in text
    assert text.count("--output") == 1


def test_modules_are_quoted(tmp_path: Path) -> None:
    script = slurm.render(_config({"slurm": {"modules": ["$(touch pwned)", "a; touch pwned"]}}), ["true"], cwd="/w")
    subprocess.run(["bash", "-c", f"module() {{ :; }}\n{script}"], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"launch.ranks 9 is more than .* = 4"):
        slurm.render(_config({"launch": {"ranks": 9}, "slurm": {"nodes": 2, "ranks_per_node": 2}}), COMMAND)
    with pytest.raises(ConfigError, match="a node would have no rank"):
        slurm.render(_config({"launch": {"ranks": 1}, "slurm": {"nodes": 2}}), COMMAND)
    with pytest.raises(ConfigError, match=r"not shorter than slurm\.time"):
        slurm.render(_config({"slurm": {"time": 60.0, "margin": 60.0}}), COMMAND)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(60, "00:01:00"), (90.2, "00:01:31"), (3600, "01:00:00"), (86400, "1-00:00:00"), (1, "00:01:00")],
)
def test_time(seconds: float, text: str) -> None:
    assert f"--time={text}\n" in slurm.render(_config({"slurm": {"time": seconds, "margin": 0.0}}), COMMAND, cwd="/w")


def test_template_is_also_found_where_pip_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = slurm.template_folder()
    installed = tmp_path / "share" / "harness" / "slurm"
    shutil.copytree(here, installed)
    monkeypatch.setattr(slurm, "__file__", str(tmp_path / "site-packages" / "launch" / "slurm.py"))
    monkeypatch.setattr(slurm.sys, "prefix", str(tmp_path))
    assert slurm.template_folder() == installed
