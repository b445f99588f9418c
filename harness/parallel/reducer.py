"""Gradients summed over ranks while the backward pass still computes others.

    reducer = Reducer(named_parameters, limit=25 << 20)
    reducer.expect()             the next backward pass is the last one of this step
    loss.backward()              a bucket that is full starts to travel at once
    reducer.synchronize()        wait: every .grad is now the sum over all ranks

A parameter's fresh gradient is copied into its bucket once, and `.grad` is a view of the bucket from then on; nothing
is packed or unpacked. Ranks need not use the same parameters: what a rank has no gradient of counts as zeros, and what
no rank has a gradient of has none afterwards, as with one rank.

What is not here: averaging (`update.py` scales the loss), and what is done with the sum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from harness.errors import ConfigError
from harness.parallel.buckets import Bucket, Piece, plan_buckets
from harness.parallel.traffic import allgather_bytes, allreduce_bytes

PATIENCE = 20e-6, 400e-6
"""Seconds between the first two looks at a reduction, and at most; the pause doubles.

Horovod's own wait spins, and takes the core from the thread that moves the bytes.
"""
REDUCIBLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Reducer:
    """Sums the gradients of these parameters, given by name in the model's order, over the ranks of a process set.

    limit: bytes of a bucket. wire: the dtype in which gradients travel; unset: their own, for bf16, which Horovod does
    not know, fp32. rows: names of parameters with sparse gradients, whose rows travel instead; with `dense` they travel
    as dense ones. post: a factor for the sum. Raises ConfigError where a dtype cannot be reduced.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        *,
        limit: int,
        wire: torch.dtype | None = None,
        rows: frozenset[str] = frozenset(),
        dense: bool = False,
        post: float = 1.0,
        process_set: Any = None,
    ) -> None:
        import horovod.torch as hvd

        trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad and parameter.numel()]
        for name, parameter in trained:
            if parameter.dtype not in REDUCIBLE:
                raise ConfigError(f"parameter {name} is of {parameter.dtype}, whose gradient Horovod cannot reduce")
        self._where = {"process_set": process_set or hvd.global_process_set}
        self._wire = wire
        self._post = post
        self._ranks = self._where["process_set"].size()
        self.sent = 0.0
        """Bytes that this rank has sent to others, at least."""
        self.norm = math.nan
        """L2 norm of all gradients of the last step, as they were summed, where it was asked for."""
        self._expected = False
        in_buckets = [(name, parameter) for name, parameter in trained if dense or name not in rows]
        pieces = [Piece(p.numel(), (p.dtype, p.device), p.element_size()) for _, p in in_buckets]
        self._buckets = [
            self._fill(bucket, [in_buckets[number] for number in bucket.members])
            for bucket in plan_buckets(pieces, limit)
        ]
        self._rows = [_Rows(name, parameter) for name, parameter in trained if name in rows and not dense]
        self._as_rows = [parameter for name, parameter in in_buckets if name in rows]
        self._hooks: list[RemovableHandle] = []
        for number, filling in enumerate(self._buckets):
            filling.name = f"gradients/{number}"
            for slot, parameter in enumerate(filling.parameters):
                self._hooks.append(_when_ready(parameter, self._hook(filling, slot)))
        for sparse in self._rows:
            self._hooks.append(_when_ready(sparse.parameter, self._rows_hook(sparse)))

    def expect(self) -> None:
        """The next backward pass is the last of this step: its gradients travel."""
        self._expected = True

    @torch.no_grad()
    def synchronize(self, norm: bool = True) -> None:
        """Wait until all gradients are summed, and take the `norm` if asked. Collective.

        Ranks may have used different parameters.
        """
        for rows in self._rows:
            if not rows.handles:
                self._send_rows(rows)
        for filling in self._buckets:
            if filling.handle is None:
                self._send(filling)
        norms = [torch.zeros((), dtype=torch.float64)]
        for rows in self._rows:
            if (values := self._receive_rows(rows)) is not None and norm:
                norms.append(norm_of(values))
        for filling in self._buckets:
            summed = self._receive(filling)
            if norm:  # while the next buckets travel
                norms.append(norm_of(summed))
        for parameter in self._as_rows:  # as the optimizer gets it on one rank
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to_sparse(1)
        if norm:
            self.norm = float(torch.linalg.vector_norm(torch.stack([value.to(norms[-1].device) for value in norms])))
        self._expected = False

    def close(self) -> None:
        """Let go of the parameters: their gradients stay on their rank, and another Reducer can have them. Local."""
        for hook in self._hooks:
            hook.remove()

    def _fill(self, bucket: Bucket, members: Sequence[tuple[str, torch.nn.Parameter]]) -> Filling:
        return Filling(bucket, members, self._wire)

    def _hook(self, filling: Filling, slot: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            filling.keep(slot)
            if self._expected:
                filling.arrived(slot)
                if not filling.missing:
                    self._send(filling)

        return arrived

    def _rows_hook(self, rows: _Rows) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if self._expected:
                self._send_rows(rows)

        return arrived

    def _send(self, filling: Filling) -> None:
        import horovod.torch as hvd

        flat = filling.load()
        self.sent += allreduce_bytes(flat.nbytes, self._ranks)
        filling.handle = hvd.allreduce_async_(
            flat, name=filling.name, op=hvd.Sum, postscale_factor=self._post, **self._where
        )

    def _receive(self, filling: Filling) -> Tensor:
        """The bucket's gradients, summed."""
        wait(filling.handle)
        filling.unload()
        return filling.flat[: filling.bucket.elements]

    def _send_rows(self, rows: _Rows) -> None:
        import horovod.torch as hvd

        for what, tensor in zip(("rows", "values"), rows.load(), strict=True):
            self.sent += allgather_bytes(tensor.nbytes, self._ranks)
            rows.handles.append(hvd.allgather_async(tensor, name=f"gradients/{rows.name}/{what}", **self._where))

    def _receive_rows(self, rows: _Rows) -> Tensor | None:
        """The rows' values, summed; None where there are none."""
        index, values = (wait(handle) for handle in rows.handles)
        return rows.unload(index, values * self._post if self._post != 1.0 else values)


def wait(handle: Any) -> Tensor:
    """The result of a Horovod operation, without keeping a core busy meanwhile. Collective."""
    import horovod.torch as hvd

    pause, longest = PATIENCE
    while not hvd.poll(handle):
        time.sleep(pause)
        pause = min(2 * pause, longest)
    result: Tensor = hvd.synchronize(handle)
    return result


def travels_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which Horovod reduces tensors of this one."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def norm_of(tensor: Tensor) -> Tensor:
    """L2, fp64, summed in fp32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
    return norm.double()


def _when_ready(parameter: torch.nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


class Filling:
    """One bucket's memory. After the gradients it has an element per parameter: how many ranks have its gradient.

    multiple: of what its length is to be. row_major: how its gradients lie; else as their parameters do.
    """

    def __init__(
        self,
        bucket: Bucket,
        members: Sequence[tuple[str, torch.nn.Parameter]],
        wire: torch.dtype | None,
        multiple: int = 1,
        *,
        row_major: bool = False,
    ) -> None:
        self.bucket = bucket
        self.names = [name for name, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.name = ""
        self.handle: Any = None
        self.missing = set(range(len(members)))
        """Those that have not arrived in the last pass."""
        self.unused: set[int] = set()
        """Those that had no gradient in this step, on this rank."""
        first = self.parameters[0]
        length = -(-(bucket.elements + len(members)) // multiple) * multiple
        self.flat = torch.zeros(length, dtype=first.dtype, device=first.device)
        self.users = self.flat[bucket.elements : bucket.elements + len(members)]
        self.views = [
            # torch's fused optimizers take a gradient's strides to be its parameter's
            self.flat[at : at + parameter.numel()].view(parameter.shape)
            if row_major
            else self.flat.as_strided(parameter.shape, torch.empty_like(parameter).stride(), at)
            for at, parameter in zip(bucket.offsets, self.parameters, strict=True)
        ]
        wire = wire or travels_as(first.dtype)
        self.wire = self.flat if wire == first.dtype else torch.empty_like(self.flat, dtype=wire)

    def keep(self, slot: int) -> None:
        """Move a fresh gradient into the bucket; one that is there already has been added to."""
        parameter, view = self.parameters[slot], self.views[slot]
        if parameter.grad is not view:
            assert parameter.grad is not None
            view.copy_(parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
            parameter.grad = view

    def arrived(self, slot: int) -> None:
        if slot not in self.missing:
            raise ConfigError(
                f"parameter {self.names[slot]} got its gradient twice in one backward pass",
                hint="activation checkpointing needs use_reentrant=False",
            )
        self.missing.discard(slot)

    def load(self) -> Tensor:
        """What travels. Parameters without a gradient on this rank count as zeros."""
        self.users.fill_(1)
        self.unused = {slot for slot in self.missing if self.parameters[slot].grad is None}
        for slot in self.missing - self.unused:
            self.keep(slot)
        for slot in self.unused:
            self.views[slot].zero_()
            self.users[slot] = 0
            self.parameters[slot].grad = self.views[slot]
        return self.flat if self.wire is self.flat else self.wire.copy_(self.flat)

    def unload(self) -> None:
        if self.wire is not self.flat:
            self.flat.copy_(self.wire)
        if self.unused:
            for slot, users in enumerate(self.users.tolist()):
                if users == 0:
                    self.parameters[slot].grad = None
        self.empty()

    def empty(self) -> None:
        self.missing = set(range(len(self.parameters)))
        self.handle = None


class _Rows:
    """The rows of one sparse gradient."""

    def __init__(self, name: str, parameter: torch.nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.handles: list[Any] = []

    def load(self) -> tuple[Tensor, Tensor]:
        """The numbers of the rows, int64 [n], and their values [n, ...]; each row once."""
        parameter = self.parameter
        if parameter.grad is None:
            none = torch.empty_like(parameter[:0], dtype=travels_as(parameter.dtype))
            return torch.empty(0, dtype=torch.int64, device=parameter.device), none
        grad = parameter.grad if parameter.grad.is_sparse else parameter.grad.to_sparse(1)
        grad = grad.coalesce()
        values = grad.values().to(travels_as(grad.dtype))
        return grad.indices()[0].contiguous(), values.contiguous()

    def unload(self, index: Tensor, values: Tensor) -> Tensor | None:
        """Make the gradient of all ranks' rows; its values, each row once."""
        self.handles.clear()
        if not len(index):
            self.parameter.grad = None
            return None
        values = values.to(self.parameter.dtype)
        self.parameter.grad = torch.sparse_coo_tensor(
            index[None], values, self.parameter.shape, check_invariants=False
        ).coalesce()
        return self.parameter.grad.values()
