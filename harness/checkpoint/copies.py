"""Are the copies of a part equal? As `replicas`, for parts that several ranks hold (two replicas of a split model).

The ranks that hold a part share the writing of it. Where their copies differ, the file would hold what no rank ever
had; then the first of these ranks writes and sends all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash

from harness.checkpoint.agree import together
from harness.checkpoint.comm import Comm, Json
from harness.checkpoint.holders import Holders
from harness.checkpoint.layout import Offsets
from harness.checkpoint.replicas import Unequal, digest_of
from harness.checkpoint.tensors import Part


def compare_copies(holders: Holders, parts: Mapping[int, Part], comm: Comm, step: int) -> tuple[Holders, Unequal]:
    """Compare the copies of each part. Reads this rank's once. Collective. Raises SaveFailed.

    Returns holders in which the unequal ones have one holder, and the leaves and ranks that are concerned.
    """
    several = np.diff(holders.bounds) > 1
    cells = holders.cells_of(comm.rank)
    cells = cells[several[holders.group[cells]]]
    groups = holders.group[cells]

    def digest() -> tuple[Offsets, Json]:
        made = np.array([digest_of(parts[int(holders.leaf[cell])].buffer) for cell in cells], "<u8").view("<i8")
        return made, {str(g): xxhash.xxh3_64_hexdigest(made[groups == g].tobytes()) for g in np.unique(groups)}

    digests, roots = together(comm, step, "while it compared its copies of parts", digest)
    said: dict[str, set[str]] = {}
    for message in roots:
        for group, mark in message.items():
            said.setdefault(group, set()).add(mark)
    differing = [int(group) for group, marks in said.items() if len(marks) > 1]
    if not differing:
        return holders, Unequal((), ())
    mine = {str(g): digests[groups == g].tobytes().hex() for g in differing if g in groups}
    everywhere: list[Any] = comm.all_gather(mine)
    unequal, ranks = [], set()
    for group in differing:
        members = holders.members[holders.bounds[group] : holders.bounds[group + 1]].tolist()
        table = np.array([np.frombuffer(bytes.fromhex(everywhere[rank][str(group)]), "<i8") for rank in members])
        differs = table != table[0]
        unequal.append(np.flatnonzero(holders.group == group)[differs.any(axis=0)])
        ranks |= {members[row] for row in np.flatnonzero(differs.any(axis=1))}
    chosen = np.concatenate(unequal)
    leaves = sorted(set(holders.leaf[chosen].tolist()))
    return first_only(holders, chosen), Unequal(tuple(leaves), tuple(sorted(ranks)))


def first_only(holders: Holders, cells: Offsets) -> Holders:
    """The same, but the first holder of these cells is their only one."""
    before, place = np.unique(holders.group[cells], return_inverse=True)
    group = holders.group.copy()
    group[cells] = len(holders.bounds) - 1 + place
    members = np.concatenate([holders.members, holders.members[holders.bounds[before]]])
    bounds = np.concatenate([holders.bounds, holders.bounds[-1] + 1 + np.arange(len(before))])
    return replace(holders, group=group, members=members, bounds=bounds)
