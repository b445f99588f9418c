"""Optimizers and the peak learning rate. Not here: when a step is taken (`update.py`), schedules (`schedule.py`).

>>> peak_lr(Optim(lr=0.1, lr_scaling="linear", base_batch=256), global_batch=512)
0.2
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from harness.config import Optim
from harness.errors import ConfigError

if TYPE_CHECKING:
    import torch

BUILT_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "gd": ("SGD", {}),  # plain gradient descent: no state, no noise when the batch is the whole data set
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
}


def peak_lr(settings: Optim, global_batch: int) -> float:
    """The learning rate at factor 1: `lr` times (global_batch / base_batch), its square root, or 1.

    Linear scaling: Goyal et al. 2017, arXiv:1706.02677; square root: Krizhevsky 2014, arXiv:1404.5997.
    """
    ratio = global_batch / settings.base_batch
    return settings.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[settings.lr_scaling]


def make_optimizer(parameters: Iterable[Any], settings: Optim, *, lr: float) -> torch.optim.Optimizer:
    """A torch optimizer. Raises ConfigError when there is none, it needs a closure, or a setting does not apply."""
    from harness.eager import eager

    kind = _optimizer_class(settings.name)
    accepted = inspect.signature(kind).parameters
    given = {key: value for key in ("momentum", "betas", "eps") if (value := getattr(settings, key)) is not None}
    if settings.weight_decay or "weight_decay" in accepted:
        given["weight_decay"] = settings.weight_decay
    arguments = BUILT_IN.get(settings.name, ("", {}))[1] | given | settings.args
    if settings.name == "gd" and arguments.get("momentum"):
        raise ConfigError("optim.momentum does not apply to gd", hint="use optim.name=momentum")
    if wrong := [f"args.{key}" if key in settings.args else key for key in arguments if key not in accepted]:
        raise ConfigError(
            f"optim.{' and optim.'.join(wrong)} {'does' if len(wrong) == 1 else 'do'} not apply to {settings.name}",
            hint=f"it takes {', '.join(key for key in accepted if key not in ('params', 'self'))}",
        )
    try:
        optimizer: torch.optim.Optimizer = eager(kind)(parameters, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim.{settings.name} does not accept its settings: {error}") from error
    return optimizer


def _optimizer_class(name: str) -> type[Any]:
    import torch

    if name in BUILT_IN:
        return getattr(torch.optim, BUILT_IN[name][0])  # type: ignore[no-any-return]
    module_name, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"optim.name {name!r} cannot be imported: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"optim.name {name!r} is not a torch optimizer")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        # Horovod reduces gradients before step(); those that a closure makes inside it would never be reduced
        raise ConfigError(f"optim.name {name!r} needs a closure for its step, which Horovod cannot reduce")
    return kind
