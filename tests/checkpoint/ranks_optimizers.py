"""Horovod's DistributedOptimizer around every optimizer of torch. Started by `test_checkpoint_state.py`:

python ranks_optimizers.py DIRECTORY

A wrapped optimizer is saved and restored like the one in it: names are those of the parameters, a plain optimizer
takes its state, and training goes on by bits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from samples import OPTIMIZERS, Net, bits

from harness.checkpoint import Manager, State


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    """Steps with a batch of its own on every rank."""
    for step in steps:
        words = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(100 * step + hvd.rank()))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(words), words.roll(1)).backward()
        optimizer.step()


def make(name: str, seed: int) -> dict[str, Any]:
    model = Net(seed)
    optimizer = OPTIMIZERS[name](model.parameters())
    its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = [(n, parameter) for n, parameter in model.named_parameters() if id(parameter) in its]
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in its)
    return {"model": model, "optimizer": hvd.DistributedOptimizer(optimizer, named)}


def of(state: dict[str, Any]) -> Any:
    buffers = {name for name, _ in state["model"].named_buffers()}  # of its own on every rank
    model = {name: tensor for name, tensor in state["model"].state_dict().items() if name not in buffers}
    return bits([model, state["optimizer"].state_dict()])


def main(root: Path) -> None:
    hvd.init()
    torch.set_num_threads(1)
    wrapped = [name for name in OPTIMIZERS if "LBFGS" not in name]  # which Horovod cannot wrap: it needs a closure
    for name in wrapped:
        straight = make(name, 0)
        train(**straight, steps=range(3))
        manager = Manager(root / name.replace(",", ""), background=False, log=lambda line: None)
        manager.save(3, State(**straight))
        resumed = make(name, 1)
        assert manager.restore(State(**resumed)) == 3
        assert of(resumed) == of(straight), name
        straight["model"].norm.load_state_dict(resumed["model"].norm.state_dict())
        for state in (straight, resumed):
            train(**state, steps=range(3, 6))
        assert of(resumed) == of(straight), name
        model = Net(2)
        plain = OPTIMIZERS[name](model.parameters())
        manager.restore(State(model=model, optimizer=plain))
        assert bits(plain.state_dict()["state"]).keys() == bits(straight["optimizer"].state_dict()["state"]).keys()
        manager.close()
    if hvd.rank() == 0:
        print(f"{len(wrapped)} optimizers on {hvd.size()} ranks")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
