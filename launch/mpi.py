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


def find(environ: Mapping[str, str] = os.environ, *, timeout: float = 15.0) -> Mpi:
    """The MPI whose `mpirun` (or `mpiexec`) comes first on PATH.

    Raises Unavailable when there is none, when it does not answer within `timeout` seconds, or is unknown.
    """
    search = environ.get("PATH")
    path = shutil.which("mpirun", path=search) or shutil.which("mpiexec", path=search)
    if path is None:
        raise Unavailable("there is no mpirun on PATH: no MPI is installed or its module is not loaded", hint=INSTALL)
    mpi = replace(identify(_ask([path, "--version"], environ, timeout)), path=path)
    if mpi.family != "openmpi":
        return mpi
    info = os.path.join(os.path.dirname(path), "ompi_info")
    parts = _ask([info, "--parsable"], environ, timeout) if os.access(info, os.X_OK) else ""
    return replace(mpi, ucx="mca:pml:ucx:" in parts)


def _ask(argv: list[str], environ: Mapping[str, str], timeout: float) -> str:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=timeout, env=dict(environ), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{' '.join(argv)}` gave no answer within {timeout:.0f} s", hint=INSTALL) from error
    except OSError as error:
        raise Unavailable(f"`{' '.join(argv)}` cannot be started: {error.strerror}", hint=INSTALL) from error
    return f"{done.stdout}\n{done.stderr}"
