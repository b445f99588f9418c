"""`harness submit` and what a job does before and after its run, without a Slurm: its commands are fakes on PATH."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config
from harness.errors import UsageError
from harness.rundir import RunDir, open_run, write_json
from launch.cli import execute
from launch.requeue import go_on
from launch.submit import sweeps

JOB = {"SLURM_JOB_ID": "17"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name in ("sbatch", "scontrol", "squeue", "sacct", "sinfo"):
        fake(tmp_path, name, "exit 1")
    (tmp_path / "run.yaml").write_text(
        "name: run\ntask: {name: linear}\ntrain: {steps: 12, global_batch: 16}\nslurm: {margin: 1m}\n"
    )
    return tmp_path


def fake(here: Path, name: str, text: str) -> None:
    (here / "bin").mkdir(exist_ok=True)
    (here / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (here / "bin" / name).chmod(0o755)


def a_run(**slurm: Any) -> tuple[RunDir, Config]:
    values = {"name": "run", "task": {"name": "linear"}, "train": {"steps": 12, "global_batch": 16}, "slurm": slurm}
    config = Config.model_validate(values)
    run = open_run(config)
    run.new_attempt()
    return run, config


def ended(run: RunDir, state: str, **fields: Any) -> None:
    write_json(run.status, {"state": state, "step": 12, "steps": 12, "attempt": 1, "time": 5000.0} | fields)


def test_submission_is_by_argv_with_the_frozen_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "sbatch", 'printf "<%s>" "$@" >>calls; echo >>calls; env >environment; echo $((40 + $(wc -l <calls)))')
    os.environ |= {"SLURM_JOB_ID": "3", "SBATCH_PARTITION": "other", "SBATCH_ACCOUNT": "mine"}
    try:
        assert execute(["submit", "run.yaml", "slurm.partition=main", "train.steps=24", "--chain", "2"]) == 0
    finally:
        for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SBATCH_ACCOUNT"):
            del os.environ[name]
    assert (here / "calls").read_text().splitlines() == [
        "<--parsable><runs/run/job.sh>",
        "<--parsable><--dependency=afterany:41><runs/run/job.sh><--follow-up>",
        "<--parsable><--dependency=afterany:42><runs/run/job.sh><--follow-up>",
    ]
    environment = (here / "environment").read_text()
    assert "SLURM_JOB_ID" not in environment
    assert "SBATCH_PARTITION" not in environment
    assert "SBATCH_ACCOUNT=mine" in environment  # the script does not say which
    out = capsys.readouterr().out
    assert out.endswith("submitted runs/run as job 41, then 42, 43; see: harness status runs/run\n")
    assert "steps: 24" in (here / "runs/run/config.yaml").read_text()
    assert json.loads((here / "runs/run/submitted.json").read_text())["jobs"] == ["41", "42", "43"]
    script = (here / "runs/run/job.sh").read_text()
    assert out.startswith(script)
    assert script.splitlines()[-1].endswith('/harness run runs/run "$@"')


def test_a_dry_run_touches_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "sbatch", "touch called")
    assert execute(["submit", "run.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert sorted(path.name for path in here.iterdir()) == ["bin", "run.yaml"]


def test_ranks_can_be_said_as_for_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "sbatch", "echo 41")
    assert execute(["submit", "run.yaml", "-n", "8", "slurm.nodes=2", "--dry-run"]) == 0
    assert "#SBATCH --ntasks-per-node=4" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("sweep", [(), ("--sweep", "seed=1,2")])
def test_a_dry_run_prints_what_is_submitted(
    sweep: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(here, "sbatch", 'echo "sbatch $*" >>calls; echo $(wc -l <calls)')
    assert execute(["submit", "run.yaml", "--chain", "2", "--dry-run", *sweep]) == 0
    dry = capsys.readouterr()
    assert not (here / "calls").exists()
    assert execute(["submit", "run.yaml", "--chain", "2", *sweep]) == 0
    out = capsys.readouterr().out
    assert out.startswith(dry.out)
    assert dry.out == (here / "runs/run/job.sh").read_text()
    told = dry.err.replace("JOB", "").splitlines()
    assert told == ["would submit:", *(f"  {line}" for line in (here / "calls").read_text().splitlines())]
    assert len(told) == 4
    for run in ("seed=1", "seed=2") if sweep else ("",):
        jobs = json.loads((here / "runs/run" / run / "submitted.json").read_text())["jobs"]
        assert jobs == [f"{job}_{int(run[-1]) - 1}" if run else str(job) for job in (1, 2, 3)]


def test_what_was_submitted_is_known_when_the_chain_breaks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(
        here,
        "sbatch",
        "[ -e first ] && { echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }\n" + "touch first; echo 41",
    )
    assert execute(["submit", "run.yaml", "--chain", "2"]) == 69
    said = capsys.readouterr()
    assert "submitted runs/run as job 41;" in said.out
    assert "error: sbatch refused the job: QOSMaxSubmitJobPerUserLimit\n  `sacctmgr show qos`" in said.err
    assert json.loads((here / "runs/run/submitted.json").read_text())["jobs"] == ["41"]


def tree(here: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted((here / "runs").rglob("*"))}


REFUSED = "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2; exit 1"


@pytest.mark.parametrize("words", [[], ["--chain", "1"], ["--sweep", "seed=1,2"]])
def test_a_refused_submission_leaves_nothing(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "sbatch", REFUSED)
    assert execute(["submit", "run.yaml", *words]) == 69
    said = capsys.readouterr().err
    assert "error: sbatch refused the job: Batch job submission failed: Invalid partition name specified\n" in said
    assert not (here / "runs").exists()


def test_a_refused_submission_leaves_a_run_as_it_was(here: Path) -> None:
    run, _ = a_run()
    ended(run, "stopped")
    run.stop.write_text("asked by me")
    (run.root / "job.sh").write_text("of an earlier job")
    before = tree(here)
    fake(here, "sbatch", REFUSED)
    assert execute(["submit", "run.yaml", "train.steps=24", "slurm.time=2h"]) == 69
    assert tree(here) == before
    fake(here, "sbatch", "echo 41")
    assert execute(["submit", "run.yaml", "train.steps=24"]) == 0
    assert sorted(tree(here).keys() - before.keys()) == [
        str(run.root.resolve() / "config.1.yaml"),
        str(run.root.resolve() / "submitted.json"),
    ]
    assert not run.stop.exists()


def test_a_slurm_that_does_not_answer(here: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "sbatch", "exec sleep 60")
    monkeypatch.setattr("launch.submit.PATIENCE", 0.3)
    assert execute(["submit", "run.yaml"]) == 69
    assert "sbatch gave no answer within 0.3 s\n  `scontrol ping` tells" in capsys.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slurm.time=25h"], "slurm.time (90000 s) is longer than partition main allows (86400 s)"),
        (["slurm.time=31m", "slurm.partition=short"], "slurm.time (1860 s) is longer than partition short allows"),
        (["slurm.nodes=16"], "slurm.nodes 16 is more than the 8 nodes of partition main"),
        (["slurm.time=24h", "slurm.nodes=8"], None),
        (["slurm.time=9-0:0:0", "slurm.partition=short,long"], None),
        (["slurm.time=9h", "slurm.partition=unknown"], None),  # sbatch knows better
    ],
)
def test_what_would_wait_for_ever(
    words: list[str], told: str | None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(here, "sinfo", 'echo "main*|4|1-00:00:00"; echo "main*|4|1-00:00:00"; echo "short|1|30:00"; echo "long|1|n/a"')
    fake(here, "sbatch", "echo 41")
    assert execute(["submit", "run.yaml", *words]) == (69 if told else 0)
    assert told is None or f"error: {told}" in capsys.readouterr().err
    assert (here / "runs").exists() == (told is None)


def test_no_sbatch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bin/sbatch").unlink()
    os.environ["PATH"] = str(here / "bin")
    assert execute(["submit", "run.yaml"]) == 69
    assert "error: there is no sbatch on PATH\n" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_combinations_of_a_sweep() -> None:
    found = sweeps(["optim.lr=1e-3,3e-4", "task.args.x=a/b"])
    assert [sweep.overrides for sweep in found] == [
        ("optim.lr=1e-3", "task.args.x=a/b"),
        ("optim.lr=3e-4", "task.args.x=a/b"),
    ]
    assert [sweep.name for sweep in found] == ["optim.lr=1e-3,task.args.x=a_b", "optim.lr=3e-4,task.args.x=a_b"]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["seed"], "is not of the form"),
        (["seed="], "is not of the form"),
        (["seed=1,,2"], "is not of the form"),
        (["$(id)=1"], "is not of the form"),
        (["seed=1,1"], "names a value twice"),
        (["task.name=a/b,a:b"], "would share a run directory"),
        (["seed=" + ",".join(map(str, range(40))), "data.block=" + ",".join(map(str, range(40)))], "more than 1000"),
    ],
)
def test_a_sweep_that_is_none(texts: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        sweeps(texts)


def test_a_sweep_over_what_the_whole_array_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["submit", "run.yaml", "--sweep", "slurm.nodes=1,2", "--dry-run"]) == 64
    assert "all tasks of an array are alike in slurm and launch.ranks" in capsys.readouterr().err


def test_a_mistake_in_one_run_of_a_sweep_submits_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "sbatch", "touch called; echo 41")
    assert execute(["submit", "run.yaml", "--sweep", "optim.lr=1e-3,much"]) == 78
    assert not (here / "called").exists()
    assert not (here / "runs").exists()


@pytest.mark.parametrize("known", ["JobState=RUNNING Reason=None", "JobState=COMPLETING Reason=TimeLimit"])
def test_a_job_goes_back_into_the_queue(known: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "scontrol", f'[ "$1" = requeue ] && echo "$@" >>calls || echo "{known}"')
    run, config = a_run(requeue=True)
    run.stop.write_text("signal\n")
    array = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
    go_on(run, config, JOB)
    go_on(run, config, array)
    assert (here / "calls").read_text() == "requeue 17\nrequeue 17_1\n"
    assert "job 17 goes back into the queue" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["cancelled", "preempted", "by a person", "outside a job", "not asked for"])
def test_a_job_that_must_not_come_back(why: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"cancelled": "COMPLETING", "preempted": "PREEMPTED"}.get(why, "RUNNING")
    fake(here, "scontrol", f'[ "$1" = requeue ] && echo "$@" >>calls || echo "JobState={state} Reason=None"')
    run, config = a_run(requeue=why != "not asked for")
    run.stop.write_text("asked by me" if why == "by a person" else "signal")
    go_on(run, config, {} if why == "outside a job" else JOB)
    assert not (here / "calls").exists()
    said = capsys.readouterr().err
    told = {
        "cancelled": "job 17 is COMPLETING: it does not go back into the queue\n",
        "preempted": "job 17 is PREEMPTED: Slurm puts it back into the queue\n",
    }
    assert said == told.get(why, "")


@pytest.mark.parametrize(
    ("told", "back"),
    [
        ("Requeue=1 StartTime=2026-11-21T21:27:59 PreemptTime=2026-11-21T21:28:40", True),
        ("Requeue=0 StartTime=2026-11-21T21:27:59 PreemptTime=2026-11-21T21:28:40", False),
        ("Requeue=1 StartTime=2026-11-21T21:27:59 PreemptTime=None", False),
        ("Requeue=1 StartTime=2026-11-21T21:27:59 PreemptTime=2026-11-20T01:01:01", False),  # an earlier time
        ("Requeue=1 StartTime=2026-11-21T21:27:59", False),
    ],
)
def test_a_job_that_ends_in_its_grace_time_goes_back_by_itself(told: str, back: bool, here: Path) -> None:
    shown = f"JobState=RUNNING Reason=None PreemptEligibleTime=2026-11-21T21:27:59 {told}"
    fake(here, "scontrol", f'[ "$1" = requeue ] && echo "$@" >>calls || echo "{shown}"')
    run, config = a_run(requeue=False)
    run.stop.write_text("signal")
    go_on(run, config, JOB)
    assert (here / "calls").exists() == back


def test_where_requeueing_fails_the_chained_job_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake(here, "scontrol", "echo 'Requested operation is presently disabled for job 17' >&2; exit 1")
    fake(here, "squeue", "echo '18|18|PENDING|Dependency'")
    run, config = a_run(requeue=True)
    write_json(run.root / "submitted.json", {"jobs": ["17", "18"], "time": 1.0})
    go_on(run, config, JOB)
    said = capsys.readouterr().err
    assert "could not be put back into the queue: Requested operation is presently disabled for job 17" in said
    assert "job 18 goes on with it" in said


def test_else_the_command_to_type_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bin/scontrol").unlink()
    os.environ["PATH"] = str(here / "bin")
    run, config = a_run(requeue=True)
    go_on(run, config, JOB)
    said = capsys.readouterr().err
    assert "there is no scontrol here" in said
    assert "harness submit runs/run" in said
    (run.root / "job.sh").touch()
    go_on(run, config, JOB)
    assert "sbatch runs/run/job.sh" in capsys.readouterr().err
