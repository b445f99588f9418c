"""Buckets: every gradient once, in the order in which they become ready, within the limit."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from harness.parallel.buckets import Bucket, Piece, cut, plan_buckets

PIECES = st.lists(st.builds(Piece, st.integers(0, 50), st.sampled_from(["f32", "f64"]), st.sampled_from([4, 8])))


@given(PIECES, st.integers(1, 400))
def test_every_gradient_is_in_one_bucket_with_its_like(pieces: list[Piece], limit: int) -> None:
    buckets = plan_buckets(pieces, limit)
    assert sorted(number for bucket in buckets for number in bucket.members) == list(range(len(pieces)))
    for bucket in buckets:
        held = [pieces[number] for number in bucket.members]
        assert len({piece.kind for piece in held}) == 1
        assert len(held) == 1 or sum(piece.elements * piece.itemsize for piece in held) <= limit
        ends = [at + piece.elements for at, piece in zip(bucket.offsets, held, strict=True)]
        assert [0, *ends] == [*bucket.offsets, bucket.elements]  # one behind the other, without gaps


@given(PIECES, st.integers(1, 400))
def test_buckets_fill_from_the_last_parameter_to_the_first(pieces: list[Piece], limit: int) -> None:
    buckets = plan_buckets(pieces, limit)
    for bucket in buckets:
        assert list(bucket.members) == sorted(bucket.members, reverse=True)
    full_at = [bucket.members[-1] for bucket in buckets]
    assert full_at == sorted(full_at, reverse=True)


@given(PIECES, st.integers(1, 400))
def test_no_bucket_could_take_the_next_gradient(pieces: list[Piece], limit: int) -> None:
    """Else there were more reductions than need be."""
    for kind in {piece.kind for piece in pieces}:
        of_kind = [bucket for bucket in plan_buckets(pieces, limit) if pieces[bucket.members[0]].kind == kind]
        for bucket, following in pairwise(of_kind):
            held = [pieces[number] for number in (*bucket.members, following.members[0])]
            assert sum(piece.elements * piece.itemsize for piece in held) > limit


def test_ten_thousand_parameters_are_planned_at_once() -> None:
    (bucket,) = plan_buckets([Piece(3, "f32")] * 10_000, limit=1 << 30)
    assert bucket.elements == 30_000


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 9))
def test_a_bucket_is_cut_so_that_each_element_is_in_one_part(sizes: list[int], parts: int) -> None:
    bucket = Bucket(tuple(range(len(sizes))), tuple(accumulate([0, *sizes[:-1]])), sum(sizes))
    length = -(-sum(sizes) // parts) + 1
    held = [cut(bucket, sizes, part * length, (part + 1) * length) for part in range(parts)]
    for number, size in enumerate(sizes):
        assert [at for lo, hi in (part[number] for part in held) for at in range(lo, hi)] == list(range(size))
    assert all(sum(hi - lo for lo, hi in part) <= length for part in held)
