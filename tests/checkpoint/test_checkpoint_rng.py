"""Random generators: what is drawn after a restore is what would have been drawn."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import manager
from support import ROOT

from harness.checkpoint import State
from harness.checkpoint.rng import Rng
from harness.errors import DataError


@pytest.fixture(autouse=True)
def generators_as_before() -> Iterator[None]:
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(saved[0])
    np.random.set_state(saved[1])
    torch.set_rng_state(saved[2])


DRAWS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "python": (lambda: None, lambda g: [random.random(), random.gauss(0, 1), random.randrange(10**30)]),
    "numpy": (lambda: None, lambda g: [*np.random.rand(3), *np.random.randn(3)]),
    "torch": (lambda: None, lambda g: [*torch.rand(3).tolist(), *torch.randn(7).tolist(), *torch.randperm(5).tolist()]),
    "random.Random": (lambda: random.Random(5), lambda g: [g.random(), g.gauss(0, 1)]),
    "RandomState": (lambda: np.random.RandomState(5), lambda g: [*g.randn(3)]),
    "torch.Generator": (
        lambda: torch.Generator().manual_seed(5),
        lambda g: [*torch.randn(5, generator=g).tolist(), *torch.randperm(9, generator=g).tolist()],
    ),
} | {
    name: (
        lambda name=name: np.random.Generator(getattr(np.random, name)(5)),
        lambda g: [*g.random(3), g.integers(0, 9, dtype=np.uint32), *g.standard_normal(3), g.bytes(3)],
    )
    for name in ("PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937")
}


def rng(generator: Any, seed: int | None = None) -> Rng:
    return Rng(seed=seed, **({} if generator is None else {"data": generator}))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", DRAWS)
def test_a_generator_goes_on_where_it_was(kind: str, count: int, tmp_path: Path) -> None:
    """Also in the middle of what it has in store: a second normal number, half a word."""
    make, draw = DRAWS[kind]
    generator = make()
    for _ in range(count):
        draw(generator)
    manager(tmp_path).save(1, State(rng=rng(generator)))
    ahead = [draw(generator) for _ in range(3)]
    assert ahead[0] != ahead[1]
    other = make()
    draw(other)
    manager(tmp_path).restore(State(rng=rng(other)))
    assert [draw(other) for _ in range(3)] == ahead


@pytest.mark.parametrize("kind", DRAWS)
@given(count=st.integers(0, 700))
@settings(max_examples=20, deadline=None)
def test_the_state_is_of_one_form_whatever_was_drawn(kind: str, count: int) -> None:
    """Ranks draw different amounts, and must hold tensors of the same shapes."""
    make, draw = DRAWS[kind]
    generator = make()
    form = {name: (array.dtype, array.shape) for name, array in rng(generator).state_dict().items()}
    for _ in range(count // 7):
        draw(generator)
    if kind == "python":
        for _ in range(count % 7):
            random.gauss(0, 1)
    again = rng(generator).state_dict()
    assert {name: (array.dtype, array.shape) for name, array in again.items()} == form
    rng(generator).load_state_dict(again)
    for name, array in rng(generator).state_dict().items():
        np.testing.assert_array_equal(array, again[name])


@pytest.mark.parametrize("kind", DRAWS)
def test_a_new_seed_depends_on_seed_step_and_rank(kind: str) -> None:
    make, draw = DRAWS[kind]
    drawn = {}
    for seed, step, rank in ((1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0), (2**70, 5, 0)):
        for turn in range(2):
            generator = make()
            if turn:
                draw(generator)
            assert rng(generator, seed).reseed(step, rank)
            found = draw(generator)
            assert drawn.setdefault((seed, step, rank), found) == found
    assert len({tuple(found) for found in drawn.values()}) == 5
    before = rng(make()).state_dict()
    assert not Rng().reseed(5, 0)
    for name in ("python", "numpy", "torch"):
        np.testing.assert_array_equal(Rng().state_dict()[name], before[name])


def test_generators_are_seeded_differently() -> None:
    a, b = np.random.default_rng(1), np.random.default_rng(1)
    Rng(seed=3, a=a, b=b).reseed(0, 0)
    assert a.random() != b.random()


def test_without_torch() -> None:
    code = (
        "import sys; from harness.checkpoint.rng import Rng; r = Rng(); state = r.state_dict();"
        "r.load_state_dict({**state, 'torch': state['numpy']}); r.reseed(1, 2);"
        "assert sorted(state) == ['numpy', 'python'] and 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code.replace("r = Rng()", "r = Rng(seed=1)")], cwd=ROOT, check=True, timeout=60
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(python=s["python"][:-1]), "the generator python is of another kind or version"),
        (lambda s: s.update(numpy=s["numpy"].astype(np.int64)), "the generator numpy is of another kind"),
        (lambda s: s["numpy"].__setitem__(624, 4_000_000_000), "the generator numpy does not take its state"),
        (lambda s: s["python"].__setitem__(624, 4_000_000_000), "the generator python does not take its state"),
        (lambda s: s.update(torch=np.full_like(s["torch"], 255)), "the generator torch does not take its state"),
        (lambda s: s["data"].__setitem__(0, 7), "the generator data does not take its state: it is of another kind"),
        (lambda s: s["data"].__setitem__(slice(1, None), 2**64 - 1), "the generator data does not take its state"),
    ],
)
def test_impossible_states_change_nothing(change: Callable[[Any], Any], words: str) -> None:
    holder = Rng(data=np.random.default_rng(3))
    state = holder.state_dict()
    random.random(), np.random.rand(), torch.rand(1)
    before = holder.state_dict()
    change(state)
    with pytest.raises(DataError, match=words):
        holder.load_state_dict(state)
    for name, array in holder.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_only_generators_are_taken() -> None:
    for wrong in (5, random.SystemRandom(), np.random.PCG64(1)):
        with pytest.raises(DataError, match=r"Rng\(data=...\) is a"):
            Rng(data=wrong)
    with pytest.raises(DataError, match="cannot be called 'torch'"):
        Rng(torch=random.Random())
