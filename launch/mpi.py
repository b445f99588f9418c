"""Which MPI the `mpirun` on PATH belongs to: family, version, and whether it brings UCX.

Not here: what to do with it (`command.py`), nor whether the ranks use the same one (`check.py` asks the ranks).

>>> identify("mpirun (Open MPI) 4.1.4").family
'openmpi'
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from harness.errors import Unavailable

Family = Literal["openmpi", "spectrum", "mpich", "intel", "mvapich"]

NAMES: dict[Family, str] = {
    "openmpi": "Open MPI",
    "spectrum": "IBM Spectrum MPI",
    "mpich": "MPICH",
    "intel": "Intel MPI",
    "mvapich": "MVAPICH",
}
INSTALL = "install one (apt install openmpi-bin, or on a cluster: module load openmpi), then `harness check`"

_PATTERNS: tuple[tuple[Family, str], ...] = (  # first match counts: Spectrum, Intel and MVAPICH also name their origin
    ("spectrum", r"IBM Spectrum MPI\)?\s*v?([\d.]+)"),
    ("intel", r"Intel\(R\) MPI Library[^,\n]*, Version ([\d.]+)|Intel\(R\) MPI Library.*?([\d.]+)"),
    ("mvapich", r"MVAPICH\d?\s*[^\d\n]*([\d.]+)"),
    ("openmpi", r"(?:Open ?MPI|OpenRTE|Open MPI)\)?\s*v?([\d.]+)"),
    ("mpich", r"(?:HYDRA build details:|MPICH)[\s\S]*?[Vv]ersion:?\s+([\d.]+)"),
    ("mpich", r"\bHYDRA\b|\bMPICH\b|\bmpich\b"),
)

_begun: dict[tuple[str, ...], subprocess.Popen[str]] = {}


@dataclass(frozen=True)
class Mpi:
    """A family, its version (may be empty when the text has none), the launcher's path."""

    family: Family
    version: tuple[int, ...] = ()
    path: str = "mpirun"
    ucx: bool = False
    """Open MPI only: it was built with UCX, which then chooses the network itself."""

    @property
    def major(self) -> int:
        return self.version[0] if self.version else 0

    def __str__(self) -> str:
        return " ".join([NAMES[self.family], ".".join(map(str, self.version))]).rstrip()


def identify(text: str) -> Mpi:
    """The MPI from what `mpirun --version` prints. Raises Unavailable for an unknown text."""
    for family, pattern in _PATTERNS:
        match = re.search(pattern, text[:20_000])
        if match:
            number = next((group for group in match.groups() if group), "")
            return Mpi(family, tuple(int(part) for part in number.split(".")[:4] if part.isdecimal()))
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    raise Unavailable(
        f"the mpirun on PATH is of no known MPI; its --version says {first[:80]!r}",
        hint="known are Open MPI, MPICH, Intel MPI, Spectrum MPI and MVAPICH",
    )


def begin(environ: Mapping[str, str] = os.environ) -> None:
    """Let `ompi_info` start on its answer, which takes it a quarter of a second or more, before `find` asks for it."""
    path = _path(environ)
    if path is not None and (info := _info(path)) is not None:
        with suppress(OSError):  # `find` tells
            _begun[info] = _start(info, environ)


def find(environ: Mapping[str, str] = os.environ, *, timeout: float = 15.0) -> Mpi:
    """The MPI whose `mpirun` (or `mpiexec`) comes first on PATH.

    Raises Unavailable when there is none, when it does not answer within `timeout` seconds, or is unknown.
    """
    path = _path(environ)
    if path is None:
        raise Unavailable("there is no mpirun on PATH: no MPI is installed or its module is not loaded", hint=INSTALL)
    mpi = replace(identify(_ask((path, "--version"), environ, timeout)), path=path)
    if mpi.family != "openmpi":
        return mpi
    info = _info(path)
    return replace(mpi, ucx=info is not None and "mca:pml:ucx:" in _ask(info, environ, timeout))


def _path(environ: Mapping[str, str]) -> str | None:
    search = environ.get("PATH")
    return shutil.which("mpirun", path=search) or shutil.which("mpiexec", path=search)


def _info(mpirun: str) -> tuple[str, ...] | None:
    """What tells the components of an Open MPI; None where it is not installed."""
    tool = os.path.join(os.path.dirname(mpirun), "ompi_info")
    return (tool, "--parsable") if os.access(tool, os.X_OK) else None


def _start(argv: tuple[str, ...], environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=dict(environ)
    )


def _ask(argv: tuple[str, ...], environ: Mapping[str, str], timeout: float) -> str:
    try:
        with _begun.pop(argv, None) or _start(argv, environ) as process:
            try:
                return "\n".join(process.communicate(timeout=timeout))
            except BaseException:
                process.kill()
                raise
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{' '.join(argv)}` gave no answer within {timeout:.0f} s", hint=INSTALL) from error
    except OSError as error:
        raise Unavailable(f"`{' '.join(argv)}` cannot be started: {error.strerror}", hint=INSTALL) from error
