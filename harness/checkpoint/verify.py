"""Reading a whole checkpoint to see that every byte is the one that was written.

    report = verify(Path("runs/exp7/checkpoints/step-00001200"), jobs=4)
    report.damaged                  # ["model/fc.weight"], or [] where all is well

The manifest, the HDF5 metadata and the table of digests are checked first (`store.check`), then every block of data.
Threads read and digest side by side; memory is bounded by `jobs` pieces.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.checkpoint.reader import Blocks
from harness.checkpoint.store import Damaged, check

PIECE = 8 << 20
"""Bytes that one thread reads and checks at a time."""


@dataclass(frozen=True)
class Report:
    """`bytes`: of tensors, read and compared. `damaged`: names of tensors, or "the space between tensors"."""

    path: Path
    bytes: int
    tensors: int
    damaged: tuple[str, ...]


def jobs_here() -> int:
    """Threads that are worth while: as many as this process may use processors, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def verify(path: Path, *, jobs: int | None = None, progress: Callable[[int, int], None] | None = None) -> Report:
    """Read everything. `progress` is called with (bytes read so far, bytes in all), from one thread at a time.

    Raises Damaged where the checkpoint cannot be read at all or its metadata are damaged, InputMissing, NewerVersion.
    """
    manifest, _ = check(path)
    layout = manifest.layout
    blocks = Blocks(path, manifest)
    step = max(1, PIECE // layout.block)
    total = layout.data_end - layout.data_start
    damaged: list[int] = []
    done = 0
    lock = threading.Lock()
    starts = iter(range(0, layout.blocks, step))

    def work() -> None:
        nonlocal done
        buffer = np.empty(min(total, step * layout.block), np.uint8)
        while True:
            with lock:
                first = next(starts, None)
            if first is None:
                return
            last = min(first + step, layout.blocks)
            size = layout.block_range(last - 1)[1] - layout.block_range(first)[0]
            found = blocks.read(first, last, buffer[:size])
            with lock:
                damaged.extend(found)
                done += size
                if progress is not None:
                    progress(done, total)

    try:
        with ThreadPoolExecutor(jobs or jobs_here(), "verify") as pool:
            for worker in [pool.submit(work) for _ in range(jobs or jobs_here())]:
                worker.result()
        names = blocks.names(sorted(damaged))
    except (OSError, EOFError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    finally:
        blocks.close()
    return Report(path, total, len(layout.leaves), tuple(names or (["the space between tensors"] if damaged else [])))
