"""A sharded optimizer (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054): each rank steps its slices only.

    sharded = Sharded(named_parameters, shards=group, copies=group, replicas=group, limit=25 << 20)
    optimizer = make_optimizer(sharded.slices_of(parameters), ...)     an ordinary one, of this rank's slices
    ... backward passes; buckets are summed and cut as they fill (reduce-scatter) ...
    sharded.synchronize()         slices have their gradient, `norm` is that of the whole gradient
    sharded.load(); optimizer.step(); sharded.gather()

So a rank has optimizer state for its slices only. The parameters remain the truth: slices are loaded from them before a
step and gathered into them after it. A slice is one-dimensional and of one parameter, whose elements it holds in
row-major order, some or none: an optimizer must treat elements alone (`optim.ELEMENTWISE`).

Reduce-scatters travel during the backward pass; the gathers are over before a step ends, and only overlap each other.
To let them go on under the next forward pass, with a hook before each layer, was tried: on two busy CPU ranks a step
took 0.95 to 1.01 times as long (2 and 8 million parameters), within the noise, and a loss that uses parameters before
the model is called would meet old ones.

Where shards lie within a node (`copies` are the ranks of other nodes that hold the same ones), only the slices travel
between nodes. What is not here: who is in which group (`groups.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.shards import Flat
from harness.errors import ConfigError
from harness.parallel.buckets import Bucket, cut
from harness.parallel.groups import Group
from harness.parallel.reducer import Filling, Reducer, norm_of, wait
from harness.parallel.traffic import allgather_bytes, allreduce_bytes

AT_ONCE = 2
"""Buckets that are gathered at the same time; each needs memory of its size."""


class Sharded(Reducer):
    """As `Reducer`, but the sum of a bucket is left in slices on the ranks of `shards`.

    replicas: all ranks that reduce together: those of `shards`, and the `copies` of each. `settings` are Reducer's.
    Raises ConfigError also where there are more ranks than elements.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        *,
        shards: Group,
        copies: Group,
        replicas: Group,
        **settings: Any,
    ) -> None:
        self._shards, self._copies, self._replicas = shards, copies, replicas
        self._parts: list[_Part] = []
        self._names = {id(parameter): name for name, parameter in parameters}
        super().__init__(parameters, process_set=shards.process_set, **settings)
        self._as_rows.clear()  # a slice has no rows
        if not any(part.holds(shards.size - 1) for part in self._parts):
            raise ConfigError(
                f"parallel.optimizer_shards: so few parameters are no {shards.size} parts", hint="set it to none"
            )

    def slices_of(self, parameters: Sequence[Any]) -> list[Any]:
        """What an optimizer is made of in place of these parameters, or groups of them: named slices.

        What is not trained stays as it is.
        """
        mine = {
            id(parameter): own
            for part in self._parts
            for parameter, own in zip(part.parameters, part.slices, strict=True)
        }

        def named(parameter: Any) -> tuple[str, torch.nn.Parameter]:
            if isinstance(parameter, tuple):
                parameter = parameter[1]
            return self._names[id(parameter)], mine.get(id(parameter), parameter)

        def group(found: Any) -> Any:
            if not isinstance(found, dict):
                return named(found)
            return found | {"params": [named(parameter) for parameter in found["params"]]}

        return [group(found) for found in parameters]

    @property
    def slices(self) -> dict[str, torch.nn.Parameter]:
        """This rank's slice of each parameter that is cut, by the parameter's name."""
        return {name: own for part in self._parts for name, own in zip(part.names, part.slices, strict=True)}

    @property
    def regions(self) -> dict[str, Flat]:
        """Which elements of each parameter this rank's slice holds."""
        return {
            name: Flat(tuple(parameter.shape), lo, hi)
            for part in self._parts
            for name, parameter, (lo, hi) in zip(part.names, part.parameters, part.held, strict=True)
        }

    @torch.no_grad()
    def synchronize(self, norm: bool = True) -> None:
        """Wait until every slice has its sum; agree on the norm, and on what nobody has a gradient of. Collective."""
        import horovod.torch as hvd

        super().synchronize(norm=False)
        if self._copies.size > 1:
            for part in self._parts:
                self.sent += allreduce_bytes(part.share.nbytes, self._copies.size)
                part.handle = hvd.allreduce_async_(
                    part.share, name=f"copies/{part.name}", op=hvd.Sum, process_set=self._copies.process_set
                )
            for part in self._parts:
                part.share, part.handle = wait(part.handle), None
        norms = [norm_of(part.sum) for part in self._parts]
        total = float(torch.linalg.vector_norm(torch.stack(norms)))
        used = [float(slot not in part.unused) for part in self._parts for slot in range(len(part.names))]
        facts = torch.tensor([total**2 / self._copies.size, *used], dtype=torch.float64)
        facts = hvd.allreduce(facts, name="gradients", op=hvd.Sum, process_set=self._replicas.process_set)
        self.norm, users = math.sqrt(facts[0]), iter(facts[1:].tolist())
        for part in self._parts:
            part.deliver([next(users) > 0 for _ in part.names])

    def spoil(self) -> None:
        """Make every rank's part of a gradient that is not finite somewhere not finite, for what looks at its own."""
        for part in self._parts:
            for own in part.slices:
                if own.grad is not None:
                    own.grad.fill_(math.nan)

    @torch.no_grad()
    def load(self) -> None:
        """The slices take their parameters' values."""
        for part in self._parts:
            for own, parameter, (lo, hi) in zip(part.slices, part.parameters, part.held, strict=True):
                if lo < hi:
                    own.copy_(parameter.detach().reshape(-1)[lo:hi])

    @torch.no_grad()
    def gather(self, slices: Mapping[str, Tensor] | None = None) -> None:
        """The parameters take all ranks' slices, or what is given in their place. Collective."""
        for number, part in enumerate(self._parts):
            for ahead in self._parts[number : number + AT_ONCE]:
                if ahead.handle is None:
                    ahead.handle = self._start_gathering(ahead, ahead.buffer if slices is None else ahead.pack(slices))
            whole = wait(part.handle).view(part.buffer.dtype)
            part.handle = None
            for parameter, at in zip(part.parameters, part.bucket.offsets, strict=True):
                parameter.copy_(whole[at : at + parameter.numel()].view(parameter.shape))

    def _start_gathering(self, part: _Part, share: Tensor) -> Any:
        import horovod.torch as hvd

        # Horovod knows no bf16, but bits are bits
        bits = share.view(torch.int16) if share.dtype == torch.bfloat16 else share
        self.sent += allgather_bytes(bits.nbytes, self._shards.size)
        return hvd.allgather_async(bits, name=f"parameters/{part.name}", **self._where)

    def _fill(self, bucket: Bucket, members: Sequence[tuple[str, torch.nn.Parameter]]) -> Filling:
        part = _Part(bucket, members, self._wire, self._shards)
        self._parts.append(part)
        return part

    def _send(self, filling: Filling) -> None:
        import horovod.torch as hvd

        flat = filling.load()
        self.sent += allreduce_bytes(flat.nbytes, self._shards.size) / 2  # the first half of it
        filling.handle = hvd.reducescatter_async(
            flat, name=filling.name, op=hvd.Sum, postscale_factor=self._post, **self._where
        )

    def _receive(self, filling: Filling) -> Tensor:
        assert isinstance(filling, _Part)
        filling.share = wait(filling.handle)
        for parameter in filling.parameters:
            parameter.grad = None
        filling.empty()
        return filling.sum


class _Part(Filling):
    """A bucket, of which this rank steps a slice of each parameter, some of them empty."""

    def __init__(
        self,
        bucket: Bucket,
        members: Sequence[tuple[str, torch.nn.Parameter]],
        wire: torch.dtype | None,
        shards: Group,
    ) -> None:
        super().__init__(bucket, members, wire, shards.size, row_major=True)
        self.length = self.flat.numel() // shards.size
        self.held = self._cut(shards.index)
        self.buffer = torch.zeros(self.length, dtype=self.flat.dtype, device=self.flat.device)
        self.slices = [torch.nn.Parameter(own) for own in self.own(self.buffer)]
        self.share = self.buffer
        """This rank's part of the sum, in the dtype it travels in."""

    def _cut(self, index: int) -> list[tuple[int, int]]:
        sizes = [parameter.numel() for parameter in self.parameters]
        return cut(self.bucket, sizes, index * self.length, (index + 1) * self.length)

    def holds(self, index: int) -> bool:
        """Whether the rank with this number has any element."""
        return any(lo < hi for lo, hi in self._cut(index))

    def own(self, share: Tensor) -> tuple[Tensor, ...]:
        """Views of each parameter's elements in a rank's part of the bucket."""
        sizes = [hi - lo for lo, hi in self.held]
        return torch.split(share, [*sizes, self.length - sum(sizes)])[:-1]

    def pack(self, slices: Mapping[str, Tensor]) -> Tensor:
        """A rank's part of the bucket that holds these, by the parameters' names."""
        share = torch.zeros_like(self.buffer)
        for name, own in zip(self.names, self.own(share), strict=True):
            own.copy_(slices[name])
        return share

    @property
    def sum(self) -> Tensor:
        """The gradients in `share`, without what follows them."""
        return self.share[: sum(hi - lo for lo, hi in self.held)]

    def deliver(self, used: Sequence[bool]) -> None:
        """Give the slices their gradients."""
        for own, gradient, has in zip(self.slices, self.own(self.share.to(self.buffer.dtype)), used, strict=True):
            own.grad = gradient if has else None
        self.share = self.buffer
