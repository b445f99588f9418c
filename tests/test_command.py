"""Command lines: golden files for every family and case, and rules that hold for all of them.

`HARNESS_UPDATE_GOLDEN=1 pytest tests/test_command.py` writes the golden files anew; read the difference before
committing it.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UsageError
from launch.command import Command, Elastic, Job, build
from launch.mpi import Mpi
from launch.nodelist import Host, parse_hosts

GOLDEN = Path(__file__).parent / "golden" / "commands"
PROGRAM = ("/env/bin/python", "-m", "harness", "/data/runs/a b")
INHERITED = (
    "PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "OMP_PLACES", "NCCL_DEBUG", "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES", "HOROVOD_LOG_LEVEL", "HOROVOD_RANK", "BASH_FUNC_module%%", "OLDPWD", "SECRET", "MY_DATA",
)  # fmt: skip
ONE = (Host("localhost", 2),)
TWO = (Host("n01", 4), Host("n02", 4))
FAMILIES: dict[str, tuple[str, Mpi | None, dict[str, Any]]] = {
    "openmpi4": ("mpirun", Mpi("openmpi", (4, 1, 4)), {}),
    "openmpi4-ucx": ("mpirun", Mpi("openmpi", (4, 1, 4), ucx=True), {}),
    "openmpi5": ("mpirun", Mpi("openmpi", (5, 0, 5), ucx=True), {}),
    "mpich": ("mpirun", Mpi("mpich", (4, 1, 2)), {}),
    "intel": ("mpirun", Mpi("intel", (2021, 9)), {}),
    "mvapich": ("mpirun", Mpi("mvapich", (2, 3, 7)), {}),
    "spectrum": ("mpirun", Mpi("spectrum", (10, 3)), {}),
    "srun": ("srun", Mpi("openmpi", (4, 1, 4)), {}),
    "horovodrun-mpi": ("horovodrun", Mpi("openmpi", (4, 1, 4)), {}),
    "horovodrun-gloo": ("horovodrun", None, {"gloo": True}),
}
CASES: dict[str, dict[str, Any]] = {
    "single node": {},
    "two nodes": {"hosts": TWO},
    "two unequal nodes": {"hosts": (Host("n01", 4), Host("n02", 2))},
    "two nodes with GPUs": {"hosts": TWO, "gpus": True},
    "single node, root": {"root": True},
    "single node, oversubscribed": {"oversubscribed": True},
    "two nodes, everything set": {
        "hosts": TWO,
        "bind": "core",
        "interfaces": "ib0,eth0",
        "flags": ("--verbose", "a b"),
        "env": {"LETTER": "it's $HOME", "OMP_NUM_THREADS": "7"},
        "export": ("MY_DATA", "NOT_SET"),
        "mpi_io": "ompio",
        "slurm_mpi": "pmi2",
    },
    "sixty-four nodes": {"hosts": tuple(Host(f"n{number:02d}", 1) for number in range(64))},
}


def _job(family: str, case: str) -> tuple[Job, Mpi | None]:
    launcher, mpi, more = FAMILIES[family]
    settings: dict[str, Any] = {"hosts": ONE, "threads": 8, "cores": 8, "inherited": INHERITED} | more | CASES[case]
    return Job(program=PROGRAM, launcher=launcher, **settings), mpi  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_golden(family: str) -> None:
    text = "\n".join(f"# {case}\n{build(*_job(family, case)).shell()}\n" for case in CASES)
    file = GOLDEN / f"{family}.txt"
    if os.environ.get("HARNESS_UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


def test_golden_local() -> None:
    text = build(Job(program=PROGRAM, launcher="local", hosts=(Host("localhost", 1),), threads=8), None).shell() + "\n"
    file = GOLDEN / "local.txt"
    if os.environ.get("HARNESS_UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


def test_golden_elastic() -> None:
    elastic = Elastic(least=2, most=16, discover="cat '/data/runs/a b/hosts'", cooldown=(10, 300))
    cases = {name: CASES[name] for name in ("single node", "two nodes", "two nodes, everything set")}
    text = ""
    for case, more in cases.items():
        job = Job(program=PROGRAM, launcher="horovodrun", gloo=True, elastic=elastic, **({"hosts": ONE} | more))
        text += f"# {case}\n{build(job, None).shell()}\n\n"
    file = GOLDEN / "horovodrun-elastic.txt"
    if os.environ.get("HARNESS_UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_rules_of_all(family: str, case: str) -> None:
    job, mpi = _job(family, case)
    command = build(job, mpi)
    words = list(command.argv)
    assert words[-len(PROGRAM) :] == list(PROGRAM)
    assert command.env["PYTHONUNBUFFERED"] == "1"
    assert command.env["OMP_NUM_THREADS"] == job.env.get("OMP_NUM_THREADS", "8"), "launch.env comes before all"
    assert "SECRET" not in command.shell()
    assert "BASH_FUNC" not in command.shell()
    assert "CUDA_VISIBLE_DEVICES" not in command.shell()
    assert "HOROVOD_RANK" not in command.shell()
    if family.startswith(("openmpi", "spectrum")):
        assert ("--allow-run-as-root" in words) == job.root
        exported = {after for word, after in itertools.pairwise(words) if word == "-x"}
        assert bool(exported) == job.remote
        if job.remote:
            assert exported >= {"PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTHONPATH"}
            assert "MY_DATA" in exported or not job.export
            assert "NOT_SET" not in exported, "mpirun warns of a name that is not set"
    if family.startswith("openmpi4") and case != "two nodes, everything set":
        assert command.env["OMPI_MCA_io"] == "romio321"
    if family == "srun":
        assert "--cpus-per-task=8" in words
        assert "--kill-on-bad-exit=1" in words


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_what_is_shown_is_what_is_run(family: str, case: str, tmp_path: Path) -> None:
    """The shell form, run by a real shell, gives exactly the arguments and variables."""
    command = build(*_job(family, case))
    spy = tmp_path / "spy"
    spy.write_text(
        '#!/bin/sh\nprintf "%s\\0" "$@"; printf "\\n"; for n in $NAMES; do eval "printf \'%s\\0\' \\"\\$$n\\""; done\n'
    )
    spy.chmod(0o755)
    shown = Command((str(spy), *command.argv[1:]), command.env).shell()
    names = sorted(command.env)
    done = subprocess.run(
        ["bash", "-c", shown],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "NAMES": " ".join(names)},
    )
    arguments, _, values = done.stdout.partition("\n")
    assert arguments.split("\0")[:-1] == list(command.argv[1:])
    assert values.split("\0")[:-1] == [command.env[name] for name in names]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=5))
def test_shell_form_quotes_every_word(words: list[str]) -> None:
    shown = Command(tuple(words), {}).shell()
    assert shlex.split(shown.replace(" \\\n", " ")) == words or "\\\n" in "".join(words)


def test_user_settings_win() -> None:
    job, mpi = _job("openmpi4", "single node")
    set_already = replace(job, inherited=(*job.inherited, "OMPI_MCA_io"))
    assert "OMPI_MCA_io" not in build(set_already, mpi).env
    assert build(replace(set_already, mpi_io="romio"), mpi).env["OMPI_MCA_io"] == "romio321"
    five = Mpi("openmpi", (5, 0, 1))
    assert "OMPI_MCA_io" not in build(job, five).env
    assert build(replace(job, mpi_io="romio"), five).env["OMPI_MCA_io"] == "romio341"
    gpus, _ = _job("openmpi4", "two nodes with GPUs")
    assert build(gpus, mpi).env["NCCL_SOCKET_IFNAME"] == "^lo,docker0,virbr0"
    assert "NCCL_SOCKET_IFNAME" not in build(replace(gpus, inherited=("NCCL_SOCKET_IFNAME",)), mpi).env


def test_local_is_one_rank() -> None:
    with pytest.raises(UsageError, match="starts one rank, not 2"):
        build(Job(program=PROGRAM, launcher="local", hosts=ONE), None)


@pytest.mark.mpi
@pytest.mark.parametrize("case", [case for case in CASES if "node," in case or case == "single node"])
def test_real_mpirun_takes_it(case: str, tmp_path: Path) -> None:
    """The flags of the MPI at hand, run for real on this machine, with a warning-free stderr."""
    from launch.mpi import find

    mpi = find()
    code = "import os; os.write(1, '{FROM_CONFIG} {OMP_NUM_THREADS}\\n'.format(**os.environ).encode())"
    job, _ = _job("openmpi4", case)
    job = replace(
        job,
        program=(sys.executable, "-c", code),
        root=os.geteuid() == 0,
        env={"FROM_CONFIG": "a b"},
        hosts=(Host("localhost", 3),),
    )
    command = build(job, mpi)
    done = subprocess.run(
        command.argv, env=os.environ | command.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["a b 8"] * 3


@pytest.mark.mpi
def test_real_mpirun_takes_the_flags_of_other_hosts() -> None:
    """The exports and interface exclusion of a job on several hosts, started on this one under its other name."""
    from launch.mpi import find

    mpi = find()
    job, _ = _job("openmpi4", "two nodes")
    own = os.uname().nodename
    command = build(replace(job, program=("true",), root=os.geteuid() == 0), mpi)
    argv = [word if word != "n01:4,n02:4" else f"{own}:8" for word in command.argv]
    done = subprocess.run(argv, env=os.environ | command.env, capture_output=True, text=True, timeout=60, check=False)
    unset = {name for name in INHERITED if name not in os.environ}
    noise = [line for line in done.stderr.splitlines() if not any(name in line for name in unset)]
    assert done.returncode == 0, noise


@pytest.mark.mpi
@pytest.mark.skipif(shutil.which("mpiexec.hydra") is None, reason="MPICH's launcher is not installed")
@pytest.mark.parametrize("hosts", ["localhost:3", "localhost:2,127.0.0.1:1", "localhost:2,127.0.0.1:2"])
def test_real_hydra_takes_it(hosts: str) -> None:
    job, mpi = _job("mpich", "single node")
    assert mpi is not None
    code = "import os; os.write(1, '{PMI_RANK} {FROM_CONFIG}\\n'.format(**os.environ).encode())"
    job = replace(job, program=(sys.executable, "-c", code), hosts=parse_hosts(hosts), env={"FROM_CONFIG": "a b"})
    command = build(job, replace(mpi, path=str(shutil.which("mpiexec.hydra"))))
    done = subprocess.run(
        command.argv, env=os.environ | command.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [f"{rank} a b" for rank in range(job.ranks)]
