"""`harness check`: for real, and on machines where something is wrong (made by small scripts on PATH)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import processes
from launch.check import Options, check
from launch.findings import Finding, compare
from launch.mpi import Mpi
from launch.probing import MARK, Probe, Rank, read_probe

HARNESS = str(Path(sys.executable).with_name("harness"))
OPEN_MPI = Mpi("openmpi", (4, 1, 4))


def _rank(number: int, size: int = 2, **more: dict[str, object]) -> Rank:
    facts: dict[str, dict[str, object]] = {
        "place": {"rank": number, "size": size, "host": "n1", "io": "romio321"},
        "mpi": {
            "library": "Open MPI v4.1.4, package: Debian", "standard": "3.1", "threads": "MULTIPLE", "rank": number,
            "size": size, "sum_right": True,
        },
        "hdf5": {"h5py": "3.16.0", "hdf5": "1.10.8", "mpi": True},
        "file": {"ranks": size, "bytes": 1},
        "torch": {"version": "2.13", "cuda": None, "gpus": 0},
        "horovod": {
            "version": "0.28.1", "mpi": True, "gloo": True, "nccl": False, "cuda": False, "mpi_enabled": True,
            "threads": True, "size": size, "mean_right": True,
        },
        "libraries": {"mpi": ["/usr/lib/libmpi.so.40"]},
    }  # fmt: skip
    for step, values in more.items():
        facts[step] = facts[step] | values
    return Rank(facts)


def _compare(*ranks: Rank, mpi: Mpi | None = OPEN_MPI, wanted: int = 2, **more: object) -> dict[str, Finding]:
    probe = replace(Probe(ranks, "", 0), **more)  # type: ignore[arg-type]
    return {finding.name: finding for finding in compare(probe, mpi, wanted, 60)}


def test_all_is_well() -> None:
    found = _compare(_rank(0), _rank(1))
    assert {finding.state for finding in found.values()} == {"ok"}
    assert {"COMM_WORLD", "MPI library", "mpirun and mpi4py", "parallel HDF5", "Horovod", "GPUs", "h5py"} <= set(found)


def test_two_worlds_of_one() -> None:
    found = _compare(_rank(0, 1), _rank(0, 1), mpi=Mpi("mpich", (4, 0)))
    assert found["COMM_WORLD"].state == "FAIL"
    assert "alone in a world of one" in found["COMM_WORLD"].text
    assert found["mpirun and mpi4py"].state == "FAIL"
    assert found["Horovod"].state == "FAIL"
    assert all(finding.fix for finding in found.values() if finding.state != "ok")


def test_worlds_of_one_under_gloo_are_meant() -> None:
    probe = Probe((_rank(0, 1, horovod={"size": 2}), _rank(0, 1, horovod={"size": 2})), "", 0)
    found = {finding.name: finding.state for finding in compare(probe, None, 2, 60, gloo=True)}
    assert found["COMM_WORLD"] == found["Horovod"] == "ok"


@pytest.mark.parametrize(
    ("step", "values", "name", "state"),
    [
        ("libraries", {"mpi": ["/a/libmpi.so.40", "/b/libmpi.so.12"]}, "MPI in memory", "FAIL"),
        ("mpi", {"threads": "FUNNELED"}, "MPI library", "warn"),
        ("mpi", {"sum_right": False}, "COMM_WORLD", "FAIL"),
        ("mpi", {"library": "Open MPI v5.0.1"}, "mpirun and mpi4py", "warn"),
        ("mpi", {"library": "MPICH Version: 4.1"}, "mpirun and mpi4py", "FAIL"),
        ("mpi", {"library": "Unheard of 1.0"}, "mpirun and mpi4py", "warn"),
        ("place", {"io": None}, "MPI-IO", "warn"),
        ("hdf5", {"mpi": False}, "h5py", "warn"),
        ("file", {"skipped": "h5py has no MPI"}, "parallel HDF5", "warn"),
        ("torch", {"gpus": 1}, "GPUs", "warn"),
        ("torch", {"gpus": 2}, "NCCL", "warn"),
        ("torch", {"gpus": 2}, "GPUs", "ok"),
        ("horovod", {"mean_right": False}, "Horovod", "FAIL"),
        ("horovod", {"threads": False}, "Horovod", "warn"),
    ],
)
def test_single_faults(step: str, values: dict[str, object], name: str, state: str) -> None:
    found = _compare(_rank(0, **{step: values}), _rank(1, **{step: values}))
    assert found[name].state == state
    assert state == "ok" or found[name].fix


@pytest.mark.parametrize(
    ("step", "name"), [("mpi", "MPI"), ("hdf5", "h5py"), ("torch", "torch"), ("horovod", "Horovod")]
)
def test_a_step_that_fails_says_why(step: str, name: str) -> None:
    rank = _rank(0)
    del rank.facts[step]
    rank.failed[step] = "ImportError: libmpi.so.40: cannot open shared object file"
    finding = _compare(rank, rank)[name]
    assert finding.state == "FAIL"
    assert "libmpi.so.40" in finding.text


def test_a_hang_names_its_step() -> None:
    rank = Rank({"place": {"rank": 0}}, doing="mpi")
    assert "hung in MPI" in _compare(rank, rank, timed_out=True)["ranks"].text
    assert "before any rank spoke" in _compare(timed_out=True)["ranks"].text
    crashed = _compare(rank, returncode=139, output="Segmentation fault")["ranks"]
    assert "crashed (code 139) in MPI" in crashed.text
    assert "Segmentation fault" in crashed.text


def test_missing_ranks() -> None:
    assert "1 of 2 ranks spoke" in _compare(_rank(0))["COMM_WORLD"].text
    assert "before any rank spoke: not enough slots" in _compare(output="not enough slots", returncode=1)["ranks"].text


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from([MARK, '{"pid": 1', '{"pid": 1}', "[]", '{"step": []}', "\n"])).map("".join)
)
def test_any_output_can_be_read(text: str) -> None:
    ranks, rest = read_probe(text)
    list(compare(Probe(ranks, rest, 0), None, 2, 60))


def _harness_check(*arguments: str, seconds: float = 180, **environ: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = subprocess.run(
        [HARNESS, "check", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | environ,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def _tool(folder: Path, body: str) -> str:
    (folder / "mpirun").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "mpirun").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.mpi
@pytest.mark.timeout(240)
def test_here(tmp_path: Path) -> None:
    code, found = _harness_check("--run-dir", str(tmp_path / "runs" / "x"), "--timeout", "150")
    assert code == 0, found
    assert found["COMM_WORLD"]["text"] == "2 ranks share it and add up right"
    assert found["parallel HDF5"]["text"] == "2 ranks wrote one file and read it back"
    assert "controller MPI" in found["Horovod"]["text"]
    assert list(tmp_path.iterdir()) == [], "nothing is left"


@pytest.mark.mpi
@pytest.mark.timeout(240)
def test_mpirun_of_another_mpi(tmp_path: Path) -> None:
    """A launcher that starts processes this MPI does not know of: each is alone."""
    path = _tool(
        tmp_path,
        '[ "$1" = --version ] && { echo "HYDRA build details:"; echo "    Version: 4.0.2"; exit; }\n'
        'n=$2; shift 2; for i in $(seq 0 $((n-1))); do PMI_RANK=$i PMI_SIZE=$n "$@" & done; wait',
    )
    code, found = _harness_check("--run-dir", str(tmp_path), "--timeout", "150", PATH=path)
    assert code == 69
    assert found["COMM_WORLD"]["state"] == "FAIL"
    assert "mpirun is MPICH 4.0.2, mpi4py uses Open MPI" in found["mpirun and mpi4py"]["text"]
    assert found["mpirun and mpi4py"]["state"] == "FAIL"


@pytest.mark.timeout(240)
def test_no_mpirun(tmp_path: Path) -> None:
    findings = check(Options(run_dir=tmp_path, timeout=100), {**os.environ, "PATH": str(tmp_path)})
    found = {finding.name: finding for finding in findings}
    assert found["launcher"].state == "FAIL"
    assert "no mpirun on PATH" in found["launcher"].text
    assert "openmpi" in found["launcher"].fix
    assert any(name.startswith("one rank") for name in found), "the libraries are looked at all the same"


@pytest.mark.timeout(120)
def test_a_launcher_that_hangs(tmp_path: Path) -> None:
    path = _tool(
        tmp_path,
        '[ "$1" = --version ] && { echo "mpirun (Open MPI) 4.1.4"; exit; }\ntrap "" TERM\nsleep 300 & wait; sleep 300',
    )
    began = time.monotonic()
    code, found = _harness_check("--run-dir", str(tmp_path), "--timeout", "2", PATH=path)
    assert code == 69
    assert "did not end within 2 s" in found["ranks"]["text"]
    assert time.monotonic() - began < 30
    assert not [
        pid for pid in processes._all() if str(tmp_path).encode() in b" ".join(processes._words(pid, "cmdline"))
    ]


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    code, found = _harness_check("--run-dir", "/proc/nowhere", "--timeout", "1", "-n", "1", "--launcher", "local")
    assert code == 69
    assert found["run directory"]["state"] == "FAIL"


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_the_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [HARNESS, "check", "--run-dir", str(tmp_path), "--timeout", "1", "--launcher", "local", "-n", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69, "one second is too little to import torch"
    assert "FAIL  ranks" in done.stdout
    assert "fix: " in done.stdout
    assert "failed" in done.stdout.splitlines()[-1]
