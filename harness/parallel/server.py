"""A parameter server: the first ranks hold the parameters and the optimizer, the others compute gradients.

    worker:  forward, backward -> push its gradient to every server -> pull the parameters -> ...
    server:  take gradients -> step its part of the parameters -> answer

Each of S servers has an equal slice of the parameters and of the optimizer's state (Li et al. 2014, "Scaling
distributed machine learning with the parameter server"). How far workers may be apart is `staleness`:

    0            all wait for all: one step with the mean of their gradients, as with allreduce
    n            each gradient is a step of its own, with 1/workers of the learning rate; the fastest worker may be n
                 steps ahead of the slowest (stale synchronous parallel, Ho et al. 2013)
    unbounded    the same, and nobody waits for anybody (until the next log line)

All ranks run the same loop. A server's step is over when every worker's is, so that log lines, evaluations and saves
find all ranks at the same step, with no gradient on its way. Messages are mpi4py's, point to point. A checkpoint has
the names and shapes of any other form's.

A worker that dies takes the job with it: the collectives of MPI 3 and of Horovod know no way to go on without a rank.
mpirun then asks the others to end; a server that has been asked and hears nothing more from a worker saves what it has,
with the other servers alone (`rescue.py`), so that nothing is lost but gradients on their way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from harness.checkpoint import Mpi
from harness.errors import Exit, HarnessError
from harness.parallel.vector import Vector
from harness.update import Step, Update

Staleness = int | Literal["unbounded"]
PUSH, PULL = 1, 2
PATIENCE = 50e-6
"""Seconds between two looks for a message; MPI's own wait takes a core."""
SILENCE = 3.0
"""Seconds without a gradient after which a worker counts as lost, where the job is being ended."""


class WorkerLost(HarnessError):
    """The servers have saved the state without a worker that does not answer."""

    code = Exit.STOPPED


class Served(Update):
    """What servers and workers have in common. `servers`: their number. Collective over all ranks of COMM_WORLD."""

    together = False

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, servers: int, **settings: Any
    ) -> None:
        from mpi4py import MPI

        super().__init__(model, optimizer, ranks=1, **settings)
        self.number = MPI.COMM_WORLD.rank
        self.everyone = Mpi(MPI.COMM_WORLD)
        self.wire: Any = self.everyone.mpi
        self.among = Mpi(MPI.COMM_WORLD.Split(int(self.number >= servers), self.number))
        """The servers among themselves, or the workers."""
        self.servers = servers
        self.vector = Vector(optimizer, servers)

    @contextmanager
    def shared(self, *, state: bool = False) -> Iterator[None]:
        """In the block all ranks have the parameters, and with `state` the optimizer's state. Collective."""
        self.gather(self.everyone, state=state)
        try:
            yield
        finally:
            self.optimizer.state.clear()

    def gather(self, comm: Mpi, *, state: bool) -> None:
        """The servers' slices into the model and the optimizer of every rank of `comm`, whose first are the servers."""
        self.vector.fill(self._collect(comm, [part.detach() for part in self.parts()]))
        if not state:
            return
        for key, value in comm.broadcast(self.described()).items():  # type: ignore[union-attr] # servers know what there is
            if value is None:
                self.vector.give(self.optimizer, key, self._collect(comm, self.parts(key)))
            else:
                for group, number in zip(self.vector.groups, value, strict=True):
                    for parameter in group:
                        self.optimizer.state[parameter][key] = torch.tensor(number)

    def restored(self, step: int, loaded: Collection[str]) -> None:
        self.optimizer.state.clear()

    def parts(self, key: str | None = None) -> list[Tensor]:
        """This server's slice of each group's parameters, or of this state of theirs; a worker has none."""
        return []

    def described(self) -> dict[str, list[float] | None]:
        """What state there is: None for one number per element, else one number for each group."""
        return {}

    def _collect(self, comm: Mpi, parts: Sequence[Tensor]) -> list[Tensor]:
        vectors = self.vector.empty()
        for at, (vector, cuts) in enumerate(zip(vectors, self.vector.cuts, strict=True)):
            for server, (begin, end) in enumerate(pairwise(cuts)):
                piece = vector[begin:end]
                if comm.rank == server:
                    piece.copy_(parts[at])
                    self._steps_sent += piece.nbytes * (comm.size - 1)
                comm.mpi.Bcast(piece.numpy(), root=server)  # type: ignore[union-attr]
        return vectors


class Worker(Served):
    """A rank that has samples."""

    def synchronize(self) -> None:
        """Push the gradient and pull the parameters. Waits for the servers."""
        super().synchronize()
        gradients = self.vector.pack(lambda p: torch.zeros_like(p) if p.grad is None else p.grad.to_dense())
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        self._step = Step(None, True, True)
        if self.train.nonfinite != "ignore":
            finite = bool(norm.isfinite())
            self._step = Step(float(norm), finite, finite)
            if not finite:  # so that every server sees it in its slice
                gradients = [torch.full_like(gradient, torch.nan) for gradient in gradients]
        requests, pulled = [], []
        for server in range(self.servers):
            part = self.vector.part(gradients, server)
            pulled.append(torch.empty_like(part))
            requests.append(self.wire.Irecv(pulled[-1].numpy(), source=server, tag=PULL))
            requests.append(self.wire.Isend(part.numpy(), dest=server, tag=PUSH))
            self._steps_sent += part.nbytes
        while not requests[0].Testall(requests):
            time.sleep(PATIENCE)
        self._pulled = pulled

    def step(self) -> Step:
        """Use the parameters that have come."""
        self.vector.fill(self.vector.joined(self._pulled))
        self.optimizer.zero_grad()
        return self._step


class Server(Served):
    """A rank that has a slice. `stopping`: whether this rank was asked to end; `rescue` is called where a worker is
    lost then, and does not return."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        staleness: Staleness,
        stopping: Callable[[], bool],
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, **settings)
        self.rescue: Callable[[], None] = lambda: None
        self._stopping = stopping
        self._limit = float("inf") if staleness == "unbounded" else int(staleness)
        self._workers = self.wire.size - self.servers
        self._clocks = [0] * self._workers
        """Gradients that have come from each worker."""
        self._goal = 0
        self._waiting: dict[int, Tensor | None] = {}
        """Workers without an answer; their gradients, where these are not used yet."""
        self._answers: list[tuple[Any, Tensor]] = []
        self._longest = 0.0
        self._cut()

    def _cut(self) -> None:
        """Take this server's slice of the parameters as they are, with an optimizer that has no state yet."""
        whole = self.vector.pack(lambda p: p.detach())
        self._slices = [
            torch.nn.Parameter(vector[cuts[self.number] : cuts[self.number + 1]].clone())
            for vector, cuts in zip(whole, self.vector.cuts, strict=True)
        ]
        groups = [
            {**group, "params": [piece]} for group, piece in zip(self.optimizer.param_groups, self._slices, strict=True)
        ]
        self.stepper: torch.optim.Optimizer = type(self.optimizer)(groups)  # type: ignore[call-arg] # every optimizer of torch has defaults

    def restored(self, step: int, loaded: Collection[str]) -> None:
        """Take this server's slice of what was restored. Local."""
        self._cut()
        for (piece, cuts), group in zip(
            zip(self._slices, self.vector.cuts, strict=True), self.vector.groups, strict=True
        ):
            for key, value in self.optimizer.state.get(group[0], {}).items():
                if self.vector.elementwise(self.optimizer, key):
                    whole = torch.cat([self.optimizer.state[p][key].reshape(-1) for p in group])
                    self.stepper.state[piece][key] = whole[cuts[self.number] : cuts[self.number + 1]].clone()
                else:
                    self.stepper.state[piece][key] = value
        super().restored(step, loaded)

    def begin(self, factor: float) -> None:
        super().begin(factor)
        for group, base in zip(self.stepper.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor / (1 if self._limit == 0 else self._workers)

    def synchronize(self) -> None:
        """Serve until every worker has pushed the gradient of this step."""
        from mpi4py import MPI

        self._goal += 1
        status, heard = MPI.Status(), time.monotonic()
        buffer = torch.empty(self.vector.length(self.number), dtype=self.vector.dtype)
        while min(self._clocks) < self._goal:
            silent = time.monotonic() - heard
            if self.wire.Iprobe(tag=PUSH, status=status):
                self.wire.Recv(buffer.numpy(), source=status.Get_source(), tag=PUSH)
                self._take(status.Get_source() - self.servers, buffer)
                self._longest, heard = max(self._longest, silent), time.monotonic()
                continue
            self._answers = [(request, kept) for request, kept in self._answers if not request.Test()]
            if self._stopping() and silent > SILENCE + 3 * self._longest:
                self.rescue()
            time.sleep(PATIENCE)
        while self._answers:
            self._answers = [(request, kept) for request, kept in self._answers if not request.Test()]

    def missing(self) -> list[int]:
        """Ranks whose gradient of this step has not come."""
        return [self.servers + worker for worker, clock in enumerate(self._clocks) if clock < self._goal]

    def step(self) -> Step:
        """Nothing is left to do: see `synchronize`."""
        return Step(None, True, True)

    def parts(self, key: str | None = None) -> list[Tensor]:
        if key is None:
            return list(self._slices)
        return [self.stepper.state[piece][key] for piece in self._slices]

    def described(self) -> dict[str, list[float] | None]:
        states = [self.stepper.state.get(piece, {}) for piece in self._slices]
        return {
            key: None if isinstance(value, Tensor) and value.dim() == 1 else [float(state[key]) for state in states]
            for key, value in states[0].items()
            if value is not None
        }

    def _take(self, worker: int, gradient: Tensor) -> None:
        """A worker's gradient, which is only lent."""
        self._clocks[worker] += 1
        if self._limit == 0:
            self._waiting[worker] = gradient.clone()
            if len(self._waiting) < self._workers:
                return
            used = [kept for _, kept in sorted(self._waiting.items()) if kept is not None and self._usable(kept)]
            if used:  # in the order of workers, so that a run repeats by bits
                self._apply(sum(used[1:], used[0]) / self._workers)
        else:
            self._waiting[worker] = None
            if self._usable(gradient):
                self._apply(gradient)
        slowest = min(self._clocks)
        for waiting in [w for w in self._waiting if self._clocks[w] - slowest <= self._limit]:
            del self._waiting[waiting]
            answer = torch.cat([piece.detach() for piece in self._slices])
            self._answers.append((self.wire.Isend(answer.numpy(), dest=waiting + self.servers, tag=PULL), answer))
            self._steps_sent += answer.nbytes

    def _usable(self, gradient: Tensor) -> bool:
        return self.train.nonfinite == "ignore" or bool(gradient.isfinite().all())

    def _apply(self, gradient: Tensor) -> None:
        for piece, part in zip(self._slices, torch.split(gradient, [len(p) for p in self._slices]), strict=True):
            piece.grad = part
        self.stepper.step()
