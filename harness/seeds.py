"""The generators of Python, numpy and torch, derived anew from a key at each step: none of them needs to be saved.

Where the layers of a model are known they are derived anew before each of them, too, so that what a layer draws does
not depend on which others are on its rank (`parallel/pipeline.py`):

    draws = Draws(task.sequence(model))
    draws.key = seed, step, replica, micro_batch        before a micro batch goes forward, or backward
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def seed_generators(*key: int) -> None:
    """Derive Python's, numpy's and torch's generators from (seed, step, replica, ...).

    Cheap enough for every step: about 20 microseconds.
    """
    words = np.random.SeedSequence((len(key), *key)).generate_state(3, np.uint32)  # (7,) and (7, 0) differ
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # torch.manual_seed writes down the stack where there is no GPU, for when there might be one
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(int(words[2]))


class Draws:
    """Derives the generators from (`key`, number of the layer) before each of these layers, in training.

    A layer that is there twice goes on with what the one before it has drawn. A layer that is called twice with one key
    draws the same again, as it must where its activations are computed anew for the backward pass.
    """

    def __init__(self, layers: Sequence[torch.nn.Module] = ()) -> None:
        self.key: tuple[int, ...] = ()
        self._hooks = []
        for number, layer in enumerate(layers):
            if sum(layer is other for other in layers) == 1:
                self._hooks.append(layer.register_forward_pre_hook(partial(self._derive, number)))

    def close(self) -> None:
        """Leave the layers as they were: with these hooks a model can be neither scripted nor pickled for others."""
        for hook in self._hooks:
            hook.remove()

    def _derive(self, number: int, layer: torch.nn.Module, inputs: object) -> None:
        if layer.training and self.key:
            seed_generators(*self.key, number)
