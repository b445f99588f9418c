"""Local steps: ranks train on their own for K steps, then their parameters are averaged. K times fewer bytes travel.

    update.step()                 K times: this rank's own gradient, its own optimizer
    update.share(done)            after every K-th: parameters <- their mean over ranks, weighted by samples

With K steps of plain SGD this is local SGD (Stich 2019, arXiv:1805.09767) and federated averaging (McMahan et al. 2017,
arXiv:1602.05629). With `outer`, the mean moves the last shared parameters as a gradient would, through SGD with
Nesterov momentum (DiLoCo, Douillard et al. 2023, arXiv:2311.08105):

    delta = shared - mean;   momentum <- m * momentum + delta;   shared <- shared - lr * (delta + m * momentum)

Between two averages no two ranks have the same model. What others see (evaluations, checkpoints, exports) is the mean
over ranks as of now: `shared()` puts it into the model for a while. A checkpoint holds besides what each rank has of
its own, so that on the same ranks a run goes on in the middle of a round bit for bit; on others, or in another form of
training, it goes on from the mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import PerRank
from harness.parallel.settings import Outer
from harness.parallel.traffic import allreduce_bytes
from harness.update import Step, Update

Path = tuple[str, ...]


class LocalSteps(Update):
    """An `Update` whose gradients stay on their rank. Arguments as for `Update`, and:

    every: steps between two averages. weight: this rank's part of the mean; those of all ranks add up to 1.
    """

    together = False

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ranks: int,
        every: int,
        weight: float,
        outer: Outer | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, ranks=1, **settings)
        self.ranks, self.every, self.weight, self.outer = ranks, every, weight, outer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in held}
        self._shared = {} if outer is None else {name: p.detach().clone() for name, p in self._live.items()}
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in self._shared.items()}
        self._own: dict[str, Any] = {}
        self._equal = True
        """All ranks have the same parameters."""

    def step(self) -> Step:
        """This rank's step by its own gradient. What is not finite is known to this rank only. Not collective."""
        for parameter in self._live.values():
            if parameter.grad is None:  # else only some ranks would have an optimizer's state for it
                parameter.grad = torch.zeros_like(parameter)
        self._equal = False
        return super().step()

    @torch.no_grad()
    def share(self, done: int) -> None:
        """After step `done`: where a round ends, all ranks get the same parameters. Collective then."""
        if done % self.every:
            return
        means = self._mean(list(self._live.values()), "local/parameters")
        for (name, parameter), mean in zip(self._live.items(), means, strict=True):
            if self.outer is not None:
                delta = self._shared[name] - mean
                self._momentum[name].mul_(self.outer.momentum).add_(delta)
                delta.add_(self._momentum[name], alpha=self.outer.momentum)
                mean = self._shared[name].sub_(delta, alpha=self.outer.lr)
            parameter.copy_(mean)
        self._equal = True

    @contextmanager
    def shared(self, *, state: bool = False) -> Iterator[None]:
        """In the block the model has the mean over ranks, and the optimizer too with `state`. Collective."""
        live: dict[Path, Tensor] = {}
        if not self._equal:  # the mean of equal numbers may differ from them in the last bit
            live = {("parameters", name): parameter for name, parameter in self._live.items()}
        if state:
            live |= self._states()
        own = {path: tensor.detach().clone() for path, tensor in live.items()}
        with torch.no_grad():
            for tensor, mean in zip(live.values(), self._mean(list(live.values()), "local/now"), strict=True):
                tensor.copy_(mean)
        self._own = nested(own)
        try:
            yield
        finally:
            self._own = {}
            _copy(own, live)

    def entries(self) -> dict[str, Any]:
        """What a checkpoint holds besides; in a block of `shared(state=True)`, or to restore into."""
        outer = {"shared": self._shared, "momentum": self._momentum} if self.outer is not None else {}
        return {"local": PerRank(self._own), **outer}

    def restored(self, step: int, loaded: Collection[str]) -> None:
        """After a restore of `entries()`, at this step: each rank takes what was its own. Local.

        loaded: names of what the checkpoint held. Other forms of training have no `shared` in theirs.
        """
        if not any(name.startswith("shared/") for name in loaded):
            _copy({(name,): self._live[name] for name in self._shared}, {(n,): t for n, t in self._shared.items()})
        own, self._own = dict(flat(self._own)), {}
        self._equal = step % self.every == 0
        live = self._states() | {("parameters", name): parameter for name, parameter in self._live.items()}
        _copy(own, live)

    def _states(self) -> dict[Path, Tensor]:
        return {
            ("optimizer", name, key): value
            for name, parameter in self._live.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }

    def _mean(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """The weighted mean over ranks of each tensor, the same bits on all ranks. Collective."""
        if self.ranks == 1:
            return list(tensors)
        import horovod.torch as hvd

        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for number, tensor in enumerate(tensors):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(number)
        means = list(tensors)
        for at, ((dtype, _), numbers) in enumerate(kinds.items()):
            parts = [tensors[number].detach().reshape(-1) for number in numbers]
            packed = torch.cat(parts).to(torch.float32 if dtype == torch.bfloat16 else dtype)  # Horovod has no bf16
            packed.mul_(self.weight)
            hvd.synchronize(hvd.allreduce_async_(packed, name=f"{name}/{at}", op=hvd.Sum))
            self._steps_sent += allreduce_bytes(packed.nbytes, self.ranks)
            for number, mean in zip(numbers, torch.split(packed, [len(part) for part in parts]), strict=True):
                means[number] = mean.view(tensors[number].shape).to(dtype)
        return means


def nested(tensors: Mapping[Path, Tensor]) -> dict[str, Any]:
    """Dicts in dicts.

    >>> nested({("a", "b"): 1, ("a", "c"): 2})
    {'a': {'b': 1, 'c': 2}}
    """
    made: dict[str, Any] = {}
    for path, tensor in tensors.items():
        place = made
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = tensor
    return made


def flat(tree: Mapping[str, Any], root: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The reverse of `nested`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*root, key))
        else:
            yield (*root, key), value


@torch.no_grad()
def _copy(source: Mapping[Path, Tensor], target: Mapping[Path, Tensor]) -> None:
    for path, tensor in source.items():
        target[path].copy_(tensor)
