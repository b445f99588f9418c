"""The HDF5 side of a checkpoint file: the metadata at its beginning. The only module here that creates HDF5 objects.

HDF5 makes the metadata once per schema, in a scratch file without data; `commit` copies it to the beginning of a new
file. The rest of the file is bytes at known places (`layout`), which need no HDF5. The result is what HDF5 itself would
have written, without time stamps, and any HDF5 1.8 or later opens it.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.checkpoint.layout import LARGE, PAGE, USER_BLOCK, Layout, lay_out
from harness.checkpoint.pages import aligned
from harness.checkpoint.schema import RESERVED, Leaf
from harness.checkpoint.tensors import Bytes
from harness.errors import Unavailable

DIGESTS = f"{RESERVED}/digest"
SUPERBLOCK = (USER_BLOCK, USER_BLOCK + PAGE)
"""The page without which the file is no HDF5 file. It is written last."""
HEAD_PIECE = 1 << 20
"""Bytes of one write of the head; pieces of zeros are left out."""


def build_head(layout: Layout, aliases: Mapping[str, str], scratch: Path) -> bytes:
    """Bytes [USER_BLOCK, layout.head) of the file: superblock, groups, object headers. Needs h5py, not MPI.

    `scratch` is created and removed. `aliases`: further names of leaves, which become hard links. Raises ValueError
    where the metadata does not fit before `layout.head`: lay out again with more (`fit_head`).
    """
    try:
        _create(layout, aliases, scratch)
        with open(scratch, "rb") as file:
            file.seek(USER_BLOCK)
            return file.read(layout.head - USER_BLOCK)
    finally:
        scratch.unlink(missing_ok=True)


def fit_head(layout: Layout, aliases: Mapping[str, str], scratch: Path) -> tuple[Layout, bytes]:
    """`build_head`, with a larger head where HDF5 needs one. Raises Unavailable where no size helps."""
    problem = ""
    for _ in range(6):
        try:
            return layout, build_head(layout, aliases, scratch)
        except ValueError as error:
            problem = str(error)
            layout = lay_out(layout.leaves, head=2 * layout.head, block=layout.block)
    import h5py

    raise Unavailable(
        f"HDF5 {h5py.version.hdf5_version} does not lay out files as expected: {problem}",
        hint="please report this with the version of HDF5",
    )


@functools.lru_cache(maxsize=1)
def pieces(head: bytes) -> list[tuple[int, Bytes]]:
    """What of the head is not zeros, but for `superblock_page`: (offset in the file, bytes), in memory of its own."""
    memory = aligned(len(head))
    memory[: len(head)] = np.frombuffer(head, np.uint8)
    found = []
    for lo in range(SUPERBLOCK[1] - USER_BLOCK, len(head), HEAD_PIECE):
        piece = memory[lo : min(lo + HEAD_PIECE, len(head))]
        if piece.any():
            found.append((USER_BLOCK + lo, piece))
    return found


def superblock_page(head: bytes) -> bytes:
    """The page that `pieces` leaves out."""
    return head[: SUPERBLOCK[1] - SUPERBLOCK[0]]


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write a whole buffer at a file offset, however many calls that takes. Raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing could be written")
        view, offset = view[written:], offset + written


def read_all(descriptor: int, buffer: Any, offset: int) -> None:
    """Fill a buffer from a file offset. Raises OSError, EOFError where the file ends before."""
    view = memoryview(buffer).cast("B")
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise EOFError(f"the file ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count


def hdf5_type(h5t: Any, dtype: str) -> Any:
    """The HDF5 type of a dtype. bfloat16 is a float of its own, which HDF5 converts and prints; float8 are bytes."""
    if dtype == "bfloat16":
        made = h5t.IEEE_F32LE.copy()
        made.set_fields(15, 7, 8, 0, 7)
        made.set_size(2)
        made.set_precision(16)
        made.set_ebias(127)
        return made
    if dtype == "complex32":
        return h5t.py_create(np.dtype([("r", "<f2"), ("i", "<f2")]))
    name = "uint8" if dtype.startswith("float8") else dtype
    return h5t.py_create(np.dtype(name).newbyteorder("<"), logical=True)


def properties() -> tuple[Any, Any, Any]:
    """HDF5's property lists for a file whose data are written around it: of file access, of a data set, of a link."""
    from h5py import h5d, h5f, h5p, h5t

    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_V18)  # checksummed metadata, no flag that marks a file as open
    access.set_alignment(LARGE, PAGE)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_file_locking(False, True)
    dataset = h5p.create(h5p.DATASET_CREATE)
    dataset.set_layout(h5d.CONTIGUOUS)
    dataset.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    dataset.set_fill_time(h5d.FILL_TIME_NEVER)
    dataset.set_obj_track_times(False)
    link = h5p.create(h5p.LINK_CREATE)
    link.set_char_encoding(h5t.CSET_UTF8)
    return access, dataset, link


def _create(layout: Layout, aliases: Mapping[str, str], path: Path) -> None:
    from h5py import h5d, h5f, h5o, h5p, h5s, h5t

    access, plain, link = properties()
    access.set_meta_block_size(layout.head - USER_BLOCK)
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_userblock(USER_BLOCK)
    creation.set_obj_track_times(False)

    types = {dtype: hdf5_type(h5t, dtype) for dtype in {"uint64", *(leaf.dtype for leaf in layout.leaves)}}
    table = Leaf(DIGESTS, "uint64", ((layout.data_start - layout.head) // 8,))
    file = h5f.create(os.fsencode(path), h5f.ACC_EXCL, creation, access)
    try:
        folders: set[str] = set()
        # The table is first in the file. HDF5 takes it for small or large by its size, at `head` it is in any case.
        for leaf, start in zip((table, *layout.leaves), (layout.head, *layout.starts.tolist()), strict=True):
            _make_folders(file, leaf.name, folders, link)
            space = h5s.create_simple(leaf.shape) if leaf.shape else h5s.create(h5s.SCALAR)
            dataset = h5d.create(file, None, types[leaf.dtype], space, plain)
            h5o.link(dataset, file, leaf.name.encode(), link)
            if leaf.dtype.startswith("float8"):
                _remark(dataset, leaf.dtype)
            if leaf.nbytes and dataset.get_offset() != start:
                raise ValueError(f"{leaf.name} lies at {dataset.get_offset()}, not at {start}")
        for name, target in aliases.items():
            _make_folders(file, name, folders, link)
            file.links.create_hard(name.encode(), file, target.encode(), link)
    finally:
        file.close()
    if (size := os.path.getsize(path)) != max(layout.data_end, layout.data_start):
        raise ValueError(f"the file has {size} bytes, not {layout.data_end}")


def _make_folders(file: Any, name: str, made: set[str], link: Any) -> None:
    parent = name.rpartition("/")[0]
    if not parent or parent in made:
        return
    from h5py import h5g, h5p

    parts = name.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        folder = "/".join(parts[:depth])
        if folder not in made:
            made.add(folder)
            creation = h5p.create(h5p.GROUP_CREATE)
            creation.set_obj_track_times(False)
            h5g.create(file, folder.encode(), lcpl=link, gcpl=creation)


def _remark(dataset: Any, dtype: str) -> None:
    """HDF5 has no such type: the dataset is of bytes, an attribute says what they are."""
    import h5py

    # A text of fixed length lies in the object header; another one would take room among the raw data.
    h5py.AttributeManager(h5py.Dataset(dataset))["dtype"] = np.bytes_(dtype)
