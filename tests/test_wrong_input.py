"""What a user gets wrong around a run: told in a sentence with its exit code; nothing is lost, nothing is made."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import execute

CONFIG = """
name: run
task: {name: "mine:Mine"}
train: {steps: 4, global_batch: 16}
launch: {launcher: local, threads: 1}
stop: {margin: 5}
"""
TASK = """
from harness.tasks.digits import Digits

class Mine(Digits):
    def __init__(self):
        super().__init__(width=4)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's directory: a config, a task, a run that was submitted but never started, and what is no run."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    new = tmp_path / "runs" / "new"
    new.mkdir(parents=True)
    (new / "config.yaml").write_text(CONFIG)
    (new / "submitted.json").write_text('{"jobs": ["7"]}')
    yield tmp_path


def tree(folder: Path) -> dict[str, bytes | None]:
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no such config": (["submit", "nope.yaml"], 66, "there is no config file nope.yaml"),
    "a directory that is no run": (["submit", "empty"], 66, "empty is a directory without config.yaml"),
    "a run that is not there": (["run", "runs/nope"], 66, "there is no config file runs/nope"),
    "a file that is no config": (["run", "file"], 78, "file: task is missing"),
    "status of nothing": (["status", "nope"], 66, "there is no run nope"),
    "status of a file": (["status", "file"], 66, "file is not a run directory"),
    "status of no runs": (["status", "empty"], 66, "there is no run below empty"),
    "logs of nothing": (["logs", "nope"], 66, "there is no run nope"),
    "logs of a file": (["logs", "file"], 66, "file is not a run directory"),
    "logs before the first start": (["logs", "runs/new"], 66, "runs/new has not been started yet"),
    "a rank below 0": (["logs", "runs/new", "--rank", "-1"], 64, "greater than or equal to 0"),
    "attempt 0": (["logs", "runs/new", "--attempt", "0"], 64, "greater than or equal to 1"),
    "a rank that is no number": (["logs", "runs/new", "--rank", "one"], 64, "valid integer"),
    "stop of nothing": (["stop", "nope"], 66, "there is no run nope"),
    "stop of a file": (["stop", "file"], 66, "file is not a run directory"),
    "a wait that is no time": (["stop", "runs/new", "--timeout", "soon"], 64, "valid number"),
    "a time that is none": (
        ["run", "run.yaml", "--time", "soon"],
        78,
        "command line: stop.time: 'soon' is not a duration",
    ),
    "a negative time": (["run", "run.yaml", "--time", "-5m"], 78, "command line: stop.time: '-5m' is not a duration"),
    "less time than the margin": (
        ["run", "run.yaml", "--time", "4s"],
        78,
        "time (4 s) is not longer than margin (5 s)",
    ),
    "a job shorter than its margin": (
        ["submit", "run.yaml", "slurm.time=2m", "slurm.margin=3m"],
        78,
        "slurm.margin (180 s) is not shorter than slurm.time (120 s)",
    ),
    "a job shorter than the run's margin": (
        ["submit", "run.yaml", "slurm.time=2m", "slurm.margin=1m", "stop.margin=2m"],
        78,
        "slurm.time (120 s) is not longer than stop.margin (120 s): the run would stop at once",
    ),
    "a task that is none": (["run", "run.yaml", "task.name=digit"], 78, "did you mean digits?"),
    "an optimizer that is none": (["run", "run.yaml", "optim.name=Adamw"], 78, "did you mean adamw?"),
    "a task of no module": (["run", "run.yaml", "task.name=mein:Mine"], 78, "'mein:Mine': there is no module 'mein' ("),
    "a task of no class": (["submit", "run.yaml", "task.name=mine:Mein"], 78, "has no Mein (did you mean mine:Mine?)"),
    "a sweep over an optimizer that is not there": (
        ["submit", "run.yaml", "--sweep", "optim.name=sgd,torch.optim:Adm"],
        78,
        "optim.name 'torch.optim:Adm': the module torch.optim has no Adm",
    ),
    "no nodes": (["submit", "run.yaml", "slurm.nodes=0"], 78, "slurm.nodes: 0 is out of range"),
    "fewer ranks than nodes": (
        ["submit", "run.yaml", "slurm.nodes=2", "launch.ranks=1"],
        78,
        "a node would have no rank",
    ),
    "a batch that does not divide": (["submit", "run.yaml", "launch.ranks=3"], 78, "does not divide"),
    "a signal that cannot be caught": (["run", "run.yaml", "stop.signals=[KILL]"], 78, "'KILL' is not 'TERM'"),
    "a chain below 0": (["submit", "run.yaml", "--chain", "-1"], 64, "greater than or equal to 0"),
    "a chain that is no number": (["submit", "run.yaml", "--chain", "two"], 64, "valid integer"),
    "a sweep over nothing": (["submit", "run.yaml", "--sweep", "seed"], 64, "not of the form key=value"),
    "a sweep over an unknown key": (
        ["submit", "run.yaml", "--sweep", "optim.rl=1,2"],
        78,
        "unknown key optim.rl (did you mean optim.lr?)",
    ),
    "a sweep with blanks": (["submit", "run.yaml", "--sweep", "seed=1 2"], 78, "'1 2' is not a whole number"),
    "a sweep below a run": (["submit", "runs/new", "run_dir=runs/new", "--sweep", "seed=1,2"], 64, "is a run itself"),
    "no sbatch": (["submit", "run.yaml"], 69, "there is no sbatch on PATH"),
    "no srun": (["run", "run.yaml", "--launcher", "srun"], 69, "there is no srun on PATH"),
    "a negative number of restarts": (["run", "run.yaml", "--restarts", "-1"], 64, "greater than or equal to 0"),
    "no ranks at least": (["run", "run.yaml", "--min-ranks", "0"], 64, "greater than or equal to 1"),
    "an sbatch option that is none": (
        ["submit", "run.yaml", "slurm.extra={wrap: null}"],
        78,
        "slurm.extra: 'wrap' is no option of a batch script",
    ),
    "a line break in the header": (["submit", "run.yaml", 'slurm.account="a\\nb"'], 78, "--account cannot be 'a\\nb'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(here / "bin"))  # no Slurm, no MPI
    arguments, code, sentence = WRONG[name]
    before = tree(here)
    assert execute(arguments) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert sentence in said.err
    assert "Traceback" not in said.out + said.err
    assert tree(here) == before


@pytest.mark.parametrize("words", [["--chain", "0"], ["--sweep", "seed=1"]])
def test_the_least_there_can_be_is_not_wrong(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    assert execute(["submit", "run.yaml", *words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert tree(here) == before


@pytest.mark.mpi
@pytest.mark.timeout(400)
def test_a_run_that_is_there_already(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Running elsewhere, finished, saved by another model: refused, and its checkpoint and config stay as they are."""
    run, saved = here / "runs/run", here / "runs/run/checkpoints/step-00000004"
    assert execute(["run", "run.yaml"]) == 0
    checkpoint, config = tree(saved), (run / "config.yaml").read_bytes()
    capfd.readouterr()

    with open(run / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = tree(here)
        assert execute(["run", "run.yaml", "train.steps=8"]) == 69
        assert "error: runs/run is running already" in capfd.readouterr().err
        assert tree(here) == before

    assert execute(["run", "run.yaml", "optim.lr=0.5"]) == 78
    assert "runs/run holds a run that computes something else than this config" in capfd.readouterr().err

    assert execute(["submit", "run.yaml"]) == 64
    assert "error: runs/run has finished at step 4: there is nothing left to do" in capfd.readouterr().err
    assert (run / "config.yaml").read_bytes() == config
    assert len(list((run / "attempts").iterdir())) == 1

    (here / "mine.py").write_text(TASK.replace("width=4", "width=5"))
    assert execute(["run", "run.yaml", "train.steps=8"]) == 65
    said = capfd.readouterr().err
    assert "error: the checkpoint runs/run/checkpoints/step-00000004 does not fit this program" in said
    assert "model/0.weight is float32[5, 1, 3, 3] here and float32[4, 1, 3, 3] in the checkpoint" in said
    assert "or choose another run_dir" in said
    assert "partial" not in said and "start again" not in said and "go on with: harness" not in said
    assert "Traceback" not in said
    assert tree(saved) == checkpoint
