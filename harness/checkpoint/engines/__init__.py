"""Ways to move bytes into the file. All make the same file. An engine writes data; it neither creates nor commits.

`direct` writes byte ranges with plain positioned writes. `mpio` writes them through MPI-IO, each rank by itself;
`mpio-collective` does so with collective transfers, for file systems that gather them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from harness.checkpoint.comm import Comm
from harness.checkpoint.engines.output import Io
from harness.checkpoint.layout import Layout
from harness.checkpoint.staging import Image
from harness.errors import Unavailable

EngineName = Literal["auto", "direct", "mpio", "mpio-collective"]


class Engine(Protocol):
    """A way to write.

    `background`: `write` may run in any thread, beside the training; otherwise in the main thread only.
    `reason`: in a few words, why it was chosen: "direct: ...".
    """

    name: str
    background: bool
    reason: str

    def write(self, path: Path, layout: Layout, images: Iterable[Image], comm: Comm) -> dict[int, int]:
        """Write this rank's images (`Staging`) and make them durable. Returns the digest of each block, by number.

        Called by all ranks; a rank that raises keeps no other from returning. The images' memory must begin at a page
        and must not change meanwhile. Raises OSError, with the path as its file name, and others.
        """
        ...


def choose(
    name: EngineName,
    comm: Comm,
    log: Callable[[str], None],
    *,
    directory: Path | None = None,
    io: Io = "auto",
) -> Engine:
    """The engine of that name. auto: direct, wherever that is safe, which is everywhere that we know of.

    `directory`: where the checkpoints go; its file system is part of the reason, and a warning where it is not made
    for this. `io`: how direct writes (`output.Io`). Raises Unavailable where the engine cannot work here: the same on
    all ranks. Not collective.
    """
    from harness.checkpoint.engines.direct import Direct
    from harness.checkpoint.engines.filesystem import LOCAL, UNSUITED, filesystem
    from harness.checkpoint.engines.mpio import Mpio, unavailable

    if name not in ("auto", "direct", "mpio", "mpio-collective"):
        raise Unavailable(f"there is no checkpoint engine {name!r}", hint="use auto, direct, mpio or mpio-collective")
    kind = None if directory is None else filesystem(directory)
    if kind in UNSUITED and comm.size > 1:
        log(f"warning: {directory} is on {kind}, which is not made for one file that several computers write at once")
    if name.startswith("mpio"):
        if problem := unavailable(comm):
            raise Unavailable(f"the checkpoint engine mpio cannot be used: {problem}", hint="use direct, or auto")
        return Mpio(log, f"{name}: it was asked for", collective=name == "mpio-collective")
    if name == "direct":
        return Direct("direct: it was asked for", io=io)
    # mpio is not faster by design: it moves the same ranges, and holds the main thread.
    where = "" if kind is None else f" on {kind}" + (", which one computer sees" if kind in LOCAL else "")
    other = unavailable(comm) or "it would keep the training waiting"
    return Direct(f"direct: ranks write whole blocks of their own{where}; not mpio: {other}", io=io)
