"""Which rank does what: the world as replicas of the model, each of several ranks, and the groups that work together.

A replica takes its own samples. It is made of `pipeline` stages of `model` ranks each; stages hold consecutive layers,
and the ranks of a stage a part of every layer. Ranks of the same stage and part hold the same parameters: gradients are
averaged over them. Their optimizer state may be cut into shards, over all of them or over those of one node.

>>> grid = arrange(["a", "a", "b", "b"], model=2)
>>> grid.cells
(((0, 1),), ((2, 3),))
>>> grid.replicas(3)                # ranks that hold what rank 3 holds
(1, 3)

The arithmetic is pure and imports little, so that the launcher can draw it; Horovod's process sets, which carry the
collectives of a group, are made once, at start (`Groups`). What is not here: what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from harness.errors import ConfigError
from harness.parallel.traffic import Traffic

Ranks = tuple[int, ...]
Shards = Literal["none", "node", "all"]


class Place(NamedTuple):
    """Where a rank stands."""

    replica: int
    stage: int
    part: int


@dataclass(frozen=True)
class Grid:
    """`cells[replica][stage][part]` is a rank of the world; every rank is in one cell."""

    cells: tuple[tuple[Ranks, ...], ...]
    hosts: tuple[str, ...]
    """Host of every rank."""

    @cached_property
    def _places(self) -> dict[int, Place]:
        return {
            rank: Place(replica, stage, part)
            for replica, stages in enumerate(self.cells)
            for stage, parts in enumerate(stages)
            for part, rank in enumerate(parts)
        }

    def place(self, rank: int) -> Place:
        return self._places[rank]

    def model(self, rank: int) -> Ranks:
        """Ranks that share this rank's layers, by part."""
        replica, stage, _ = self.place(rank)
        return self.cells[replica][stage]

    def replica(self, rank: int) -> Ranks:
        """All ranks of this rank's replica."""
        return tuple(other for parts in self.cells[self.place(rank).replica] for other in parts)

    def stages(self, rank: int) -> Ranks:
        """Ranks of this rank's replica and part, by stage."""
        replica, _, part = self.place(rank)
        return tuple(parts[part] for parts in self.cells[replica])

    def replicas(self, rank: int) -> Ranks:
        """Ranks that hold what this rank holds, by replica."""
        _, stage, part = self.place(rank)
        return tuple(stages[stage][part] for stages in self.cells)

    def shards(self, rank: int, spread: Shards) -> Ranks:
        """Ranks between which this rank's optimizer state is cut: itself, its replicas of this node, or of all."""
        replicas = self.replicas(rank)
        if spread == "all":
            return replicas
        return (rank,) if spread == "none" else self._by_node(replicas)[self.hosts[rank]]

    def copies(self, rank: int, spread: Shards) -> Ranks:
        """Ranks that hold the same shard. Raises ConfigError where nodes have different numbers of replicas."""
        replicas = self.replicas(rank)
        if spread == "all":
            return (rank,)
        if spread == "none":
            return replicas
        nodes = self._by_node(replicas)
        mine = nodes[self.hosts[rank]].index(rank)
        return tuple(ranks[mine] for ranks in nodes.values())

    def _by_node(self, ranks: Ranks) -> dict[str, Ranks]:
        found: dict[str, Ranks] = {}
        for rank in ranks:
            found[self.hosts[rank]] = (*found.get(self.hosts[rank], ()), rank)
        if len({len(members) for members in found.values()}) > 1:
            told = ", ".join(f"{len(members)} on {host}" for host, members in list(found.items())[:8])
            raise ConfigError(
                f"parallel.optimizer_shards=node needs equally many replicas on every node, not {told}",
                hint="start the same number of ranks on every node, or use all",
            )
        return found

    def sets(self, spread: Shards = "none") -> list[Ranks]:
        """The groups of several ranks, but not of all, that exchange tensors, ascending; the same list on all ranks.

        Raises ConfigError, the same on all ranks, where nodes have different numbers of replicas.
        """
        columns = [self.replicas(rank) for parts in self.cells[0] for rank in parts]
        found = {parts for stages in self.cells for parts in stages} | set(columns)
        found |= {tuple(rank for parts in stages for rank in parts) for stages in self.cells}
        for nodes in [self._by_node(column) for column in columns] if spread == "node" else []:
            found |= {*nodes.values(), *zip(*nodes.values(), strict=True)}
        return sorted({tuple(sorted(ranks)) for ranks in found if 1 < len(ranks) < len(self.hosts)})


def arrange(hosts: Sequence[str], *, model: int = 1, pipeline: int = 1) -> Grid:
    """Cut the world, whose rank r is on hosts[r], into replicas: the ranks of a stage on one node where they fit.

    Raises ValueError when the world does not divide; `batch.plan_batch` tells a user before.
    """
    if len(hosts) % (model * pipeline):
        raise ValueError(f"{len(hosts)} ranks are no replicas of {model * pipeline}")
    stages = together(range(len(hosts)), lambda rank: hosts[rank], model)
    nodes = [hosts[stage[0]] if len({hosts[rank] for rank in stage}) == 1 else None for stage in stages]
    replicas = together(range(len(stages)), lambda stage: nodes[stage], pipeline)
    return Grid(tuple(tuple(stages[stage] for stage in replica) for replica in replicas), tuple(hosts))


def together(items: Sequence[int], home: Callable[[int], Hashable], size: int) -> list[tuple[int, ...]]:
    """Groups of `size`, of items with the same home while there are enough of them; what is left over, in order.

    >>> together(range(8), "aaabbbcc".__getitem__, 2)
    [(0, 1), (2, 5), (3, 4), (6, 7)]
    """
    homes: dict[Hashable, list[int]] = {}
    for item in items:
        homes.setdefault(home(item), []).append(item)
    whole, left = [], []
    for members in homes.values():
        fits = len(members) // size * size
        whole += [tuple(members[at : at + size]) for at in range(0, fits, size)]
        left += members[fits:]
    left.sort()
    return sorted(whole + [tuple(left[at : at + size]) for at in range(0, len(left), size)])


@dataclass(frozen=True)
class Group:
    """Some ranks that work together, seen from one of them."""

    ranks: Ranks
    """By their number in the world, as Horovod's roots are; ascending, as in Horovod's set (stages: in order)."""
    index: int
    """This rank's place among them."""
    process_set: Any = None
    """Horovod's, for `process_set=`; None for a rank alone, which needs no collective."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    """Of the collectives of layers that are cut over the group."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def root(self) -> int:
        """The first of them, as `root_rank=`."""
        return self.ranks[0]


ALONE = Group((0,), 0)


@dataclass(frozen=True)
class Groups:
    """The groups that one rank belongs to."""

    grid: Grid
    place: Place
    model: Group
    """Shares this rank's layers."""
    replica: Group
    """Shares this rank's samples."""
    stages: Group
    """Has no process set: stages talk rank to rank."""
    replicas: Group
    """Hold the same parameters: gradients are averaged over them."""
    shards: Group
    """Cut the state of these parameters' optimizer between them."""
    copies: Group
    """Hold the same shard of it."""

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for its replica, whose ranks all know the same."""
        return self.place.stage == self.place.part == 0


def groups_of(grid: Grid, rank: int, sets: Mapping[Ranks, Any], spread: Shards = "none") -> Groups:
    """A rank's groups. `sets`: Horovod's process sets by their ascending ranks, that of the whole world among them."""

    def group(ranks: Ranks) -> Group:
        ranks = tuple(sorted(ranks))
        return Group(ranks, ranks.index(rank), sets[ranks] if len(ranks) > 1 else None)

    stages = grid.stages(rank)
    return Groups(
        grid,
        grid.place(rank),
        model=group(grid.model(rank)),
        replica=group(grid.replica(rank)),
        stages=Group(stages, stages.index(rank)),
        replicas=group(grid.replicas(rank)),
        shards=group(grid.shards(rank, spread)),
        copies=group(grid.copies(rank, spread)),
    )


SINGLE = groups_of(arrange(["localhost"]), 0, {})
"""Of a process that is the whole world."""
