"""Tensors from one rank to another over MPI, of any dtype and shape. A send does not wait for the one who receives.

    wire.send(x, to=3, tag=7)               on rank 2
    x = wire.receive(2, tag=7)              on rank 3
    wire.finish()                           on both: what was sent has left

What is not here: who sends what to whom (`pipeline.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import ConfigError, Unavailable
from harness.parallel.traffic import Traffic

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
MOST_DIMENSIONS = 8
MOST_BYTES = (1 << 31) - 1
"""MPI counts in 32 bits."""


class Wire:
    """This rank's end, over a communicator of its own. Making one is collective in the world.

    Raises Unavailable where there is no MPI."""

    def __init__(self, mpi: Any | None, device: torch.device) -> None:
        if mpi is None:
            raise Unavailable(
                "parallel.pipeline needs MPI: its ranks talk to each other, which Horovod over Gloo cannot",
                hint="start it with mpirun or srun",
            )
        self._mpi = mpi.Dup()
        self._device = device
        self._sending: list[tuple[Any, Any]] = []  # requests, and what they send
        self.traffic = Traffic()

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        """To a rank of the world. Raises ConfigError for what does not fit into a message."""
        x = tensor.detach().cpu().contiguous()
        if x.dtype not in DTYPES or x.dim() > MOST_DIMENSIONS or x.nbytes > MOST_BYTES:
            raise ConfigError(
                f"a {x.dtype} of shape {list(x.shape)} cannot go from one stage of the pipeline to the next",
                hint=f"tensors of {MOST_DIMENSIONS} dimensions and 2 GiB can; train.micro_batch makes it smaller",
            )
        header = np.zeros(2 + MOST_DIMENSIONS, np.int64)
        header[:2] = DTYPES.index(x.dtype), x.dim()
        header[2 : 2 + x.dim()] = x.shape
        for data in (header, x.view(-1).view(torch.uint8).numpy()):
            self._sending.append((self._mpi.Isend(data, to, tag), data))
            self.traffic.sent += data.nbytes
        self._sending = [(request, data) for request, data in self._sending if not request.Test()]

    def receive(self, source: int, tag: int) -> Tensor:
        """What that rank sent with this tag, on this rank's device. Waits for it."""
        header = np.empty(2 + MOST_DIMENSIONS, np.int64)
        self._mpi.Recv(header, source, tag)
        x = torch.empty(header[2 : 2 + int(header[1])].tolist(), dtype=DTYPES[int(header[0])])
        self._mpi.Recv(x.view(-1).view(torch.uint8).numpy(), source, tag)
        return x.to(self._device)

    def finish(self) -> None:
        """Return once everything has left."""
        for request, _ in self._sending:
            request.Wait()
        self._sending = []
