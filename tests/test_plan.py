"""From a config and an environment to a start: ranks, launcher, threads. Tools on PATH are small scripts."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config, Horovod, Restart
from harness.errors import ConfigError, InputMissing, Unavailable, UsageError
from launch import hosts
from launch.command import Elastic
from launch.plan import make_plan

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NTASKS": "8"}


def _config(**launch: Any) -> Config:
    slurm = launch.pop("slurm", {})
    values = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 8}}
    return Config.model_validate(values | {"launch": launch, "slurm": slurm})


@pytest.fixture
def path(tmp_path: Path):
    """path(mpirun="...", srun="...") makes a folder of scripts and an environment with nothing else on PATH."""

    def make(**tools: str) -> dict[str, str]:
        for name, body in tools.items():
            file = tmp_path / name.replace("_", "-")
            file.write_text(f"#!/bin/sh\n{body}\n")
            file.chmod(0o755)
        return {"PATH": str(tmp_path)}

    return make


OPEN_MPI = "echo 'mpirun (Open MPI) 4.1.4'"
INTEL = "echo 'Intel(R) MPI Library for Linux* OS, Version 2021.9'"


def test_one_rank_by_default(path) -> None:
    plan = make_plan(_config(), ["runs/x"], path(mpirun=OPEN_MPI))
    assert (plan.job.ranks, plan.job.launcher) == (1, "mpirun")
    assert plan.job.program == (sys.executable, "-m", "harness", "runs/x")
    assert plan.notes == ()


def test_one_rank_per_gpu(path) -> None:
    environ = path(mpirun=OPEN_MPI, nvidia_smi="echo 'GPU 0: x'; echo 'GPU 1: x'; echo 'GPU 2: x'")
    plan = make_plan(_config(), [], environ)
    assert (plan.job.ranks, plan.job.gpus) == (3, True)


def test_all_slots_of_what_was_given_or_allocated(path) -> None:
    assert make_plan(_config(hosts="a:2,b:3"), [], path(mpirun=OPEN_MPI)).job.ranks == 5
    assert make_plan(_config(), [], path(mpirun=OPEN_MPI) | JOB).job.ranks == 8
    assert make_plan(_config(ranks=3), [], path(mpirun=OPEN_MPI) | JOB).job.ranks == 3


def test_more_ranks_than_the_allocation_has(path) -> None:
    with pytest.raises(Unavailable, match=r"9 ranks are more than the 8 slots of the Slurm job 7"):
        make_plan(_config(ranks=9), [], path(mpirun=OPEN_MPI) | JOB)


def test_srun_only_where_it_starts_mpi(path) -> None:
    environ = path(mpirun=OPEN_MPI, srun="exit 0") | JOB
    assert make_plan(_config(), [], environ).job.launcher == "srun"
    assert make_plan(_config(launcher="mpirun"), [], environ).job.launcher == "mpirun"
    assert make_plan(_config(), [], path(mpirun=OPEN_MPI, srun="exit 1") | JOB).job.launcher == "mpirun"
    assert make_plan(_config(), [], path(mpirun=INTEL, srun="exit 0") | JOB).job.launcher == "mpirun"
    without = path(mpirun=OPEN_MPI, srun="exit 0")
    assert make_plan(_config(), [], without).job.launcher == "mpirun", "not inside a job"


def test_no_srun_inside_a_step_which_would_wait_for_that_steps_cores(path) -> None:
    environ = path(mpirun=OPEN_MPI, srun=': > "$0.started"') | JOB
    assert make_plan(_config(), [], environ | {"SLURM_STEP_ID": "0"}).job.launcher == "mpirun"
    assert not Path(environ["PATH"], "srun.started").exists()
    assert make_plan(_config(), [], environ | {"SLURM_STEP_ID": "4294967290"}).job.launcher == "srun", "salloc's shell"
    assert make_plan(_config(launcher="srun"), [], environ | {"SLURM_STEP_ID": "0"}).job.launcher == "srun", "as told"


def test_show_asks_srun_for_its_list_only(path) -> None:
    srun = 'case "$1" in --mpi=list) echo pmix;; *) : > "$0.started";; esac'
    environ = path(mpirun=OPEN_MPI, srun=srun) | JOB
    assert make_plan(_config(), [], environ, probe=False).job.launcher == "srun"
    assert not Path(environ["PATH"], "srun.started").exists()
    assert make_plan(_config(slurm={"mpi": "pmi7"}), [], environ, probe=False).job.launcher == "mpirun"


def test_what_is_missing_is_named(path) -> None:
    with pytest.raises(Unavailable, match="no mpirun on PATH"):
        make_plan(_config(), [], path())
    with pytest.raises(Unavailable, match="no srun on PATH"):
        make_plan(_config(launcher="srun"), [], path(mpirun=OPEN_MPI))
    assert make_plan(_config(launcher="local"), [], path()).mpi is None
    with pytest.raises(UsageError, match="starts one rank, not 2"):
        make_plan(_config(launcher="local", ranks=2), [], path())


def test_horovodrun_takes_gloo_without_mpi_or_when_told(path) -> None:
    assert make_plan(_config(launcher="horovodrun", ranks=2), [], path(horovodrun="")).job.gloo
    environ = path(mpirun=OPEN_MPI, horovodrun="")
    assert not make_plan(_config(launcher="horovodrun"), [], environ).job.gloo
    assert make_plan(_config(launcher="horovodrun"), [], environ | {"HOROVOD_CONTROLLER": "gloo"}).job.gloo
    plan = make_plan(_config(launcher="horovodrun", env={"HOROVOD_CONTROLLER": "gloo"}, mpi_flags=["-v"]), [], environ)
    assert plan.job.gloo
    assert "mpi_flags are not used" in plan.notes[0]


def test_threads_are_the_cores_of_a_rank(path) -> None:
    environ = path(mpirun=OPEN_MPI)
    cores = hosts.count_cores()
    assert make_plan(_config(), [], environ).command.env["OMP_NUM_THREADS"] == str(cores)
    assert make_plan(_config(ranks=2 * cores), [], environ).command.env["OMP_NUM_THREADS"] == "1"
    assert make_plan(_config(threads=5), [], environ).command.env["OMP_NUM_THREADS"] == "5"
    assert make_plan(_config(), [], environ | {"OMP_NUM_THREADS": "3"}).command.env["OMP_NUM_THREADS"] == "3"
    assert make_plan(_config(env={"OMP_NUM_THREADS": "4"}), [], environ).command.env["OMP_NUM_THREADS"] == "4"
    job = environ | JOB | {"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "24"}
    assert make_plan(_config(), [], job).job.cores == 6
    del job["SLURM_CPUS_PER_TASK"]
    assert make_plan(_config(ranks=8), [], job).job.cores == 6
    assert make_plan(_config(slurm={"cpus_per_rank": 2}), [], job).job.cores == 2


def test_oversubscription_is_one_line(path) -> None:
    cores = hosts.count_cores()
    plan = make_plan(_config(ranks=cores + 1), [], path(mpirun=OPEN_MPI))
    assert plan.job.oversubscribed
    assert len(plan.notes) == 1


def test_names_of_variables_are_checked(path) -> None:
    for name in ("A=B", "", "1A", "A B", "A\n"):
        with pytest.raises(ConfigError, match="no name of an environment variable"):
            make_plan(_config(env={name: "x"}), [], path(mpirun=OPEN_MPI))


def test_more_environment_reaches_other_hosts(path) -> None:
    plan = make_plan(_config(hosts="n1:1,n2:1"), [], path(mpirun=OPEN_MPI)).with_env({"HARNESS_ATTEMPT": "4"})
    assert plan.command.env["HARNESS_ATTEMPT"] == "4"
    assert "HARNESS_ATTEMPT" in plan.command.argv
    assert os.environ.get("HARNESS_ATTEMPT") is None


def _elastic(**launch: Any) -> Config:
    least = launch.pop("least", None)
    return _config(elastic=True, **launch).model_copy(update={"restart": Restart(min_ranks=least, longest=1e6)})


def test_an_elastic_run_asks_a_file_for_its_hosts(path) -> None:
    config = _elastic(hosts="a:2,b:3,c:4", ranks=4, max_ranks=6, least=2)
    plan = make_plan(config, [], path(mpirun=OPEN_MPI))
    assert (plan.job.launcher, plan.job.gloo, plan.job.ranks) == ("horovodrun", True, 4)
    assert plan.job.elastic == Elastic(2, 6, f"cat {os.path.abspath('runs/x/hosts')}", (10, 3600))
    assert plan.hosts == "a:2\nb:3\nc:1\n"
    soon = config.model_copy(update={"restart": Restart(backoff=0.1, longest=2.0)})
    assert make_plan(soon, [], path()).job.elastic == replace(plan.job.elastic, least=1, cooldown=(10, 10))
    assert make_plan(_elastic(hosts="a:2,b:3"), [], path()).hosts == "a:2\nb:3\n", "no MPI is needed"
    more = make_plan(_elastic(hosts="localhost:2", max_ranks=64), [], path())
    assert more.hosts == "localhost:2\n" and more.job.elastic is not None and more.job.elastic.most == 64


def test_an_elastic_run_asks_a_command_for_its_hosts(path) -> None:
    plan = make_plan(_elastic(ranks=3, max_ranks=8, discover="./who --is there"), [], path(), probe=False)
    assert plan.hosts is None and plan.job.elastic is not None
    assert plan.job.elastic.discover == "./who --is there"
    assert "--network-interfaces" not in plan.command.argv, "nobody knows the hosts yet"


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        ({"ranks": 2, "max_ranks": 1}, "an elastic run starts with 2 ranks .-n., more than its --max-ranks 1"),
        ({"ranks": 2, "least": 3}, "an elastic run starts with 2 ranks .-n., fewer than its --min-ranks 3"),
        ({"ranks": 2, "hosts": "a:2"}, "an elastic run on a alone needs the name of its network interface"),
        ({"launcher": "mpirun"}, "launch.elastic goes with the launcher horovodrun, not with mpirun"),
    ],
)
def test_elastic_runs_that_cannot_be(path, launch: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError if "ranks" in launch else ConfigError, match=told):
        make_plan(_elastic(**launch), [], path(mpirun=OPEN_MPI))


def test_elastic_runs_do_not_go_with_a_cycle_time(path) -> None:
    config = _elastic(ranks=2).model_copy(update={"horovod": Horovod(cycle_time=0.002)})
    with pytest.raises(ConfigError, match=r"launch.elastic does not go with horovod.cycle_time: Horovod 0.28 crashes"):
        make_plan(config, [], path(mpirun=OPEN_MPI))


def test_settings_of_elastic_runs_go_with_elastic_runs(path) -> None:
    for more in ({"max_ranks": 4}, {"discover": "./who"}):
        with pytest.raises(ConfigError, match=r"go with launch\.elastic=true only"):
            make_plan(_config(**more), [], path(mpirun=OPEN_MPI))


def test_no_more_ranks_at_least_than_there_are(path) -> None:
    config = _config(ranks=2).model_copy(update={"restart": Restart(min_ranks=5)})
    with pytest.raises(UsageError, match="is 5, more than the 2 ranks of the start"):
        make_plan(config, [], path(mpirun=OPEN_MPI))


def test_srun_where_no_slurm_answers(path) -> None:
    config = _config(launcher="srun", ranks=1)
    environ = path(mpirun=OPEN_MPI, srun="exit 0", sinfo="echo 'sinfo: error: no controller' >&2; exit 1")
    with pytest.raises(Unavailable, match=r"no Slurm answers here \(sinfo: error: no controller\)"):
        make_plan(config, [], environ)
    assert make_plan(config, [], environ, probe=False).job.launcher == "srun", "a plan may be shown anywhere"
    assert make_plan(config, [], environ | JOB).job.launcher == "srun", "inside a job"
    assert make_plan(config, [], path(sinfo="exit 0")).job.launcher == "srun"


@pytest.mark.parametrize(
    ("body", "error", "told"),
    [
        (None, InputMissing, "is missing or not executable: .*not found"),
        ("exit 3", Unavailable, "failed with code 3"),
        ("echo why >&2; exit 1", Unavailable, "failed with code 1: why"),
        ("echo a:2; echo b", Unavailable, "does not print hosts: 'b' names no slots"),
        ("echo 'hello world:1'", Unavailable, "does not print hosts: 'hello world:1' is not a host"),
    ],
)
def test_a_discovery_command_is_tried_at_the_start(path, body: str | None, error: type[Exception], told: str) -> None:
    environ = path(**({"who": body} if body is not None else {})) | {"HOME": "/"}
    config = _elastic(ranks=2, discover=f"{environ['PATH']}/who")
    with pytest.raises(error, match=told):
        make_plan(config, [], environ)


def test_a_discovery_command_that_lists_few_hosts_yet_is_waited_for(path) -> None:
    environ = path(who="echo a:2; echo b:1")
    assert make_plan(_elastic(ranks=3, discover="who"), [], environ).notes == ()
    (note,) = make_plan(_elastic(ranks=4, discover="who"), [], environ).notes
    assert note == "the discovery command who lists 3 slots now: horovodrun waits until there are 4"
    Path(environ["PATH"], "who").chmod(0o644)
    with pytest.raises(InputMissing, match="not executable"):
        make_plan(_elastic(ranks=3, discover=f"{environ['PATH']}/who"), [], environ)
