"""A live tensor as the bytes of its elements in row-major order: to read from, and to write into.

Both numpy arrays and torch tensors, on any device and with any strides. A contiguous one in host memory is used in
place. Others pass through a copy: of the part that is read (contiguous, on a GPU), or of the whole tensor.

>>> import numpy as np
>>> array = np.arange(4, dtype="<u2")
>>> buffer = Buffer(array)
>>> buffer.dtype, buffer.shape, buffer.read(2, 6).tolist()
('uint16', (4,), [1, 0, 2, 0])
>>> buffer.write(0, np.array([7, 0], np.uint8)); int(array[0])
7
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.checkpoint.schema import ITEMSIZE
from harness.checkpoint.shards import Region, check_local, cuts
from harness.errors import DataError

Bytes = npt.NDArray[np.uint8]

if sys.byteorder != "little":
    raise ImportError("checkpoints are little-endian; this machine is not")


def is_torch(value: object) -> bool:
    """Whether this is a torch tensor. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_tensor(value: object) -> bool:
    """Whether this is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_torch(value)


_NAMES: dict[Any, str] = {}
_OF_NUMPY = {name for name in ITEMSIZE if not name.startswith(("bfloat", "float8", "complex32"))}


def dtype_of(array: Any) -> str:
    """The dtype's name, as in `schema.ITEMSIZE` where it is one that checkpoints know."""
    dtype = array.dtype
    name = _NAMES.get(dtype)
    if name is None:
        name = str(dtype).removeprefix("torch.") if is_torch(array) else dtype.newbyteorder("=").name
        if name in ITEMSIZE:
            _NAMES[dtype] = name
    return name


def new_tensor(kind: str, dtype: str, shape: tuple[int, ...], device: Any = None) -> Any:
    """An array of zeros. kind: "torch" or "numpy"."""
    if kind == "torch":
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
    return np.zeros(shape, numpy_dtype(dtype))


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's type for a dtype. Raises DataError where numpy has none."""
    try:
        return np.dtype(dtype)
    except TypeError:
        raise DataError(f"numpy has no {dtype}") from None


class Buffer:
    """The bytes of one tensor. `name` is for messages. Raises DataError for tensors that cannot be in a checkpoint.

    A save makes one per tensor, while training waits: what only some of them need is worked out when it is asked for.
    """

    __slots__ = ("_copy", "_known", "_missing", "_view", "array", "dtype", "nbytes", "shape")

    def __init__(self, array: Any, name: str = "a tensor") -> None:
        self.array = array if isinstance(array, np.ndarray) else array.detach()
        self.dtype = dtype_of(array)
        self.shape: tuple[int, ...] = tuple(array.shape)
        if problem := _problem(array, self.dtype):
            raise DataError(f"{name} {problem}")
        self.nbytes: int = array.nbytes
        self._known = False
        self._view: Bytes | None = None
        self._copy: Any = None
        self._missing = self.nbytes

    @property
    def _place(self) -> Bytes | None:
        if not self._known:
            self._known, self._view = True, _in_place(self.array)
        return self._view

    @property
    def in_place(self) -> bool:
        """Whether `part` is a view of the tensor's own memory, on the host."""
        return self.device is None and self._place is not None

    @property
    def device(self) -> Any | None:
        """The torch device of a tensor that is not in host memory."""
        return None if isinstance(self.array, np.ndarray) or self.array.is_cpu else self.array.device

    def read(self, lo: int, hi: int) -> Bytes:
        """Bytes [lo, hi): a view where possible, valid until the tensor changes."""
        found = self.part(lo, hi)
        data: Bytes = found if isinstance(found, np.ndarray) else found.cpu().numpy()
        return data

    def part(self, lo: int, hi: int) -> Any:
        """As `read`, but a torch tensor of bytes where the tensor is not in host memory, on its device."""
        if not self._known:
            self._known, self._view = True, _in_place(self.array)
        if self._view is not None:
            return self._view[lo:hi]
        if self._copy is None:
            self._copy = _flat(self.array)
        return self._copy[lo:hi]

    def write(self, lo: int, data: Bytes) -> None:
        """Replace the bytes from `lo` on. Each byte is written once; the tensor has changed when all have been."""
        if (view := self._place) is not None:
            view[lo : lo + len(data)] = data
            return
        self._begin()[lo : lo + len(data)] = data
        self._count(len(data))

    def own(self, lo: int, hi: int) -> Bytes | None:
        """The tensor's own memory of bytes [lo, hi), to write into; None where they have to go through `write`."""
        return None if (view := self._place) is None else view[lo:hi]

    def window(self, shape: tuple[int, ...], window: tuple[slice, ...]) -> Bytes:
        """The bytes `window` of all bytes seen as `shape`: a view where possible."""
        if self._place is None and self._copy is None:
            self._copy = _flat(self.array)
        part = (self._copy if self._place is None else self._place).reshape(shape)[window]
        found: Bytes = part if isinstance(part, np.ndarray) else part.cpu().numpy()
        return found

    def set_window(self, shape: tuple[int, ...], window: tuple[slice, ...], data: Bytes) -> None:
        """Replace these bytes; like `write`."""
        target = self._place if self._place is not None else self._begin()
        target.reshape(shape)[window] = data
        if self._place is None:
            self._count(data.size)

    def release(self) -> None:
        """Drop the copy, where there is one."""
        self._copy = None

    def _begin(self) -> Bytes:
        if self._copy is None:
            self._copy, self._missing = np.empty(self.nbytes, np.uint8), self.nbytes
        copy: Bytes = self._copy
        return copy

    def _count(self, written: int) -> None:
        self._missing -= written
        if self._missing == 0:
            _assign(self.array, self._copy, self.dtype)
            self.release()


class Part:
    """The bytes of a local tensor that is a region of a global one; all offsets are those of the global tensor.

    Raises DataError where the tensor cannot be that region. `box`: the region in bytes.
    """

    def __init__(self, array: Any, region: Region, name: str = "a tensor") -> None:
        check_local(array, region, name)
        self.buffer, self.region = Buffer(array, name), region
        self.box = region.in_bytes(ITEMSIZE[self.buffer.dtype])

    @classmethod
    def of(cls, buffer: Buffer, region: Region, dtype: str) -> Part:
        """A buffer of whatever dtype that takes the bytes of a region of a tensor of this dtype."""
        part = cls.__new__(cls)
        part.buffer, part.region, part.box = buffer, region, region.in_bytes(ITEMSIZE[dtype])
        return part

    def read(self, lo: int, hi: int) -> Bytes:
        """What lies of the region in the tensor's bytes [lo, hi), without gaps."""
        found = [self.buffer.window(self.box.count, cut.target).reshape(-1) for cut in cuts(self.box, lo, hi)]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint8), *found])

    def write(self, lo: int, data: Bytes) -> None:
        """Take what lies of the region in these bytes of the tensor, which begin at `lo`."""
        for cut in cuts(self.box, lo, lo + len(data)):
            source = data[cut.at : cut.at + math.prod(cut.shape)].reshape(cut.shape)
            self.buffer.set_window(self.box.count, cut.target, source[cut.source])

    def own(self, lo: int, hi: int) -> Bytes | None:
        """As that of a buffer: None also where these bytes are not all of the region, without gaps."""
        (first, *inner), (count, *_) = self.box.start, self.box.count
        if inner or not first <= lo <= hi <= first + count:
            return None
        return self.buffer.own(lo - first, hi - first)

    def release(self) -> None:
        self.buffer.release()


def _problem(array: Any, dtype: str) -> str | None:
    if not isinstance(array, np.ndarray):
        if str(array.layout) != "torch.strided":
            return f"has the layout {array.layout}"
        if array.is_meta:
            return "has no data (its device is meta)"
    return None if dtype in ITEMSIZE else f"has the dtype {dtype}, which checkpoints do not know"


def _in_place(array: Any) -> Bytes | None:
    """The tensor's own memory as bytes, None where that is not possible."""
    if isinstance(array, np.ndarray):
        usable = array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative
        return array.reshape(-1).view(np.uint8) if usable else None
    if not array.is_cpu or not array.is_contiguous() or array.is_conj() or array.is_neg():
        return None
    # numpy's own views are several times faster to make than torch's.
    known = dtype_of(array) in _OF_NUMPY
    place: Bytes = array.numpy().reshape(-1).view(np.uint8) if known else _torch_bytes(array).numpy()
    return place


def _flat(array: Any) -> Any:
    """A copy as bytes: numpy, or torch on the tensor's device."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1).view(np.uint8)
    flat = _torch_bytes(array.resolve_conj().resolve_neg().contiguous())
    return flat.numpy() if array.is_cpu else flat


def _torch_bytes(tensor: Any) -> Any:
    import torch

    if not tensor.numel():  # an empty one of numpy has strides that torch does not view as bytes
        return torch.empty(0, dtype=torch.uint8)
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1).view(torch.uint8)


def _assign(array: Any, data: Bytes, dtype: str) -> None:
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise DataError("an array to restore into is read-only")
        array[...] = data.view(np.dtype(dtype)).reshape(array.shape)
        return
    import torch

    with torch.no_grad():
        array.copy_(torch.from_numpy(data).view(array.dtype).reshape(array.shape))
