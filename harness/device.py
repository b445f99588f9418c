"""Where a rank computes: its GPU, or its share of the node's cores.

What is not here: binding processes to cores, which the launcher does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness.errors import Unavailable

if TYPE_CHECKING:
    import torch


def set_threads(wanted: int | None, local_size: int | None) -> int:
    """Choose and export OMP_NUM_THREADS; before numpy and torch are imported, which read it only then.

    The config comes first, then what the environment already says, then the cores this process may use divided by
    the ranks on the node.
    """
    if wanted is None:
        text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        wanted = int(text) if text.isdecimal() and int(text) > 0 else None
    if wanted is None:
        wanted = max(1, len(os.sched_getaffinity(0)) // max(local_size or 1, 1))
    os.environ["OMP_NUM_THREADS"] = str(wanted)
    return wanted


def choose_device(local_rank: int, local_size: int, all_gather: Callable[[str], Sequence[object]]) -> torch.device:
    """This rank's device, made current. Raises Unavailable when a node has fewer GPUs than ranks.

    Many launchers show each rank one GPU only, which is then device 0 everywhere: `all_gather` gives the values of all
    ranks on this node, so that the GPUs' own identities tell whether they are different ones. Collective on the node.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    first = str(torch.cuda.get_device_properties(0).uuid) if count == 1 else ""
    seen = all_gather(first)
    if first and len(set(map(str, seen))) == len(seen) == local_size:
        index = 0
    elif local_rank >= count:
        raise Unavailable(
            f"this node has {count} GPU{'s' * (count != 1)} for {local_size} ranks",
            hint="start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    else:
        index = local_rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
