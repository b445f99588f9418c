"""Ways to move bytes into the file. Both make the same file. An engine writes data; it neither creates nor commits.

`direct` writes byte ranges with plain positioned writes. `mpio` writes hyperslabs through HDF5's MPI-IO driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from harness.checkpoint.comm import Comm
from harness.checkpoint.layout import Layout
from harness.checkpoint.staging import Image
from harness.errors import Unavailable

EngineName = Literal["auto", "direct", "mpio"]


class Engine(Protocol):
    """A way to write.

    `superblock_first`: the file must be a whole HDF5 file before `write`; otherwise it becomes one at the commit.
    `background`: `write` may run in any thread, beside the training; otherwise in the main thread only.
    `reason`: in a few words, why it was chosen.
    """

    name: str
    superblock_first: bool
    background: bool
    reason: str

    def write(self, path: Path, layout: Layout, images: Iterable[Image], comm: Comm) -> dict[int, int]:
        """Write this rank's images (`Staging`) and make them durable. Returns the digest of each block, by number.

        Called by all ranks; a rank that raises keeps no other from returning.
        """
        ...


def choose(name: EngineName, comm: Comm, log: Callable[[str], None]) -> Engine:
    """The engine of that name. auto: direct, which works wherever all ranks see the same directory.

    Raises Unavailable where it cannot work here: the same on all ranks.
    """
    from harness.checkpoint.engines.direct import Direct
    from harness.checkpoint.engines.mpio import Mpio, unavailable

    if name in ("auto", "direct"):
        return Direct()
    if name != "mpio":
        raise Unavailable(f"there is no checkpoint engine {name!r}", hint="use auto, direct or mpio")
    if reason := unavailable(comm):
        raise Unavailable(f"the checkpoint engine mpio cannot be used: {reason}", hint="use direct, or auto")
    return Mpio(log)
