"""Ranks of short jobs: what they print is heard at once, and they end when time is up or somebody ends the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from harness.config import Config
from launch.plan import Plan, make_plan
from launch.ranks import run_ranks


@pytest.fixture
def plan() -> Plan:
    """One rank without MPI."""
    document = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 1}}
    return make_plan(Config.model_validate({**document, "launch": {"launcher": "local", "ranks": 1}}), [])


def test_lines_are_heard_while_it_runs_and_the_others_are_kept(plan: Plan, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    program = (
        "import os, sys, time\n"
        "print('mine 1', flush=True)\n"
        f"while not os.path.exists({str(flag)!r}): time.sleep(0.01)\n"
        "print('mine 2\\nother'); print('no end', end='', file=sys.stderr); sys.exit(3)"
    )
    heard = []

    def hear(line: str) -> bool:
        heard.append(line)
        flag.touch()  # the program goes on only after its first line was heard
        return line.startswith("mine")

    ended = run_ranks(plan, ["-c", program], heard=hear, timeout=60)
    assert heard == ["mine 1", "mine 2", "other", "no end"]
    assert ended.output == "other\nno end\n"
    assert ended.returncode == 3 and not ended.late


@pytest.mark.parametrize("limit", ["timeout", "silence"])
def test_it_ends_when_time_is_up(plan: Plan, limit: str) -> None:
    began = time.monotonic()
    ended = run_ranks(plan, ["-c", "import time; print('x', flush=True); time.sleep(100)"], **{limit: 1.0})
    assert ended.late and ended.output == "x\n" and time.monotonic() - began < 30


def test_a_rank_that_talks_is_not_silent(plan: Plan) -> None:
    program = "import time\nfor i in range(12): print(i, flush=True); time.sleep(0.1)"
    ended = run_ranks(plan, ["-c", program], silence=10.0)
    assert not ended.late and ended.output.split() == [str(i) for i in range(12)]


def test_a_program_that_is_not_there_is_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/absent/python")
    ended = run_ranks(plan, [])
    assert ended.returncode == 127 and "/absent/python cannot be started" in ended.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_ranks_first(number: signal.Signals, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    rank = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); print('up', flush=True); time.sleep(100)"
    script = tmp_path / "command.py"
    script.write_text(
        "from harness.config import Config\nfrom launch.plan import make_plan\nfrom launch.ranks import run_ranks\n"
        "document = {'name': 'x', 'task': {'name': 'linear'}, 'train': {'steps': 1, 'global_batch': 1},\n"
        "            'launch': {'launcher': 'local', 'ranks': 1}}\n"
        "plan = make_plan(Config.model_validate(document), [])\n"
        f"try:\n    run_ranks(plan, ['-c', {rank!r}], heard=lambda line: print(line, flush=True) is None)\n"
        "finally:\n    print('cleaned', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "up\n"
        command.send_signal(number)
        rest, _ = command.communicate(timeout=60)
    assert rest == "cleaned\n" and command.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
