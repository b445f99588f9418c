"""`harness check`: what works here, before anybody queues for nodes. Every finding is ok, warn or FAIL, with the fix.

Outside the ranks it looks at the machine; inside it starts a few ranks of `harness.probe` the way a run would start
them and compares what they say. It always ends: the ranks get a time limit and are ended by session.

    findings = check(Options(run_dir=Path("runs")))
    print([finding for finding in findings if finding.state == "FAIL"])
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import HarnessError
from harness.units import show_size
from launch import filesystem
from launch.command import EXCLUDED_INTERFACES
from launch.findings import SETUP, Finding, State, compare
from launch.plan import Plan, make_plan
from launch.probing import run_probe


@dataclass(frozen=True)
class Options:
    """What to check: where a run would write, on how many ranks, by which launcher, within how many seconds."""

    run_dir: Path = Path("runs")
    ranks: int = 2
    launcher: str = "auto"
    timeout: float = 60.0


def check(options: Options, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """All findings. Starts ranks; takes at most a little more than twice the time limit. Raises nothing foreseen."""
    findings = list(machine(options, environ))
    try:
        plan = _plan(options, environ)
    except HarnessError as error:
        findings.append(Finding("launcher", "FAIL", error.message, error.hint or ""))
        return [*findings, *_alone(options, environ)]
    launcher = plan.job.launcher if plan.mpi is None else f"{plan.job.launcher}, {plan.mpi} ({plan.mpi.path})"
    findings.append(Finding("launcher", "ok", launcher))
    if plan.notes:
        findings.append(Finding("ranks and cores", "ok", "; ".join(plan.notes)))
    with _folder(options.run_dir) as folder:
        probe = run_probe(plan, folder, options.timeout, environ)
    found = list(compare(probe, plan.mpi, plan.job.ranks, options.timeout, gloo=plan.job.gloo))
    findings += found
    if not any(rank.facts.get("mpi") for rank in probe.ranks):
        findings += _alone(options, environ)
    return findings


def machine(options: Options, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Python, packages, GPUs, batch system, network, run directory: without starting anything."""
    version = platform.python_version()
    state: State = "ok" if sys.version_info >= (3, 10) else "FAIL"
    yield Finding("python", state, f"{version} ({sys.executable})", "Python 3.10 or later")
    packages = ("torch", "horovod", "mpi4py", "h5py")
    versions = {name: _version(name) for name in packages}
    missing = [name for name, number in versions.items() if number is None]
    text = ", ".join(f"{name} {number or 'is missing'}" for name, number in versions.items())
    yield Finding("packages", "FAIL" if missing else "ok", text, SETUP)
    if shutil.which("sinfo", path=environ.get("PATH")) or environ.get("SLURM_JOB_ID"):
        job = environ.get("SLURM_JOB_ID")
        yield Finding("slurm", "ok", f"inside job {job}" if job else "found; not inside a job")
    yield _interfaces()
    yield from storage(options.run_dir)


def storage(run_dir: Path, found: filesystem.FileSystem | None = None) -> Iterator[Finding]:
    """Whether a run could write there."""
    found = found or filesystem.describe(run_dir)
    where = f"{run_dir} on {found.kind} ({found.mount})"
    if not found.writable:
        yield Finding("run directory", "FAIL", f"{where} cannot be written", "choose another run_dir")
    elif found.kind in filesystem.MEMORY:
        yield Finding("run directory", "warn", f"{where}: memory, gone after a reboot", "use a disk for real runs")
    elif found.kind in filesystem.NETWORK:
        text = f"{where}: nodes that write one file may not see each other's writes"
        yield Finding("run directory", "warn", text, "use the parallel file system for runs on several nodes")
    else:
        shared = "" if found.kind in filesystem.PARALLEL else "; a run on several nodes needs one that they share"
        yield Finding("run directory", "ok", where + shared)
    tight = found.free < 2 * 10**9 or (found.inodes is not None and found.inodes < 1000)
    inodes = "" if found.inodes is None else f", {found.inodes} inodes"
    text = f"{show_size(found.free)}{inodes}"
    yield Finding("free space", "warn" if tight else "ok", text, "free some, or choose another run_dir")


def _alone(options: Options, environ: Mapping[str, str]) -> list[Finding]:
    """One rank without a launcher, to see which of the libraries work at all."""
    try:
        plan = _plan(replace(options, ranks=1, launcher="local"), environ)
    except HarnessError as error:
        return [Finding("one rank", "FAIL", error.message, error.hint or "")]
    with _folder(options.run_dir) as folder:
        probe = run_probe(plan, folder, options.timeout, environ)
    found = [replace(finding, name=f"one rank: {finding.name}") for finding in compare(probe, None, 1, options.timeout)]
    return [finding for finding in found if not finding.name.endswith("GPUs")]


def _plan(options: Options, environ: Mapping[str, str]) -> Plan:
    from harness.config import Config

    config = Config.model_validate(
        {
            "name": "check",
            "task": {"name": "linear"},
            "train": {"steps": 1, "global_batch": 1},
            "launch": {"ranks": options.ranks, "launcher": options.launcher},
        }
    )
    return make_plan(config, [], environ)


@contextlib.contextmanager
def _folder(run_dir: Path) -> Iterator[Path | None]:
    """A folder on the run directory's file system, for the probe's file; None where none can be made."""
    try:
        made = tempfile.mkdtemp(prefix=".harness-check-", dir=filesystem.existing(run_dir))
    except OSError:
        yield None
        return
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _interfaces() -> Finding:
    names = [name for _, name in socket.if_nameindex()]
    usable = [name for name in names if not name.startswith(("lo", "docker", "virbr", "veth", "br-"))]
    unused = [name for name in names if name in EXCLUDED_INTERFACES]
    text = f"{', '.join(usable) or 'none besides loopback'}" + (f" (not used: {', '.join(unused)})" if unused else "")
    return Finding("network", "ok", text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
