"""Random generators of one rank, as an entry of a State: Python's, numpy's and torch's, on the CPU and on its GPU.

    data = numpy.random.default_rng([seed, rank])
    state = State(model=model, optimizer=optimizer, rng=Rng(data=data, seed=seed))

Every rank has its own generators, so every rank's are saved. Restored on the same number of ranks, each gets its own
back and draws on as if it had never stopped. On another number there is nobody whose state it would be: generators
then start anew from (seed, step, rank) where a seed was given, else they stay as they are, and a line says so.

States are integers in arrays of fixed shapes, no pickles: 2.5 KB each of Python's and numpy's, 5 KB of torch's. Of
torch's generators those are saved that exist: torch is imported by whoever uses it, not here.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import DataError

_NAMES = {"python", "numpy", "torch", "cuda"}
_WORD = (1 << 64) - 1


class Rng:
    """The generators of this process. `generators`: further ones by name, of numpy, torch or `random.Random`.

    Raises DataError where one of them is something else.
    """

    def __init__(self, *, seed: int | None = None, **generators: Any) -> None:
        if taken := set(generators) & _NAMES:
            raise DataError(f"a generator of an Rng cannot be called {min(taken)!r}")
        self.seed = seed
        self._own = {name: _adapter(name, generator) for name, generator in generators.items()}

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays of integers by generator, on any rank of the same names, dtypes and shapes."""
        return {name: generator.get() for name, generator in self._all().items()}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Set the generators. Raises DataError, before any of them changed, where a state is not one of its generator.

        A generator that only one side has stays as it is: a GPU's, where there is none now.
        """
        generators = self._all()
        live = {name: generator.get() for name, generator in generators.items() if name in state}
        for name, mine in live.items():
            theirs = np.asarray(state[name])
            if (theirs.dtype, theirs.shape) != (mine.dtype, mine.shape):
                raise DataError(f"the state of the generator {name} is of another kind or version than the one here")
        try:
            for name in live:
                generators[name].set(np.array(state[name]))
        except Exception as error:
            failed = name
            for name, mine in live.items():
                generators[name].set(mine)
            raise DataError(f"the generator {failed} does not take its state: {error}") from error

    def reseed(self, step: int, rank: int) -> bool:
        """Start all generators anew from (seed, step, rank); each differently. False where no seed was given."""
        if self.seed is None:
            return False
        for number, generator in enumerate(self._all().values()):
            generator.seed(np.random.SeedSequence([self.seed % (1 << 64), step, rank, number]))
        return True

    def _all(self) -> dict[str, _Generator]:
        torch = sys.modules.get("torch")
        found: dict[str, _Generator] = {"python": _Python(random), "numpy": _Legacy()}
        if torch is not None:
            found["torch"] = _Torch(torch.default_generator)
            if torch.cuda.is_available():
                found["cuda"] = _Cuda()
        return {**found, **self._own}


class _Generator:
    """One generator's state as an array of integers."""

    def get(self) -> npt.NDArray[Any]:
        raise NotImplementedError

    def set(self, state: npt.NDArray[Any]) -> None:
        raise NotImplementedError

    def seed(self, sequence: np.random.SeedSequence) -> None:
        raise NotImplementedError


class _Python(_Generator):
    """`random`, or a `random.Random`: 624 words and a position, then whether a normal number waits, and its bits."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def get(self) -> npt.NDArray[Any]:
        version, words, waiting = self._generator.getstate()
        if version != 3:
            raise DataError(f"Python's generator has a state of version {version}; version 3 is known")
        bits = np.array([0.0 if waiting is None else waiting]).view(np.uint32)
        return np.array([*words, waiting is not None, *bits.tolist()], np.uint32)

    def set(self, state: npt.NDArray[Any]) -> None:
        words, waits, bits = state[:625].tolist(), bool(state[625]), np.array(state[626:628])
        self._generator.setstate((3, tuple(words), float(bits.view(np.float64)[0]) if waits else None))

    def seed(self, sequence: np.random.SeedSequence) -> None:
        self._generator.seed(int.from_bytes(sequence.generate_state(8).tobytes(), "little"))


class _Legacy(_Generator):
    """`numpy.random` itself, or a RandomState: 624 words and a position, then the same as Python's."""

    def __init__(self, generator: Any = np.random) -> None:
        self._generator = generator

    def get(self) -> npt.NDArray[Any]:
        state = self._generator.get_state(legacy=False)
        if state["bit_generator"] != "MT19937":
            raise DataError(f"numpy's global generator is a {state['bit_generator']}; MT19937 is known")
        bits = np.array([state["gauss"]]).view(np.uint32)
        inner = state["state"]
        return np.array([*inner["key"].tolist(), inner["pos"], state["has_gauss"], *bits.tolist()], np.uint32)

    def set(self, state: npt.NDArray[Any]) -> None:
        position = int(state[624])
        if position > 624:
            raise DataError("the position in its words is impossible")
        gauss = float(np.array(state[626:628]).view(np.float64)[0])
        self._generator.set_state(("MT19937", np.array(state[:624]), position, int(state[625]), gauss))

    def seed(self, sequence: np.random.SeedSequence) -> None:
        self._generator.seed(sequence.generate_state(8))


class _Numpy(_Generator):
    """A numpy Generator: its bit generator's state, every number of it as 64-bit words, in order of its keys."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._bits: Any = generator.bit_generator

    def get(self) -> npt.NDArray[Any]:
        words = [word for _, value in _walk(self._bits.state) for word in _words(value)]
        kind = int.from_bytes(self._bits.state["bit_generator"].encode()[:8], "little")
        return np.array([kind, *words], np.uint64)

    def set(self, state: npt.NDArray[Any]) -> None:
        if state[0] != self.get()[0]:
            raise DataError(f"it is of another kind than {self._bits.state['bit_generator']}")
        rest = iter(state[1:].tolist())
        new = self._bits.state
        for path, value in _walk(new):
            place = new
            for key in path[:-1]:
                place = place[key]
            words = [next(rest) for _ in _words(value)]
            is_array = isinstance(value, np.ndarray)
            place[path[-1]] = np.array(words, value.dtype) if is_array else words[0] | words[1] << 64
        self._bits.state = new

    def seed(self, sequence: np.random.SeedSequence) -> None:
        self._bits.state = type(self._bits)(sequence).state


class _Torch(_Generator):
    """A torch.Generator, on any device: its own bytes."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def get(self) -> npt.NDArray[Any]:
        state: npt.NDArray[Any] = self._generator.get_state().numpy().copy()
        return state

    def set(self, state: npt.NDArray[Any]) -> None:
        import torch

        self._generator.set_state(torch.from_numpy(np.array(state)))

    def seed(self, sequence: np.random.SeedSequence) -> None:
        self._generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


class _Cuda(_Torch):
    """The generator of the rank's current GPU."""

    def __init__(self) -> None:
        import torch

        cuda: Any = torch.cuda
        cuda.init()
        super().__init__(cuda.default_generators[cuda.current_device()])


def _adapter(name: str, generator: Any) -> _Generator:
    torch = sys.modules.get("torch")
    if isinstance(generator, np.random.Generator):
        return _Numpy(generator)
    if isinstance(generator, np.random.RandomState):
        return _Legacy(generator)
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return _Python(generator)
    if torch is not None and isinstance(generator, torch.Generator):
        return _Torch(generator)
    raise DataError(
        f"Rng({name}=...) is a {type(generator).__name__}, whose state is unknown",
        hint="it takes numpy.random.Generator, numpy.random.RandomState, random.Random and torch.Generator",
    )


def _walk(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Numbers and arrays of a bit generator's state, by their path, in order of their keys."""
    for key in sorted(state):
        if isinstance(state[key], Mapping):
            yield from _walk(state[key], (*path, key))
        elif not isinstance(state[key], str):
            yield (*path, key), state[key]


def _words(value: Any) -> list[int]:
    """An array's numbers; a number of up to 128 bits as its low and high half."""
    if isinstance(value, np.ndarray):  # of one dimension, whatever the bit generator
        return [int(number) for number in value.reshape(-1)]
    return [int(value) & _WORD, int(value) >> 64]
