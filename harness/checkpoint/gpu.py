"""Copies from a GPU into host memory: page-locked, on a stream of their own, so that kernels of the training go on.

    gpu.mark()                                  # in the thread that trains: what it has launched so far comes first
    with gpu.copying(memory, devices):
        copy_from_device(parts, memory[a:b])    # started here, complete at the end of the block

Only CUDA (and ROCm, which torch shows under the same name). Tensors on other devices are copied by torch's ordinary
means. Nothing here imports torch before a tensor of torch has come.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from harness.checkpoint.tensors import Bytes


class Gpu:
    """The GPU's view of one piece of host memory. `mark` and `copying` may be called in different threads."""

    def __init__(self) -> None:
        self._ready: dict[Any, Any] = {}  # by device: the event after which its tensors may be read
        self._streams: dict[Any, Any] = {}
        self._locked: tuple[int, int] | None = None  # address and length of the memory that is page-locked

    def mark(self) -> None:
        """Copies that follow wait for what this thread has launched on its current GPU until now, and for no more."""
        cuda = _cuda()
        if cuda is not None:
            stream = cuda.current_stream()
            self._ready = {stream.device: stream.record_event()}

    @contextmanager
    def copying(self, memory: Bytes, devices: Iterable[Any | None]) -> Iterator[None]:
        """Copies into `memory` run beside the training; at the end all are complete. `devices`: of the tensors."""
        cuda = _cuda()
        found = {device for device in devices if device is not None and device.type == "cuda"} if cuda else set()
        if cuda is None or not found:
            yield
            return
        self._lock(cuda, memory)
        streams = [self._stream(cuda, device) for device in found]
        try:
            with ExitStack() as stack:
                for stream in streams:
                    stack.enter_context(cuda.stream(stream))  # for the operations on tensors of its device
                yield
        finally:
            for stream in streams:
                stream.synchronize()

    def close(self) -> None:
        """Before the memory goes away."""
        locked, self._locked = self._locked, None
        cuda = _cuda()
        if locked is not None and cuda is not None:
            cuda.cudart().cudaHostUnregister(locked[0])

    def _stream(self, cuda: Any, device: Any) -> Any:
        """Our stream on a device, behind what has to come before the copies."""
        if device not in self._streams:
            self._streams[device] = cuda.Stream(device)
        stream, ready = self._streams[device], self._ready.get(device)
        if ready is not None:
            stream.wait_event(ready)
        else:  # not the GPU this thread trains on: which streams are used there is not known
            cuda.synchronize(device)
        return stream

    def _lock(self, cuda: Any, memory: Bytes) -> None:
        """Page-lock the memory, once: the GPU then writes to it by itself. Where that is refused, copies are slower.

        Not torch's own page-locked memory: it comes in powers of two, and need not begin at a page.
        """
        wanted = (memory.ctypes.data, memory.nbytes)
        if wanted != self._locked:
            self.close()
            if int(cuda.cudart().cudaHostRegister(*wanted, 0)) == 0:
                self._locked = wanted


def copy_from_device(parts: Sequence[Any], target: Bytes) -> None:
    """Tensors of bytes on one device, one after the other, into host memory; on the current stream of the device."""
    import torch

    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    torch.from_numpy(target).copy_(whole, non_blocking=True)


def _cuda() -> Any | None:
    """torch.cuda where this program uses it."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None
