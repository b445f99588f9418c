"""Runs in a real Slurm of two virtual nodes that this module starts: submit, requeue, chain, array, scancel."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from minislurm import MiniSlurm
from support import QUIET, ROOT

from harness.rundir import RunDir

BIN = Path(sys.executable).parent
MISSING = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged", "mpirun", "setpriv") if not shutil.which(tool)]
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm to start here: {', '.join(MISSING)} not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="virtual nodes need root"),
]
CONFIG = """
name: run
task: {name: "held:Held"}
train: {steps: 30, global_batch: 16, micro_batch: 8}
optim: {name: momentum, lr: 0.05}
checkpoint: {every: 1000}
log: {every: 1}
launch: {launcher: local, threads: 1}
stop: {margin: 5}
slurm: {time: 10m, margin: 1m}
"""
TASK = """
import os, time
from tasks_for_tests import Small

class Held(Small):
    "Waits from step 5 on where there is a file `hold`, so that somebody can do something to the job."

    def loss(self, model, batch):
        if model.training and os.path.exists("hold") and self.calls >= 5:
            time.sleep(0.5)
        return super().loss(model, batch)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniSlurm]:
    slurm = MiniSlurm(nodes=2, cpus=4, isolate=True, kill_wait=10, user=getpass.getuser())
    try:
        slurm.start(timeout=60)
    except (RuntimeError, TimeoutError, OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(slurm.d, ignore_errors=True)
        pytest.skip(f"Slurm cannot be started here: {error}")
    try:
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(slurm.d, ignore_errors=True)


class Site:
    """A user's directory in the cluster."""

    def __init__(self, slurm: MiniSlurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.env = {**QUIET, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def harness(self, *words: str, code: int = 0, env: dict[str, str] | None = None) -> str:
        done = self.slurm.run(str(BIN / "harness"), *words, check=False, env={**self.env, **(env or {})})
        assert done.returncode == code, done.stdout + done.stderr
        return str(done.stdout + done.stderr)

    def submit(self, *words: str) -> list[int]:
        said = self.harness("submit", "run.yaml", *words).splitlines()[-1]
        ids = said.partition(" as job ")[2].partition(";")[0].replace(", then ", ", ")
        return [int(word) for word in ids.split(", ")]

    def status(self, name: str = "runs/run") -> dict[str, Any]:
        return RunDir(self.folder / name).read_status()

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            logs = "".join(path.read_text() for path in self.folder.glob("runs/**/slurm-*.log"))
            assert time.monotonic() < end, f"waited for {what} in vain: {self.slurm.run('squeue').stdout}{logs}"
            time.sleep(0.1)

    def trains(self, step: int = 6, name: str = "runs/run") -> None:
        def does() -> bool:
            status = self.status(name)
            return status.get("state") == "running" and status["step"] >= step

        self.until(does, "training")

    def ends(self, job: int | str, *states: str) -> str:
        try:
            return str(self.slurm.wait(job, *states, timeout=300))
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log(job)}") from error

    def log(self, job: int | str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"runs/**/slurm-{job}*.log")))


def make_site(cluster: MiniSlurm, folder: Path) -> Site:
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "held.py").write_text(TASK)
    (folder / "tasks_for_tests.py").write_bytes((ROOT / "tests" / "tasks_for_tests.py").read_bytes())
    return Site(cluster, folder)


@pytest.fixture
def site(cluster: MiniSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    yield make_site(cluster, tmp_path)
    cluster.run("scancel", "--user", getpass.getuser(), check=False)
    cluster.wait_empty(30)


SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_ready_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)
    assert os.access(script, os.X_OK)
    options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert script.name == "chain.sh" or "#SBATCH --signal=B:USR2@120" in options


def submitted(site: Site, *words: str) -> int:
    return int(site.slurm.run("sbatch", "--parsable", *words, env=site.env).stdout)


@pytest.mark.parametrize("name", ["many_nodes_srun", "many_nodes_mpirun"])
def test_ready_scripts_start_ranks(name: str, site: Site) -> None:
    job = submitted(site, str(ROOT / f"slurm/{name}.sh"), "run.yaml", "train.steps=4")
    site.ends(job, "COMPLETED", "FAILED")
    log = (site.folder / f"harness-{job}.log").read_text()
    assert site.slurm.state(job) == "COMPLETED", log
    assert (site.status()["state"], site.status()["world"]) == ("finished", 2)
    assert "2 ranks on 2 hosts" in log


def test_the_ready_script_of_horovodrun_starts_ranks_and_stops_them(site: Site) -> None:
    (site.folder / "hold").touch()
    job = submitted(site, str(ROOT / "slurm/horovodrun.sh"), "run.yaml", "train.steps=400")
    site.trains()
    site.slurm.run("scancel", "--batch", "--signal=USR2", str(job))
    site.ends(job, "FAILED", "COMPLETED")
    log = (site.folder / f"harness-{job}.log").read_text()
    assert site.slurm.info(job)["ExitCode"] == "75:0", log
    assert (site.status()["state"], site.status()["last_checkpoint"]) == ("stopped", site.status()["step"])
    assert "2 ranks on 1 host," in log
    assert "(the stop file: signal USR2), state saved" in log


def test_ready_scripts_for_one_node_arrays_and_chains(site: Site) -> None:
    words = ("run.yaml", "train.steps=4")
    array = submitted(site, "--array=0,2", str(ROOT / "slurm/array.sh"), *words, "launch.ranks=1")
    chain = site.slurm.run(
        "bash", str(ROOT / "slurm/chain.sh"), "2", str(ROOT / "slurm/single_node.sh"), *words, "launch.ranks=1",
        env=site.env,
    ).stdout.split()  # fmt: skip
    assert len(chain) == 2
    again = submitted(site, str(ROOT / "slurm/requeue.sh"), *words, "launch.ranks=1", "run_dir=runs/again")
    for job in (*chain, again, *(f"{array}_{task}" for task in (0, 2))):
        site.ends(job, "COMPLETED")
    assert (
        "runs/run is finished: nothing to train after step 4; a higher train.steps goes on"
        in (site.folder / f"harness-{chain[1]}.log").read_text()
    )
    found = [path.parent.relative_to(site.folder) for path in site.folder.glob("runs/**/status.json")]
    rates = [f"sweep/optim.lr={rate}" for rate in ("1e-2", "1e-3")]
    assert sorted(map(str, found)) == sorted(f"runs/{name}" for name in ("again", "run", *rates))
    assert all(site.status(str(name))["state"] == "finished" for name in found)


def test_a_preempted_run_goes_on(site: Site) -> None:
    """Told by SIGTERM and nothing else, as on most sites: it saves what it can before the kill."""
    (site.folder / "hold").touch()
    words = ("run.yaml", "launch.ranks=1", "train.steps=400")
    job = submitted(site, str(ROOT / "slurm/preemptible.sh"), *words)
    site.trains(6)
    urgent = submitted(site, "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    site.ends(urgent, "COMPLETED")
    (site.folder / "hold").unlink()
    site.ends(job, "COMPLETED")
    assert site.slurm.info(job)["Restarts"] == "1"
    log = (site.folder / f"harness-{job}.log").read_text()
    assert "of 400 (signal TERM), state saved" in log
    assert "resumed from the checkpoint at step" in log
    assert (site.status()["state"], site.status()["step"]) == ("finished", 400)


def parameters(run: Path) -> dict[str, bytes]:
    from harness.checkpoint import open_checkpoint

    with open_checkpoint(sorted((run / "checkpoints").glob("step-*[0-9]"))[-1]) as checkpoint:
        return {name: checkpoint.read(name).tobytes() for name in checkpoint.names() if not name.startswith("extra")}


TWO_NODES: Sequence[str] = ("slurm.nodes=2", "slurm.ranks_per_node=1", "train.steps=200")


@pytest.fixture(scope="module")
def calm(cluster: MiniSlurm, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, bytes]]:
    """The last parameters of a run on two nodes that nobody disturbs; it runs beside the test that asks first."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        site = make_site(cluster, folder)
        (job,) = site.submit(*TWO_NODES, "launch.launcher=srun")

    def result() -> dict[str, bytes]:
        site.ends(job, "COMPLETED")
        assert len(RunDir(folder / "runs/run").attempts()) == 1
        return parameters(folder / "runs/run")

    return result


def test_a_run_goes_on_beyond_the_time_limit_as_if_there_were_none(
    calm: Callable[[], dict[str, bytes]], site: Site
) -> None:
    """Slurm's own clock: it warns two of the jobs before their limit, and ends the third, which saves meanwhile."""
    (site.folder / "hold").touch()
    words = {
        "srun": ("launch.launcher=srun",),
        "mpirun": ("launch.launcher=mpirun",),
        "limit": ("launch.launcher=srun", "slurm.margin=0s"),  # which is no warning
    }
    ids = {
        name: site.submit(*TWO_NODES, f"run_dir=runs/{name}", "slurm.requeue=true", *more)[0]
        for name, more in words.items()
    }
    for name, job in ids.items():
        site.trains(name=f"runs/{name}")
        # the limit itself is in whole minutes; Slurm looks at its jobs every 30 seconds
        site.slurm.run("scontrol", "update", f"jobid={job}", f"EndTime=now+{3 if name == 'limit' else 80}")
    expected = calm()
    for name, job in ids.items():
        site.until(lambda job=job: site.slurm.info(job)["Restarts"] != "0", f"the requeue of {name}")
        site.slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=30")  # enough for the rest
    (site.folder / "hold").unlink()
    for name, job in ids.items():
        site.until(lambda job=job: site.slurm.state(job) == "COMPLETED", f"the end of {name}")
        log = site.log(job)
        assert (site.status(f"runs/{name}")["state"], site.status(f"runs/{name}")["step"]) == ("finished", 200), log
        assert ", state saved\n" in log
        assert ("of 200 (the stop file: signal USR2)" in log) == (name != "limit")
        assert ("DUE TO TIME LIMIT" in log) == (name == "limit")
        assert f"job {job} goes back into the queue" in log
        assert "resumed from the checkpoint at step" in log
        told = [json.loads(one.command.read_text()) for one in RunDir(site.folder / f"runs/{name}").attempts()]
        assert [entry["slurm"]["restarts"] for entry in told][:2] == [0, 1]
        assert {len(entry["hosts"]) for entry in told} == {2}
        assert parameters(site.folder / f"runs/{name}") == expected
    shown = site.harness("status")
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [[n, "finished", "200/200"] for n in sorted(ids)]


def test_a_preempted_run_saves_in_its_grace_time(calm: Callable[[], dict[str, bytes]], site: Site) -> None:
    """Slurm tells its ranks at once, the batch shell only when it kills, and does not put back what ends before."""
    expected = calm()  # first, or it is preempted, too
    (site.folder / "hold").touch()
    (job,) = site.submit(*TWO_NODES, "launch.launcher=srun", "slurm.partition=grace", "slurm.requeue=false")
    site.trains()
    urgent = submitted(site, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    site.ends(urgent, "COMPLETED")
    (site.folder / "hold").unlink()
    site.until(lambda: site.slurm.state(job) in ("COMPLETED", "FAILED"), "the end")
    log = site.log(job)
    assert (site.slurm.state(job), site.slurm.info(job)["Restarts"]) == ("COMPLETED", "1"), log
    assert (site.status()["state"], site.status()["step"]) == ("finished", 200), log
    assert "of 200 (signal TERM), state saved" in log
    assert f"job {job} goes back into the queue, to go on from the saved state" in log
    assert "resumed from the checkpoint at step" in log
    assert parameters(site.folder / "runs/run") == expected


def test_a_node_that_goes_down(calm: Callable[[], dict[str, bytes]], site: Site) -> None:
    """Its power fails. One job goes on without it; Slurm puts the other back into the queue until the node is there."""
    expected = calm()  # first, or it meets with the same
    (site.folder / "hold").touch()
    words = (*TWO_NODES, "checkpoint.every=5")
    fewer = ("restart.most=1", "restart.min_ranks=1", "restart.backoff=1s", "slurm.extra={no-kill: null}")
    (first,) = site.submit(*words, "run_dir=runs/fewer", "launch.launcher=mpirun", *fewer)
    (second,) = site.submit(*words, "run_dir=runs/again", "launch.launcher=srun")
    for name in ("fewer", "again"):
        site.trains(name=f"runs/{name}")
    site.slurm.kill_node(2)
    try:
        site.until(lambda: len(RunDir(site.folder / "runs/fewer").attempts()) == 2, "a start without the node")
        ending = json.loads(RunDir(site.folder / "runs/fewer").attempt(1).ending.read_text())
        assert (ending["kind"], ending["host"], ending["restart"]) == ("lost", "n2", True)
        # what Slurm finds out by itself some time after SlurmdTimeout
        site.slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
        site.until(lambda: site.slurm.info(second)["Restarts"] == "1", "the requeue")
    finally:
        site.slurm.start_node(2)
        (site.folder / "hold").unlink()
        site.slurm.run("scontrol", "update", "nodename=n2", "state=resume", check=False)
    site.ends(first, "COMPLETED")
    assert (site.status("runs/fewer")["state"], site.status("runs/fewer")["world"]) == ("finished", 1)
    assert "the host n2 is gone" in site.log(first)
    site.until(lambda: site.slurm.state(second) == "COMPLETED", "the end of the job that was put back")
    assert (site.status("runs/again")["state"], site.status("runs/again")["world"]) == ("finished", 2)
    assert "resumed from the checkpoint at step" in site.log(second)
    assert parameters(site.folder / "runs/again") == expected


def test_ranks_that_srun_has_started_without_harness_run_stop_by_a_signal(site: Site) -> None:
    (site.folder / "hold").touch()
    ranks = f"exec srun --mpi=pmix --kill-on-bad-exit=1 {sys.executable} -m harness run.yaml train.steps=200"
    job = submitted(site, "--nodes=2", "--ntasks-per-node=1", "--output=slurm-%j.log", "--wrap", ranks)
    site.trains()
    site.slurm.run("scancel", "--signal=USR1", str(job))  # to the steps, not to the batch shell
    assert site.ends(job, "FAILED", "COMPLETED") == "FAILED"
    assert site.slurm.info(job)["ExitCode"] == "75:0"
    assert (site.status()["state"], site.status()["last_checkpoint"]) == ("stopped", site.status()["step"])
    assert "(signal USR1), state saved" in site.status()["summary"]


@pytest.mark.slow
def test_the_clock_stops_it_before_the_time_limit(site: Site) -> None:
    (site.folder / "hold").touch()
    (job,) = site.submit("slurm.time=1m", "slurm.margin=1s", "stop.margin=35", "slurm.requeue=true", "train.steps=500")
    site.until(lambda: site.status().get("state") == "stopped", "the stop")
    (site.folder / "hold").unlink()
    assert "the time is up in" in site.status()["summary"]
    site.until(lambda: site.slurm.info(job)["Restarts"] == "1", "the requeue")


def test_a_chain_goes_on_and_ends_when_the_run_has_finished(site: Site) -> None:
    (site.folder / "hold").touch()
    first, second, third = site.submit("--chain", "2")
    site.trains()
    assert "queued" not in site.harness("status", "run")
    site.slurm.run("scancel", "--batch", "--signal=USR2", str(first))
    site.until(lambda: site.status().get("state") == "stopped", "the stop")
    (site.folder / "hold").unlink()
    assert site.ends(first, "FAILED", "COMPLETED") == "FAILED"
    assert site.slurm.info(first)["ExitCode"] == "75:0"
    assert f"job {second} goes on with it" in site.log(first)
    site.ends(third, "COMPLETED")
    assert site.slurm.state(second) == "COMPLETED"
    assert "resumed from the checkpoint at step" in site.log(second)
    assert "is finished: nothing to train after step 30" in site.log(third)
    assert len(RunDir(site.folder / "runs/run").attempts()) == 2
    said = site.harness("submit", "run.yaml", code=64)
    assert "runs/run has finished at step 30: there is nothing left to do" in said


def test_harness_stop_also_ends_the_chain_and_a_cancelled_job_does_not_come_back(site: Site) -> None:
    (site.folder / "hold").touch()
    first, second = site.submit("--chain", "1", "slurm.requeue=true", "train.steps=100000")
    site.trains()
    assert f"runs/run is running already, as job {first}" in site.harness("submit", "run.yaml", code=69)
    assert "it saves its state and stops" in site.harness("stop", "run", "--timeout", "120")
    site.ends(first, "FAILED")
    site.ends(second, "COMPLETED")
    assert "this job ends; go on with: harness submit runs/run" in site.log(second)
    assert site.slurm.info(first)["Restarts"] == "0"

    before = site.status()["step"]
    (third,) = site.submit("slurm.requeue=true", "train.steps=100000")
    site.trains(before + 6)
    site.slurm.run("scancel", str(third))
    site.ends(third, "CANCELLED")
    site.until(lambda: str(third) not in site.slurm.run("squeue", "-h", "-o", "%A").stdout.split(), "its end")
    assert site.slurm.state(third) == "CANCELLED"
    assert site.slurm.info(third)["Restarts"] == "0"


def test_a_sweep_is_one_array_with_a_run_for_each_value(site: Site) -> None:
    first, second = site.submit("--sweep", "optim.lr=0.05,3e-2", "--chain", "1")
    for job in (first, second):
        for task in (0, 1):
            site.ends(f"{job}_{task}", "COMPLETED")
    assert site.log(f"{second}_").count("is finished: nothing to train after step 30") == 2
    rates = {}
    for name in ("optim.lr=0.05", "optim.lr=3e-2"):
        run = site.folder / "runs/run" / name
        assert site.status(f"runs/run/{name}")["state"] == "finished"
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rates[name] = next(line["lr"] for line in lines if line["kind"] == "train")
    assert list(rates.values()) == [0.05, 0.03]
    shown = site.harness("status", "runs/run").splitlines()
    assert [line.split()[:3] for line in shown[1:]] == [
        ["optim.lr=0.05", "finished", "30/30"],
        ["optim.lr=3e-2", "finished", "30/30"],
    ]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["slurm.partition=nope"], 69, "sbatch refused the job: invalid partition specified: nope"),
        (["slurm.nodes=4"], 69, "slurm.nodes 4 is more than the 2 nodes of partition main"),
        (["slurm.time=20s", "stop.margin=30", "slurm.margin=1s"], 78, "slurm.time (20 s) is not longer than stop.mar"),
        (["slurm.time=1m"], 78, "slurm.margin (60 s) is not shorter than slurm.time (60 s)"),
        (["launch.ranks=3", "train.global_batch=16"], 78, "16"),
        (["slurm.extra={frobnicate: 1}"], 69, "sbatch refused the job: unrecognized option '--frobnicate=1'"),
    ],
)
def test_what_slurm_cannot_do_is_said(site: Site, words: list[str], code: int, sentence: str) -> None:
    said = site.harness("submit", "run.yaml", *words, code=code)
    assert f"error: {sentence}" in said or (code == 78 and sentence in said)
    assert not site.slurm.run("squeue", "-h").stdout.strip()


@pytest.mark.slow
def test_where_scontrol_is_missing_the_command_to_type_is_told(site: Site) -> None:
    """A job in which scontrol fails, as in a container: the state is saved, and what to type is in its log."""
    fake = site.folder / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text("#!/bin/bash\nexit 1\n")
    fake.chmod(0o755)
    (site.folder / "hold").touch()
    site.env["PATH"] = f"{fake.parent}:{site.env['PATH']}"
    (job,) = site.submit("slurm.requeue=true", "train.steps=100000")
    site.trains()
    site.slurm.run("scancel", "--batch", "--signal=USR2", str(job))
    site.ends(job, "FAILED")
    assert f"job {job} could not be put back into the queue: code 1" in site.log(job)
    assert "type, where Slurm's commands are: sbatch runs/run/job.sh" in site.log(job)
