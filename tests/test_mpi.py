"""The MPI on PATH, from what real launchers answer to --version and real libraries say of themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import Unavailable
from launch.mpi import begin, find, identify

HYDRA = """HYDRA build details:
    Version:                                 4.0.2
    Release Date:                            Thu Apr  7 12:34:45 CDT 2022
    CC:                              gcc    -Wl,-Bsymbolic-functions -flto=auto
    Configure options:                       '--disable-option-checking' '--prefix=/usr' '--with-device=ch4:ucx'
    Process Manager:                         pmi
    Launchers available:                     ssh rsh fork slurm ll lsf sge manual persist
    Topology libraries available:            hwloc
    Resource management kernels available:   user slurm ll lsf sge pbs cobalt
    Demux engines available:                 poll select
"""
TEXTS = [
    ("mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n", "openmpi", (4, 1, 4)),
    ("mpirun (Open MPI) 4.0.3rc4\n\nReport bugs to http://www.open-mpi.org/community/help/\n", "openmpi", (4, 0)),
    ("mpirun (Open MPI) 5.0.5\n\nReport bugs to https://www.open-mpi.org/community/help/\n", "openmpi", (5, 0, 5)),
    ("mpirun (OpenRTE) 3.0.2\n\nReport bugs to http://www.open-mpi.org/community/help/\n", "openmpi", (3, 0, 2)),
    ("mpirun (IBM Spectrum MPI) 10.03.01.03rtm0\n\nReport bugs to ...\n", "spectrum", (10, 3, 1)),
    (HYDRA, "mpich", (4, 0, 2)),
    (
        "Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307 (id: d82b3071db)\n"
        "Copyright 2003-2023, Intel Corporation.\n",
        "intel",
        (2021, 9),
    ),
    ("Intel(R) MPI Library for Linux* OS, Version 2019 Update 9 Build 20200923\n", "intel", (2019,)),
    # what libraries say of themselves (MPI_Get_library_version)
    ("Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022", "openmpi", (4, 1, 4)),
    ("Open MPI v5.0.3, package: Open MPI conda@1f3 Distribution, ident: 5.0.3", "openmpi", (5, 0, 3)),
    ("MPICH Version:      4.1.2\nMPICH Release date: Wed Jun  7 15:22:45 CDT 2023\n", "mpich", (4, 1, 2)),
    ("Intel(R) MPI Library 2021.9 for Linux* OS\n", "intel", (2021, 9)),
    ("MVAPICH2 Version      :\t2.3.7\nMVAPICH2 Release date : Wed March 02 22:00:00 EST 2022\n", "mvapich", (2, 3, 7)),
    ("MPI VERSION    : CRAY MPICH version 8.1.26.5 (ANL base 3.4a2)\n", "mpich", (8, 1, 26, 5)),
]


@pytest.mark.parametrize(("text", "family", "version"), TEXTS)
def test_families(text: str, family: str, version: tuple[int, ...]) -> None:
    found = identify(text)
    assert found.family == family
    assert found.version[: len(version)] == version


@pytest.mark.parametrize("text", ["", "bash: mpirun: command not found", "slurm 22.05", "\0\0", "mpirun 9"])
def test_unknown_texts_are_refused(text: str) -> None:
    with pytest.raises(Unavailable, match="no known MPI"):
        identify(text)


@given(st.text(max_size=300))
def test_any_text_is_known_or_refused(text: str) -> None:
    try:
        found = identify(text)
    except Unavailable:
        return
    assert str(found)


def _tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_none_on_path(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no mpirun on PATH") as caught:
        find({"PATH": str(tmp_path)})
    assert caught.value.code == 69
    assert "install" in str(caught.value.hint)


def test_found_by_path_and_asked_for_ucx(tmp_path: Path) -> None:
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    _tool(tmp_path, "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    assert not find(environ).ucx
    _tool(tmp_path, "ompi_info", "echo 'mca:pml:ucx:version:\"mca:2.1.0\"'")
    found = find(environ)
    assert (found.path, found.ucx, found.major) == (str(tmp_path / "mpirun"), True, 4)


def test_ompi_info_may_begin_before_it_is_asked(tmp_path: Path) -> None:
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    begin({"PATH": str(tmp_path)})  # where there is nothing yet
    _tool(tmp_path, "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    _tool(tmp_path, "ompi_info", f"echo once >> {tmp_path}/asked; echo 'mca:pml:ucx:version:\"mca:2.1.0\"'")
    begin(environ)
    assert find(environ).ucx
    assert (tmp_path / "asked").read_text() == "once\n", "its answer was taken"
    assert find(environ).ucx and (tmp_path / "asked").read_text() == "once\nonce\n"
    (tmp_path / "ompi_info").write_text("#!/no/such/interpreter\n")
    begin(environ)
    with pytest.raises(Unavailable, match="ompi_info --parsable` cannot be started"):
        find(environ)
    _tool(tmp_path, "ompi_info", "exec sleep 30")
    begin(environ)
    with pytest.raises(Unavailable, match="no answer within 1 s"):
        find(environ, timeout=1)


def test_mpiexec_serves_too(tmp_path: Path) -> None:
    _tool(tmp_path, "mpiexec", "echo 'MPICH Version: 4.1'")
    assert find({"PATH": f"{tmp_path}"}).path == str(tmp_path / "mpiexec")


def test_a_hanging_or_broken_mpirun_is_a_sentence(tmp_path: Path) -> None:
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    _tool(tmp_path, "mpirun", "exec sleep 30")
    with pytest.raises(Unavailable, match="no answer within 1 s"):
        find(environ, timeout=1)
    (tmp_path / "mpirun").write_text("#!/no/such/interpreter\n")
    with pytest.raises(Unavailable, match="cannot be started"):
        find(environ)


@pytest.mark.mpi
def test_the_real_one() -> None:
    found = find()
    assert found.version > (0,)
    assert Path(found.path).exists()
