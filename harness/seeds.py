"""The generators of Python, numpy and torch, derived anew from a key at each step: none of them needs to be saved."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_generators(*key: int) -> None:
    """Derive Python's, numpy's and torch's generators from (seed, step, replica, ...).

    Cheap enough for every step: about 20 microseconds.
    """
    words = np.random.SeedSequence((len(key), *key)).generate_state(3, np.uint32)  # (7,) and (7, 0) differ
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
