"""A checkpoint from tensors that are read part by part: one process, bounded memory, committed like any other.

`Manager.save` holds a copy of what it saves; an import may be larger than memory. So the parts go to their places in
the file as they are read, in the order of the file; layout, digests and commit are those of every checkpoint.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from harness.checkpoint import commit, store
from harness.checkpoint.comm import Json
from harness.checkpoint.convert.tensor import PIECE, Tensor
from harness.checkpoint.digest import Table, block_digests, root
from harness.checkpoint.file import build_head, write_all
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.lease import Lease
from harness.checkpoint.manifest import Manifest, render
from harness.checkpoint.schema import Leaf, check_schema
from harness.checkpoint.space import explain, preflight
from harness.errors import DataError, StorageError


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Sequence[Tensor],
    aliases: Mapping[str, str],
    state: Mapping[str, Json],
    info: Mapping[str, Json],
) -> Path:
    """Commit a checkpoint into `directory`, which is made where it is not there. Returns its path.

    Names are those of leaves. `state`: its entries, as in the manifest. Raises DataError, StorageError; then there is
    no new checkpoint, and the others are as they were. Raises InUse where a job saves there.
    """
    leaves = [Leaf(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    check_schema(leaves, aliases)
    layout = lay_out(leaves, links=aliases)
    lease = Lease.acquire(directory)
    try:
        preflight(directory, layout.data_end)
        name, identity = store.new_name(directory, step), uuid.uuid4().hex
        temporary = directory / f"{name}{commit.TEMPORARY}{identity}"
        temporary.mkdir()
        try:
            head = build_head(layout, aliases)
            commit.begin(temporary, layout)
            commit.put_head(temporary, layout, head)
            table = _fill(temporary / commit.DATA, layout, {tensor.name: tensor for tensor in tensors})
            manifest = Manifest(
                uuid=identity,
                step=step,
                created=time.time(),
                world=1,
                layout=layout,
                table=root(table),
                head=xxhash.xxh3_128_hexdigest(head),
                aliases=dict(aliases),
                state=dict(state),
                info=dict(info),
            )
            if not lease.still_mine():
                raise StorageError(f"another program took over {directory} meanwhile; nothing was imported")
            commit.seal(temporary, layout, head, table, identity, step)
            commit.publish(temporary, directory / name, render(manifest))
        except BaseException:
            commit.abandon(temporary)
            raise
    except OSError as error:
        what, hint = explain(error) or (error.strerror or str(error), None)
        raise StorageError(f"nothing was imported into {directory}: {what}", hint=hint) from error
    finally:
        lease.release()
    return directory / name


def _fill(path: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> Table:
    """Write the tensors and make them durable. Returns the digest of each block."""
    table = np.zeros(layout.blocks, np.uint64)
    step = max(1, PIECE // layout.block)
    image = np.empty(step * layout.block, np.uint8)
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for first in range(0, layout.blocks, step):
            last = min(first + step, layout.blocks)
            lo, hi = layout.span(first, last)
            image[:] = 0
            for piece in layout.pieces(lo, hi):
                leaf = layout.leaves[piece.leaf]
                data = tensors[leaf.name].read(piece.lo, piece.hi)
                if leaf.dtype == "bool" and data.max(initial=0) > 1:
                    raise DataError(f"{leaf.name} is a tensor of bools, but has bytes that are neither 0 nor 1")
                image[piece.offset - lo : piece.offset - lo + len(data)] = data
            table[first:last] = block_digests(image[: hi - lo], layout.block)
            write_all(descriptor, image[: hi - lo], lo)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    return table
