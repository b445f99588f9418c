"""Saves behind training hold the state of the moment in which they were asked for, and take little memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import Net, bits, manager, train
from support import needs_mpirun, ranks

from harness.checkpoint import Manager, State
from harness.checkpoint.staging import Staging

SCRIPT = str(Path(__file__).with_name("ranks_memory.py"))


class Slow:
    """The late copies of lazy saves, which alone tell how far they are, take a while. `copied`: when the last ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.5) -> None:
        self.copied = 0.0
        original = Staging.fill

        def fill(staging: Staging, buffers: Any, leaves: Any, reached: Any) -> None:
            if reached is not None:
                time.sleep(seconds)
            original(staging, buffers, leaves, reached)
            if reached is not None:
                self.copied = time.monotonic()

        monkeypatch.setattr(Staging, "fill", fill)


class Trained:
    """A model with BatchNorm that two optimizers share, and one that no optimizer of the state changes."""

    def __init__(self, seed: int = 0) -> None:
        self.model, self.average = Net(seed), Net(seed + 1)
        body = [*self.model.hidden.parameters(), *self.model.norm.parameters()]
        self.first = torch.optim.Adam(body, lr=0.1)
        self.second = torch.optim.SGD(self.model.embedding.parameters(), lr=0.1, momentum=0.9)
        train(self.model, self.first, range(1))
        self.second.step()
        self.state = State(model=self.model, average=self.average, first=self.first, second=self.second)

    def bits(self) -> Any:
        return bits([part.state_dict() for part in (self.model, self.average, self.first, self.second)])


@pytest.mark.parametrize("fenced", [True, False])
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_lazy_save_is_of_the_moment_of_the_call(
    name: str, fenced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, slow = Trained(), Slow(monkeypatch)
    if not fenced:  # to see that it is the fence that does it
        monkeypatch.setattr(Manager, "fence", lambda _: None)
    saver = manager(tmp_path, background=True, lazy=True)
    expected = work.bits()
    saver.save(1, work.state)
    words = torch.arange(8)
    torch.nn.functional.cross_entropy(work.model(words), words).backward()  # changes the running statistics at once
    with torch.no_grad():
        work.average.hidden.weight.add_(1)
    assert not slow.copied, "neither the call nor the forward and backward pass wait for it"
    getattr(work, name).step()
    assert fenced == (0 < slow.copied < time.monotonic()), "the optimizer's step waits"
    assert work.bits() != expected
    saver.wait()
    found = Trained(seed=5)
    assert saver.restore(found.state) == 1
    assert (found.bits() == expected) is fenced
    saver.close()


def test_what_no_optimizer_of_the_state_changes_is_copied_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would wait before it changes."""
    Slow(monkeypatch)
    saver = manager(tmp_path, background=True, lazy=True)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = bits(model.state_dict())
    saver.save(1, State(model=model))
    train(model, optimizer, range(1))
    assert bits(model.state_dict()) != expected
    found = Net(seed=5)
    assert saver.restore(State(model=found)) == 1
    assert bits(found.state_dict()) == expected
    saver.close()


def test_steps_go_on_while_the_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager saves: whatever changes after the call is not seen."""
    from harness.checkpoint.engines.output import Output

    original, trained = Output.write, threading.Event()
    monkeypatch.setattr(Output, "write", lambda *args: (trained.wait(60), original(*args))[1])
    saver = manager(tmp_path, background=True)
    work = Trained()
    expected = work.bits()
    saver.save(1, work.state)
    train(work.model, work.first, range(3))
    assert work.bits() != expected and saver._saver._running is not None and not saver._saver._running.done()
    trained.set()
    saver.wait()
    found = Trained(seed=5)
    assert saver.restore(found.state) == 1 and found.bits() == expected
    saver.close()


@pytest.mark.mpi
@needs_mpirun
def test_memory_of_a_save_on_two_ranks(tmp_path: Path) -> None:
    done = ranks(2, [SCRIPT, str(tmp_path)])
    assert done.returncode == 0 and "memory ok" in done.stdout, done.stdout + done.stderr
