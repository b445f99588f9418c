"""Reading a whole checkpoint to see that every byte is the one that was written.

    report = verify(Path("runs/exp7/checkpoints/step-00001200"), jobs=4)
    report.damaged                  # ["model/fc.weight"], or [] where all is well

The manifest, the HDF5 metadata and the table of digests are checked first (`store.check`), then every block of data.
Threads read and digest side by side; memory is bounded by `jobs` + 1 segments.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint.blocks import SEGMENT, Blocks, cut
from harness.checkpoint.store import Damaged, check


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
    manifest = check(path)
    layout = manifest.layout
    blocks = Blocks(path, manifest)
    step = max(1, SEGMENT // layout.block)
    total = layout.data_end - layout.data_start
    damaged: list[int] = []
    done = 0
    try:
        for found in blocks.ahead([*cut(0, layout.blocks, step)], jobs or jobs_here()):
            damaged += found.damaged
            done += len(found.data)
            if progress is not None:
                progress(done, total)
        names = blocks.names(damaged)
    except (OSError, EOFError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    finally:
        blocks.close()
    return Report(path, total, len(layout.leaves), tuple(names or (["the space between tensors"] if damaged else [])))
