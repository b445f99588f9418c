"""Plain positioned writes: no MPI, no HDF5 and no lock while bytes move. Works with any launcher, and with none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from harness.checkpoint.comm import Comm
from harness.checkpoint.digest import block_digests
from harness.checkpoint.file import write_all
from harness.checkpoint.layout import Layout
from harness.checkpoint.staging import Image


class Direct:
    """See `Engine`. Needs one thing: that all ranks see the same file."""

    name = "direct"
    superblock_first = False
    background = True

    def __init__(self, reason: str = "it works everywhere") -> None:
        self.reason = reason

    def write(self, path: Path, layout: Layout, images: Iterable[Image], comm: Comm) -> dict[int, int]:
        digests: dict[int, int] = {}
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for image in images:
                digests.update(enumerate(block_digests(image.data, layout.block), start=image.block))
                write_all(descriptor, image.data, image.offset)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        return digests
