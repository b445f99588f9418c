"""torch's optimizers without its compiler do the same, and whole runs do without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from harness.eager import be_deterministic, eager

SAME = """
import inspect, sys, torch
from harness.eager import eager

def train(kind):
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    optimizer = kind([{"params": [first.weight]}, {"params": [second.weight], "lr": 0.02}], lr=0.1)
    for _ in range(5):
        second(first(torch.ones(2, 4))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    return [first.weight.detach(), second.weight.detach()], optimizer.state_dict()

kinds = [getattr(torch.optim, name) for name in
         ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop",
          "Adafactor", "Muon") if hasattr(torch.optim, name)]
spared = [eager(kind) for kind in kinds]
found = [train(kind) for kind in spared]
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
for kind, other, (weights, state) in zip(kinds, spared, found):
    theirs, their_state = train(kind)
    assert all(map(torch.equal, weights, theirs)), kind
    assert str(state) == str(their_state) and repr(other([torch.zeros(2, 2)])) == repr(kind([torch.zeros(2, 2)]))
    assert issubclass(other, kind) and (other.__name__, other.__module__) == (kind.__name__, kind.__module__)
    assert inspect.signature(other) == inspect.signature(kind)
    assert eager(kind) is kind, "it is there now"
print("same")
"""
TASK = """
import sys, torch
from harness.task import Task

class Line(Task):
    def model(self):
        return torch.nn.Linear(3, 1)
    def data(self, split):
        return torch.utils.data.TensorDataset(torch.rand(16, 3), torch.rand(16, 1))
    def loss(self, model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    def export(self, model, directory):
        assert torch.are_deterministic_algorithms_enabled()
        return f"compiler: {[name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules]}"
"""


def test_torchs_own_steps_without_its_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", SAME], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout == "same\n", done.stderr


@pytest.mark.parametrize("optimizer", ["momentum", "torch.optim:NAdam"])
def test_a_run_imports_no_compiler(tmp_path: Path, optimizer: str) -> None:
    (tmp_path / "line.py").write_text(TASK)
    overrides = ["name=x", "task.name=line:Line", "train.steps=4", "train.global_batch=8", "checkpoint.every=2"]
    (tmp_path / "run.yaml").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "harness", "run.yaml", *overrides, "train.ema=0.9", f"optim.name={optimizer}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "compiler: []\n" in done.stdout, done.stdout + done.stderr


def test_what_is_not_torchs_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(torch.optim.SGD):
        pass

    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert eager(Mine) is Mine
    assert eager(torch.optim.SGD) is not torch.optim.SGD
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    assert eager(torch.optim.SGD) is torch.optim.SGD, "a task has imported the compiler"


def test_a_gradient_of_a_step_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    start = torch.ones(2, requires_grad=True)
    moved = start.clone()
    optimizer = eager(torch.optim.SGD)([moved], lr=0.5, differentiable=True)
    moved.grad = torch.ones(2)
    optimizer.step()
    moved.sum().backward()
    assert start.grad is not None and torch.equal(start.grad, torch.ones(2))


@pytest.mark.parametrize("loaded", [False, True])
def test_determinism_is_told_either_way(monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "theirs")
    if loaded:
        import torch._inductor.config as inductor
    else:
        monkeypatch.delitem(sys.modules, "torch._inductor", raising=False)
    for wanted in (True, False):
        be_deterministic(wanted)
        assert torch.are_deterministic_algorithms_enabled() is wanted
        if loaded:
            assert getattr(inductor, "deterministic", wanted) is wanted
        else:
            assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == str(int(wanted))
