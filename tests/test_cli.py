"""The `harness` command: what it imports, prints and answers; wrong input is a sentence and an exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.resolve import resolve
from harness.rundir import open_run
from launch import cli

CONFIG = """\
name: exp
task: {name: linear}
train:
  steps: 4
  global_batch: 512
  micro_batch: 16
optim: {name: gd, lr: 0.1, lr_scaling: linear}
"""
HEAVY = ("torch", "mpi4py", "h5py", "numpy", "pydantic", "horovod", "ruamel", "jinja2")
"""The first four are never needed around the ranks."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PBS_", "LSB_")):
            monkeypatch.delenv(name)
    Path("exp.yaml").write_text(CONFIG)
    return "exp.yaml"


def _ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.execute(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], HEAVY),
        # typer itself imports pydantic for commands that take arguments
        *((words, HEAVY[:4]) for words in (["run", "--help"], ["check", "--help"], ["--version"], ["run", "--nope"])),
    ],
)
def test_answering_at_once_needs_no_heavy_import(arguments: list[str], heavy: tuple[str, ...]) -> None:
    program = (
        "import sys; from launch.cli import execute; code = execute(sys.argv[1:]); "
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stderr, done.stderr


@pytest.mark.parametrize("module", ["cli", "plan", "command", "hosts", "slurm", "supervise", "start", "check", "show"])
def test_launch_imports_nothing_of_the_ranks(module: str) -> None:
    program = f"import sys, launch.{module}; print([name for name in {HEAVY[:4]!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_console_script() -> None:
    script = Path(sys.executable).with_name("harness")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"harness \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["run", "--nope"], "no such option: --nope"),
        (["run"], "missing argument"),
        (["nope"], "no such command"),
        (["run", "exp.yaml", "-n", "0"], "invalid value for '-n'"),
        (["run", "exp.yaml", "-n", "two"], "invalid value for '-n'"),
        (["run", "exp.yaml", "--launcher", "rsh"], "not one of auto, mpirun"),
        (["run", "exp.yaml", "-H", "a:x"], "'x' is not a number of slots"),
        (["run", "exp.yaml", "-H", "a:1", "--hostfile", "f"], "not both"),
    ],
)
def test_wrong_command_lines_are_64(config: str, capsys, arguments: list[str], match: str) -> None:
    code, _, err = _ask(capsys, *arguments)
    assert code == 64
    assert match in err
    assert "Traceback" not in err


def test_no_command_prints_the_help(capsys) -> None:
    code, out, err = _ask(capsys)
    assert code == 64
    assert "Usage" in out + err


def test_show_tells_everything_and_starts_nothing(config: str, capsys) -> None:
    before = sorted(Path.cwd().rglob("*"))
    code, out, _ = _ask(capsys, "show", config, "optim.lr=0.05", "-n", "2", "--launcher", "mpirun")
    assert code == 0
    assert sorted(Path.cwd().rglob("*")) == before
    assert re.search(r"^  global_batch: 512 +# exp\.yaml:5$", out, re.MULTILINE)
    assert re.search(r"^  lr: 0\.05 +# command line$", out, re.MULTILINE)
    assert re.search(r"^  momentum: null +# default$", out, re.MULTILINE)
    assert "global batch 512 = 2 ranks x 16 accumulation x 16 samples; lr 0.05 x 512/256 = 0.1\n" in out
    assert "#!/bin/bash\n" in out
    assert out.rstrip().endswith("run exp.yaml optim.lr=0.05 launch.ranks=2 launch.launcher=mpirun")
    columns = {line.index("# ") for line in out.partition("\n# batch\n")[0].splitlines()[1:] if "  # " in line}
    assert len(columns) == 1, "the origins are aligned"


def test_show_tells_what_run_would_refuse(config: str, capsys) -> None:
    assert _ask(capsys, "show", config, "task.name=json:Nope")[0] == 78
    frozen = open_run(resolve(Path(config)).config)
    (frozen.checkpoints / "step-00000001").mkdir(parents=True)
    before = sorted(Path.cwd().rglob("*"))
    code, _, err = _ask(capsys, "show", config, "optim.lr=7")
    assert code == 0
    assert err.startswith("note: `harness run` would refuse: ") and "computes something else" in err
    assert sorted(Path.cwd().rglob("*")) == before


def test_show_draws_which_rank_does_what(config: str, capsys) -> None:
    arguments = ("parallel.model=2", "-H", "a:3,b:3,c:2", "--launcher", "mpirun")
    code, out, _ = _ask(capsys, "show", config, *arguments)
    assert code == 0
    assert "global batch 512 = 4 replicas of 2 ranks x 8 accumulation x 16 samples" in out
    drawn = [line.split() for line in out.partition("# ranks\n")[2].partition("\n\n")[0].splitlines()]
    assert drawn[1:] == [["0", "a", "0", "1"], ["1", "a", "b", "2", "5"], ["2", "b", "3", "4"], ["3", "c", "6", "7"]]
    code, out, _ = _ask(capsys, "show", config, "parallel.pipeline=2", "-n", "4", "--launcher", "mpirun")
    drawn = [line.split() for line in out.partition("# ranks\n")[2].partition("\n\n")[0].splitlines()]
    assert drawn[0] == ["replica", "host", "stage", "0", "stage", "1"]
    assert [row[0] for row in drawn[1:]] == ["0", "1"] and [row[-2:] for row in drawn[1:]] == [["0", "1"], ["2", "3"]]
    code, _, err = _ask(capsys, "show", config, *arguments[:1], "-n", "3", "--launcher", "mpirun")
    assert code == 78
    assert "3 ranks cannot be cut into replicas of 2 ranks" in err and "start 2 or 4 ranks" in err


def test_show_draws_who_has_which_slice_of_the_optimizer(config: str, capsys) -> None:
    arguments = ("parallel.optimizer_shards=node", "--launcher", "mpirun")
    code, out, _ = _ask(capsys, "show", config, *arguments, "-H", "a:2,b:2")
    assert code == 0
    drawn = [line.split() for line in out.partition("# ranks\n")[2].partition("\n\n")[0].splitlines()]
    assert drawn[1:] == [[str(rank), "ab"[rank // 2], str(rank), str(rank % 2 + 1), "of", "2"] for rank in range(4)]
    code, _, err = _ask(capsys, "show", config, *arguments, "-H", "a:3,b:1")
    assert code == 78 and "needs equally many replicas on every node, not 3 on a, 1 on b" in err


def test_show_draws_servers(config: str, capsys) -> None:
    arguments = [config, "parallel.strategy=parameter_server", "parallel.servers=2", "-n", "4", "--launcher", "mpirun"]
    code, out, _ = _ask(capsys, "show", *arguments)
    assert code == 0 and "= 2 ranks x" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["server", "0", "localhost", "0"] in rows and ["0", "localhost", "2"] in rows
    code, _, err = _ask(capsys, "run", *arguments[:-4], "-n", "2", "--launcher", "mpirun")
    assert code == 78 and "of which the parameter server takes 2: none is left to train" in err


def test_the_config_that_is_shown_is_a_config(config: str, capsys) -> None:
    _, out, _ = _ask(capsys, "show", config)
    Path("again.yaml").write_text(out.partition("# config\n")[2].partition("\n# batch\n")[0])
    code, again, _ = _ask(capsys, "show", "again.yaml")
    assert code == 0
    assert "again.yaml:" in again


@pytest.mark.mpi
def test_the_command_that_is_shown_can_be_pasted(config: str, capsys, tmp_path: Path) -> None:
    _, out, _ = _ask(capsys, "show", config, "-n", "2", "train.steps=9")
    command = out.partition("\n# launch\n")[2].partition("\n# batch script\n")[0]
    command = "\n".join(line for line in command.splitlines() if not line.startswith("note: "))
    assert f"{sys.executable} -m harness exp.yaml" in command.replace("\\\n  ", "")
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    told = command.replace(sys.executable, str(program)).replace("\\\n", "")
    # Python's own view of the environment: MPI, which other tests start in this process, adds to the C library's
    done = subprocess.run(
        ["bash", "-c", told],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["-m harness exp.yaml train.steps=9 launch.ranks=2"] * 2


def test_show_where_no_mpi_is(config: str, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, _ = _ask(capsys, "show", config, "-n", "4")
    assert code == 0
    assert "cannot start here: there is no mpirun on PATH" in out
    assert "512 = 4 ranks" in out
    assert "#!/bin/bash" in out


@pytest.mark.parametrize("command", ["run", "show"])
def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(config: str, capsys, command: str) -> None:
    code, _, err = _ask(capsys, command, config, "-n", "3")
    assert code == 78
    assert "does not divide" in err
    assert re.search(r"use train\.global_batch=\d+ or \d+", err), "the nearest that divide are named"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["run", "none.yaml"], 66, "none.yaml"),
        (["run", "exp.yaml", "optim.rl=3"], 78, "optim.rl"),
        (["run", "exp.yaml", "train.steps=many"], 78, "train.steps"),
        (["run", "exp.yaml", "--site", "nowhere"], 66, "nowhere"),
        (["run", "exp.yaml", "--hostfile", "none.txt"], 66, "none.txt"),
        (["run", "exp.yaml", "-n", "5", "-H", "localhost:4"], 64, "5 ranks are more than the 4 slots"),
        (["run", "exp.yaml", "-n", "4096"], 69, "4096 ranks are too many"),
        (["run", "exp.yaml", "-n", "2", "--launcher", "local"], 64, "starts one rank, not 2"),
        (["run", "exp.yaml", "launch.hosts=a:x"], 78, "launch.hosts"),
    ],
)
def test_wrong_input_is_a_sentence(config: str, capsys, arguments: list[str], code: int, match: str) -> None:
    got, out, err = _ask(capsys, *arguments)
    assert got == code, err
    assert err.startswith("error: ")
    assert match in err
    assert "Traceback" not in err + out
    assert not Path("runs").exists(), "nothing was made"


def test_no_mpi_is_69(config: str, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = _ask(capsys, "run", config)
    assert code == 69
    assert "no mpirun on PATH" in err


@pytest.mark.mpi
def test_a_run_directory_that_is_a_file(config: str, capsys) -> None:
    Path("taken").write_text("")
    code, _, err = _ask(capsys, "run", config, "run_dir=taken/x")
    assert code == 74, err
    assert "taken" in err


@pytest.mark.mpi
def test_a_full_disk(config: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full is no directory, so the limit on file size stands for a disk that takes nothing."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
        "from launch.cli import execute; sys.exit(execute(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, "run", config], capture_output=True, text=True, check=False)
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_schema_is_json_schema(capsys) -> None:
    code, out, _ = _ask(capsys, "schema")
    assert code == 0
    assert json.loads(out)["$schema"].startswith("https://json-schema.org/")


def test_a_mistake_in_harness_itself_is_one_line(config: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    import harness.resolve

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(harness.resolve, "resolve", broken)
    code, _, err = _ask(capsys, "run", config)
    assert code == 1
    assert "ZeroDivisionError: oops" in err
    assert "Traceback" not in err
    details = Path(err.split()[-1])
    assert "Traceback" in details.read_text()
    details.unlink()


def test_a_closed_pipe_is_quiet(config: str) -> None:
    script = shutil.which("harness", path=str(Path(sys.executable).parent))
    done = subprocess.run(f"{script} schema | head -c 10", shell=True, capture_output=True, text=True, check=True)
    assert len(done.stdout) == 10
    assert done.stderr == ""
