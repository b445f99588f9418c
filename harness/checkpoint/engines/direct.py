"""Plain positioned writes: no MPI, no HDF5 and no lock while bytes move. Works with any launcher, and with none.

Several threads write, each one image at a time: while one waits for the disk, another one computes digests. Neither
holds Python's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sized
from pathlib import Path

from harness.checkpoint.comm import Comm
from harness.checkpoint.copying import Copying
from harness.checkpoint.digest import block_digests
from harness.checkpoint.engines.output import LARGE_PART, Io, Output
from harness.checkpoint.layout import Layout
from harness.checkpoint.staging import Image

THREADS = 2


class Direct:
    """See `Engine`. Needs one thing: that all ranks see the same file. `io`: see `output`."""

    name = "direct"
    background = True

    def __init__(self, reason: str = "it works everywhere", *, io: Io = "auto", threads: int = THREADS) -> None:
        self.reason = reason
        self._io: Io = io
        self._threads = threads

    def write(self, path: Path, layout: Layout, images: Iterable[Image], comm: Comm) -> dict[int, int]:
        digests: dict[int, int] = {}
        failures: list[BaseException] = []
        source, lock = iter(images), threading.Lock()
        known = images.images if isinstance(images, Copying) else images
        size = sum(len(image.data) for image in known) if isinstance(known, Sized) else LARGE_PART
        count = min(self._threads, len(known)) if isinstance(known, Sized) else self._threads

        def following() -> Image | None:
            with lock:
                return None if failures else next(source, None)

        def work() -> None:
            try:
                while (image := following()) is not None:
                    output.write(image.data, image.offset)
                    # Afterwards: while the disk is slower than the memory, the next images are copied meanwhile.
                    digests.update(enumerate(block_digests(image.data, layout.block), start=image.block))
            except BaseException as error:
                failures.append(error)

        try:
            with Output(path, self._io, size) as output:
                helpers = _start(work, count - 1)
                work()
                _join(helpers, failures)
                if failures:
                    raise failures[0]
                output.sync()
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        return digests


def _start(work: Callable[[], None], count: int) -> list[threading.Thread]:
    """Threads beside the caller's, as many as the system gives."""
    started = []
    for number in range(count):
        thread = threading.Thread(target=work, name=f"checkpoint-writer-{number + 1}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the limit of threads, or the program is ending: those that run do all of it
            break
        started.append(thread)
    return started


def _join(threads: list[threading.Thread], failures: list[BaseException]) -> None:
    """Until they have all ended, interrupted or not: the file may be closed only when nobody writes to it."""
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as error:  # such as KeyboardInterrupt: it makes them stop
                failures.append(error)
