"""What the words of the probe's ranks mean: one finding per line of `harness check`, each with its fix. Pure.

for finding in compare(run_probe(...), plan.mpi, wanted=2, timeout=60):
    print(finding.state, finding.name, finding.text, finding.fix)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from harness.errors import Unavailable
from launch.mpi import NAMES, Mpi, identify
from launch.probing import Probe

State = Literal["ok", "warn", "FAIL"]
SETUP = "bash launch/setup.sh"
MIXED = "build mpi4py, h5py and Horovod with the mpicc that belongs to mpirun: bash launch/setup.sh"

STEPS = {
    "place": "the launcher's variables",
    "mpi": "MPI",
    "hdf5": "importing h5py",
    "file": "a parallel HDF5 file",
    "torch": "importing torch",
    "horovod": "Horovod",
    "libraries": "the loaded libraries",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    text: str
    fix: str = ""


def compare(probe: Probe, mpi: Mpi | None, wanted: int, timeout: float, *, gloo: bool = False) -> Iterator[Finding]:
    """What the ranks' words mean. `gloo`: they were started without MPI between them, on purpose."""
    last = [line for line in probe.output.splitlines() if line.strip(" -=")][-3:]
    stuck = sorted({rank.doing for rank in probe.ranks if rank.doing})
    where = f" in {', '.join(STEPS.get(step, step) for step in stuck)}" if stuck else " before any rank spoke"
    if probe.timed_out:
        fix = "mismatched MPIs or a blocked network do this; `harness check --timeout 180` on a slow machine"
        yield Finding("ranks", "FAIL", f"{wanted} ranks did not end within {timeout:.0f} s: they hung{where}", fix)
    elif not probe.ranks:
        text = f"the launcher ended with code {probe.returncode} before any rank spoke"
        yield Finding("ranks", "FAIL", ": ".join([text, *([" ".join(last)] if last else [])]), SETUP)
        return
    elif stuck:
        yield Finding("ranks", "FAIL", f"ranks crashed (code {probe.returncode}){where}: {' '.join(last)}", MIXED)
    if not probe.ranks:
        return
    yield from _world(probe, mpi, wanted, gloo)
    yield from _versions(probe)
    yield from _files(probe)
    yield from _horovod(probe, wanted)
    yield from _gpus(probe)


def _world(probe: Probe, mpi: Mpi | None, wanted: int, gloo: bool) -> Iterator[Finding]:
    for rank in probe.ranks:
        if "mpi" in rank.failed:
            yield Finding("MPI", "FAIL", rank.failed["mpi"], MIXED)
            return
    said = [rank for rank in probe.ranks if rank.facts.get("mpi")]
    if not said:
        return
    library = str(said[0].get("mpi", "library"))
    threads = str(said[0].get("mpi", "threads"))
    text = f"{library.split(', package')[0]}, MPI {said[0].get('mpi', 'standard')}, MPI_THREAD_{threads}"
    enough = threads == "MULTIPLE"
    yield Finding("MPI library", "ok" if enough else "warn", text, "an MPI built with MPI_THREAD_MULTIPLE")
    sizes = sorted({rank.get("mpi", "size") for rank in said})
    if sizes == [wanted] and len(said) == wanted and all(rank.get("mpi", "sum_right") for rank in said):
        yield Finding("COMM_WORLD", "ok", f"{wanted} ranks share it and add up right")
    elif sizes == [1] and gloo:
        yield Finding("COMM_WORLD", "ok", "not used: the ranks talk through Gloo, checkpoints take the direct engine")
    elif sizes == [1] and wanted > 1:
        starter = str(mpi) if mpi else "the launcher"
        text = f"{len(said)} ranks are each alone in a world of one: mpi4py's library is not the one of {starter}"
        yield Finding("COMM_WORLD", "FAIL", text, MIXED)
    else:
        yield Finding("COMM_WORLD", "FAIL", f"{len(said)} of {wanted} ranks spoke, in worlds of size {sizes}", MIXED)
    if mpi is not None:
        yield _same_mpi(library, mpi)
    mixed = sorted({path for rank in probe.ranks for path in rank.get("libraries", "mpi", [])})
    if any(len(rank.get("libraries", "mpi", [])) > 1 for rank in probe.ranks):
        yield Finding("MPI in memory", "FAIL", f"two MPI libraries in one process: {', '.join(mixed)}", MIXED)
    elif mixed:
        yield Finding("MPI in memory", "ok", ", ".join(mixed))
    if mpi is not None and mpi.family == "openmpi" and mpi.major == 4:
        io = str(said[0].get("place", "io"))
        state: State = "ok" if io.startswith("romio") else "warn"
        yield Finding("MPI-IO", state, f"component {io}", "launch.mpi_io=romio: Open MPI 4's own can hang")


def _same_mpi(library: str, mpi: Mpi) -> Finding:
    try:
        linked = identify(library)
    except Unavailable:
        return Finding("mpirun and mpi4py", "warn", f"mpi4py's MPI is unknown: {library[:60]}", MIXED)
    text = f"mpirun is {mpi}, mpi4py uses {linked}"
    hydra = {"mpich", "intel", "mvapich"}
    if linked.family == mpi.family and (linked.version[:2] == mpi.version[:2] or not mpi.version):
        return Finding("mpirun and mpi4py", "ok", text)
    if linked.family == mpi.family or {linked.family, mpi.family} <= hydra:
        return Finding("mpirun and mpi4py", "warn", text, "use the mpirun of the same installation")
    return Finding("mpirun and mpi4py", "FAIL", text, f"load {NAMES[linked.family]}, or rebuild: {MIXED}")


def _versions(probe: Probe) -> Iterator[Finding]:
    first = probe.ranks[0]
    for step, name in (("torch", "torch"), ("hdf5", "h5py")):
        if step in first.failed:
            yield Finding(name, "FAIL", first.failed[step], SETUP)
    if facts := first.facts.get("torch"):
        cuda = f", CUDA {facts.get('cuda')}" if facts.get("cuda") else ", CPU only"
        yield Finding("torch", "ok", f"{facts.get('version')}{cuda}")
    if facts := first.facts.get("hdf5"):
        parallel = bool(facts.get("mpi"))
        text = f"h5py {facts.get('h5py')}, HDF5 {facts.get('hdf5')}, {'with' if parallel else 'without'} MPI"
        yield Finding("h5py", "ok" if parallel else "warn", text, f"only the direct engine works so; {SETUP}")


def _files(probe: Probe) -> Iterator[Finding]:
    for rank in probe.ranks:
        if "file" in rank.failed:
            yield Finding("parallel HDF5", "FAIL", rank.failed["file"], "checkpoint.engine=direct, or another folder")
            return
    if all(rank.facts.get("file") for rank in probe.ranks):
        skipped, count = probe.ranks[0].get("file", "skipped"), probe.ranks[0].get("file", "ranks", 0)
        yield (
            Finding("parallel HDF5", "warn", f"not tried: {skipped}", SETUP)
            if skipped
            else Finding(
                "parallel HDF5", "ok", f"{count} {'rank' if count == 1 else 'ranks'} wrote one file and read it back"
            )
        )


def _horovod(probe: Probe, wanted: int) -> Iterator[Finding]:
    for rank in probe.ranks:
        if "horovod" in rank.failed:
            yield Finding("Horovod", "FAIL", rank.failed["horovod"], SETUP)
            return
    said = [rank for rank in probe.ranks if rank.facts.get("horovod")]
    if not said:
        return
    facts = said[0].facts["horovod"]
    built = " ".join(name for name in ("mpi", "gloo", "nccl", "cuda") if facts.get(name))
    controller = "MPI" if facts.get("mpi_enabled") else "Gloo" if facts.get("gloo_enabled") else "none"
    text = f"{facts.get('version')}, built with {built}; controller {controller}"
    right = all(rank.get("horovod", "size") == wanted and rank.get("horovod", "mean_right") for rank in said)
    if len(said) != wanted or not right:
        sizes = sorted({rank.get("horovod", "size") for rank in said})
        text += f"; {len(said)} of {wanted} ranks spoke, of world sizes {sizes}"
        yield Finding("Horovod", "FAIL", text, MIXED)
    elif facts.get("threads") is False:
        text += "; MPI without MPI_THREAD_MULTIPLE"
        yield Finding("Horovod", "warn", text, "unset HOROVOD_MPI_THREADS_DISABLE")
    else:
        yield Finding("Horovod", "ok", f"{text}; {wanted} ranks averaged right")
    if any(rank.get("torch", "gpus", 0) for rank in said) and not facts.get("nccl"):
        text = "there are GPUs, but Horovod has no NCCL: gradients go through the host"
        yield Finding("NCCL", "warn", text, f"{SETUP} --gpu")


def _gpus(probe: Probe) -> Iterator[Finding]:
    hosts: dict[str, list[int]] = {}
    for rank in probe.ranks:
        hosts.setdefault(str(rank.get("place", "host")), []).append(int(rank.get("torch", "gpus", 0)))
    if not any(any(counts) for counts in hosts.values()):
        yield Finding("GPUs", "ok", "none: ranks train on CPUs")
        return
    text = ", ".join(f"{host}: {max(counts)} for {len(counts)} ranks" for host, counts in hosts.items())
    few = any(max(counts) < len(counts) for counts in hosts.values())
    yield Finding("GPUs", "warn" if few else "ok", text, "no more ranks per node than GPUs")
