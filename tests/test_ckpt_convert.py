"""`harness ckpt export` and `import`: what they print and answer; wrong input is a sentence and an exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support import ROOT

from harness.checkpoint import Manager, Single, State, open_checkpoint
from launch import cli


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two checkpoints of a model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    manager = Manager(tmp_path / "exp" / "checkpoints", Single(), background=False)
    for step in (10, 20):
        manager.save(step, State(model=model(step), optimizer=torch.optim.SGD(model(step).parameters(), momentum=0.5)))
    manager.close()
    return tmp_path / "exp"


def model(value: float) -> torch.nn.Module:
    made = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(made.weight, value)
    torch.nn.init.constant_(made.bias, -value)
    return made


def ask(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = cli.execute(["ckpt", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_export_by_suffix_and_by_name(run: Path, capsys: Any) -> None:
    assert ask(capsys, "export", "exp", "a.safetensors") == (0, "wrote a.safetensors: 2 tensors, 32 B\n", "")
    other = model(0)
    other.load_state_dict(safetensors.torch.load_file("a.safetensors"))
    assert other.weight.tolist() == [[20.0] * 3] * 2
    assert ask(capsys, "export", "exp@10", "b", "--to", "torch")[0] == 0
    assert torch.load("b", weights_only=True)["bias"].tolist() == [-10.0, -10.0]
    assert (
        ask(capsys, "export", "exp@latest", "c.npz", "--only", "model/w*", "--only", "*/bias", "--strip", "mod")[0] == 0
    )
    with np.load("c.npz") as file:
        assert sorted(file.files) == ["el/bias", "el/weight"]
    code, out, err = ask(capsys, "export", "exp", "d.npz", "--dtype", "bf16", "--json")
    assert code == 0 and err == ""
    told = json.loads(out)
    assert told == {
        "path": "d.npz",
        "tensors": 2,
        "nbytes": 32,
        "notes": ["npz has no bfloat16: 2 tensors are stored as float32, every value as it was"],
    }
    assert ask(capsys, "export", "exp", "d.npz", "--dtype", "bf16", "--force")[2].startswith(
        "note: npz has no bfloat16"
    )


def test_import_makes_a_checkpoint_beside_the_others(run: Path, capsys: Any) -> None:
    safetensors.torch.save_file({f"module.{k}": v for k, v in model(5).state_dict().items()}, "m.safetensors")
    code, out, err = ask(capsys, "import", "m.safetensors", "exp", "--step", "30", "--strip", "module.")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"made exp/checkpoints/step-00000030: 2 tensors, 32 B\n", out)
    other = model(0)
    assert Manager("exp/checkpoints", Single()).restore(State(model=other)) == 30
    assert other.bias.tolist() == [-5.0, -5.0]
    code, out, err = ask(
        capsys, "import", "m.safetensors", "exp", "--as", "teacher", "--kind", "tensors", "--step", "15"
    )
    assert code == 0 and err == "note: it is not the newest: a restore takes step-00000030\n"
    with open_checkpoint("exp/checkpoints/step-00000015") as checkpoint:
        assert checkpoint.names() == ["teacher/module.bias", "teacher/module.weight"]
    code, out, _ = ask(capsys, "import", "m.safetensors", "new/place", "--json")
    assert code == 0 and json.loads(out)["path"] == "new/place/step-00000000"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export"], 64, "missing argument"),
        (["export", "exp"], 64, "missing argument 'OUT'"),
        (["export", "exp", "x.what"], 64, "format of x.what is not clear from its name\n  name one: safetensors, npz"),
        (["export", "exp", "x", "--to", "zip"], 64, "there is no format 'zip'"),
        (["export", "exp", "x.pt", "--dtype", "int4"], 64, "use one of bf16, fp16, fp32"),
        (["export", "exp", "old.pt"], 64, "old.pt is there already\n  give --force"),
        (["export", "exp", "exp/checkpoints/step-00000020/data.h5", "--force"], 64, "lies in the checkpoint itself"),
        (["export", "exp", "no/x.pt"], 66, "there is no directory no"),
        (["export", "exp", "x" * 300 + ".pt"], 74, "was not written: File name too long"),
        (["export", "exp", "/proc/x.pt"], 74, "kB to spare; 0 B are free"),
        (
            ["export", "exp", "x.pt", "--only", "nothing/*"],
            66,
            "no tensor is called nothing/*\n  the names begin with: model",
        ),
        (["export", "exp@33", "x.pt"], 66, "there is no checkpoint of step 33"),
        (["export", "nowhere", "x.pt"], 66, "there is no directory nowhere"),
        (["import", "x.pt"], 64, "missing argument 'DIRECTORY'"),
        (["import", "x.pt", "exp"], 66, "there is no x.pt"),
        (["import", "old.pt", "exp"], 65, "old.pt is no ZIP file"),
        (["import", "old.pt", "exp", "--from", "safetensors"], 65, "is no safetensors file"),
        (["import", "old.pt", "exp", "--step", "-1"], 64, "invalid value for '--step'"),
        (["import", "old.pt", "exp", "--kind", "thing"], 64, "use module, or tensors"),
        (["import", "old.pt", "exp/checkpoints/step-00000020"], 64, "is one checkpoint; give the directory"),
        (["import", "old.pt", "old.pt"], 65, "no ZIP file"),
        (["import", "good.npz", "old.pt"], 74, "old.pt"),
    ],
)
def test_wrong_requests(run: Path, capsys: Any, arguments: list[str], code: int, words: str) -> None:
    Path("old.pt").write_text("old")
    np.savez("good.npz", a=np.ones(1))
    before = sorted(run.rglob("step-*"))
    found, out, err = ask(capsys, *arguments)
    assert (found, out) == (code, ""), err
    assert words in err and "Traceback" not in err
    assert Path("old.pt").read_text() == "old" and not Path("x.pt").exists()
    assert sorted(run.rglob("step-*")) == before


def test_damage_is_65_and_leaves_what_was_there(run: Path, capsys: Any) -> None:
    data = run / "checkpoints" / "step-00000020" / "data.h5"
    with open_checkpoint(data.parent) as checkpoint:
        layout = checkpoint.manifest.layout
    content = bytearray(data.read_bytes())
    content[int(layout.starts[0])] ^= 1
    data.write_bytes(content)
    Path("x.pt").write_text("old")
    code, _, err = ask(capsys, "export", "exp", "x.pt", "--force")
    assert code == 65 and "is damaged" in err and Path("x.pt").read_text() == "old"
    assert sorted(os.listdir()) == ["exp", "x.pt"]


@pytest.mark.parametrize("out", ["x.safetensors", "x.h5"])
def test_neither_torch_nor_mpi_is_started(run: Path, out: str) -> None:
    program = """
import sys
from launch.cli import execute
codes = [execute(["ckpt", *words.split()]) for words in sys.argv[1:]]
from mpi4py import MPI
print(codes, "torch" in sys.modules, MPI.Is_initialized())
"""
    words = [f"export exp {out}", f"import {out} again"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0] False False", done.stdout + done.stderr


def test_a_progress_bar_on_a_terminal_only(run: Path) -> None:
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-c",
        "import sys; from launch.cli import main; main()",
        "ckpt",
        "export",
        "exp",
        "x.npz",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=slave, text=True, timeout=60)
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert done.returncode == 0 and done.stdout == "wrote x.npz: 2 tensors, 32 B\n"
    assert "x.npz" in shown and "32/32 bytes" in shown
