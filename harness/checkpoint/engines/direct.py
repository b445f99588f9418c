"""Plain positioned writes: no MPI, no HDF5 and no lock while bytes move. Works with any launcher, and with none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from harness.checkpoint.comm import Comm
from harness.checkpoint.digest import block_digests
from harness.checkpoint.engines import images
from harness.checkpoint.file import write_all
from harness.checkpoint.layout import Layout
from harness.checkpoint.plan import Plan
from harness.checkpoint.tensors import Buffer


class Direct:
    """See `Engine`. Needs one thing: that all ranks see the same file."""

    name = "direct"
    superblock_first = False

    def write(self, path: Path, layout: Layout, plan: Plan, buffers: Sequence[Buffer], comm: Comm) -> dict[int, int]:
        digests: dict[int, int] = {}
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for block, offset, image in images(layout, plan, buffers):
                digests.update(enumerate(block_digests(image, layout.block), start=block))
                write_all(descriptor, image, offset)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        return digests
