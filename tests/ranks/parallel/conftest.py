"""Contract tests of worlds cut into groups, started by `tests/test_parallel.py`; one job tries several cuts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from harness.world import World

if os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") != "1":
    collect_ignore_glob = ["test_*.py"]

_sets: dict[tuple[int, ...], Any] = {}


@pytest.fixture(scope="session")
def regrouped(world: World) -> Callable[..., World]:
    """The same world with replicas of so many ranks. Collective; called alike on all ranks."""
    import horovod.torch as hvd

    from harness.parallel.groups import arrange
    from harness.world import form_groups

    def regroup(**cut: int) -> World:
        grid = arrange(world.hosts, **cut)
        for ranks in grid.sets():
            if ranks not in _sets:
                _sets[ranks] = hvd.add_process_set(list(ranks))
        return replace(world, groups=form_groups(grid, world.rank, _sets.values()))

    return regroup
