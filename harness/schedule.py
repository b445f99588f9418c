"""The learning rate as a pure function of the step: no scheduler object, so nothing to save and nothing to restore.

>>> [factor(Schedule(name="linear", warmup=2), step, 6) for step in range(6)]
[0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
"""

from __future__ import annotations

import math

from harness.config import Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied with at `step` (from 0) of `steps`.

    Warm-up ends with factor 1 at step `warmup - 1`; linear and cosine reach `final` at the last step.
    Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983;
    inverse square root: Vaswani et al. 2017, arXiv:1706.03762, with peak 1.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    peak = max(schedule.warmup - 1, 0)
    progress = min((step - peak) / max(steps - 1 - peak, 1), 1.0)
    if schedule.name == "linear":
        return 1.0 + (schedule.final - 1.0) * progress
    if schedule.name == "cosine":
        return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule.name == "step":
        assert schedule.every is not None
        return schedule.gamma ** ((step - schedule.warmup) // schedule.every)
    if schedule.name == "inverse_sqrt":
        return math.sqrt(max(schedule.warmup, 1) / (step + 1))
    return 1.0
