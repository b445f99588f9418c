"""Which gradients travel together: parameters -> flat buckets. Pure arithmetic, the same on all ranks.

A bucket holds whole gradients one behind the other, so that one reduction moves many of them. Gradients become ready
from the last layer to the first, hence buckets are filled in the reverse of the model's order: the first one is full
early in the backward pass and travels while the rest is computed. What is not here: tensors (`reducer.py`).

>>> [bucket.members for bucket in plan_buckets([Piece(10, "f32"), Piece(20, "f32"), Piece(5, "f32")], limit=100)]
[(2, 1), (0,)]
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Piece:
    """One parameter's gradient: its elements, and what it must have in common with its neighbours (dtype, device)."""

    elements: int
    kind: Hashable
    itemsize: int = 4


@dataclass(frozen=True)
class Bucket:
    """Gradients (by their number) and where each one begins, in elements; `elements` is the length of all of them."""

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    elements: int


def plan_buckets(pieces: Sequence[Piece], limit: int) -> list[Bucket]:
    """Buckets of at most `limit` bytes, in the order in which they fill; one longer gradient is a bucket by itself.

    Every piece is in exactly one bucket, with others of its kind only, in the reverse of the given order.
    """
    open_: dict[Hashable, list[int]] = {}
    held: dict[Hashable, int] = {}
    closed: list[list[int]] = []
    for number, piece in reversed(list(enumerate(pieces))):
        members, nbytes = open_.setdefault(piece.kind, []), piece.elements * piece.itemsize
        if members and held[piece.kind] + nbytes > limit:
            closed.append(members)
            members = open_[piece.kind] = []
        held[piece.kind] = nbytes + (held[piece.kind] if members else 0)
        members.append(number)
    closed += open_.values()
    closed.sort(key=lambda members: -members[-1])  # a bucket is full when the earliest parameter in it is ready
    return [_bucket(pieces, members) for members in closed]


def _bucket(pieces: Sequence[Piece], members: Sequence[int]) -> Bucket:
    ends = tuple(accumulate(pieces[number].elements for number in members))
    return Bucket(tuple(members), (0, *ends[:-1]), ends[-1])


def cut(bucket: Bucket, sizes: Sequence[int], lo: int, hi: int) -> list[tuple[int, int]]:
    """Of each member (`sizes`: their elements), which of its elements lie in [lo, hi) of the bucket; lo = hi: none.

    >>> cut(Bucket((1, 0), (0, 5), 15), [5, 10], 3, 8)
    [(3, 5), (0, 3)]
    """
    places = zip(bucket.offsets, sizes, strict=True)
    return [(min(max(lo - at, 0), size), min(max(hi - at, 0), size)) for at, size in places]
