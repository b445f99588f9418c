"""torch's optimizers without torch's compiler, which they import for nothing: a second of CPU and 70 MB of each rank.

Harness compiles nothing. All the same `torch._dynamo` is imported, when an optimizer is made, to mark methods that no
compiler should look into, and at every step, to end a graph that is not there (torch 2.13: 800 modules). Where a task
has imported it before, to compile its model, all is left as torch has it. Not here: which optimizer, with what settings
(`optim.py`).

>>> optimizer = eager(torch.optim.SGD)(model.parameters(), lr=0.1)                    # doctest: +SKIP
"""

from __future__ import annotations

import inspect
import os
import sys
from functools import wraps
from typing import Any

import torch

MARKED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods of optimizers that `torch._disable_dynamo` marks when they are first called."""


def eager(kind: type[Any]) -> type[Any]:
    """The same optimizer, for which no compiler is imported; one that is not torch's own as it is."""
    if "torch._dynamo" in sys.modules or not f"{kind.__module__}.".startswith("torch.optim."):
        return kind
    for name in MARKED:
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        vars(method)["__dynamo_disable"] = method  # where torch looks for what to call instead (torch/_compile.py)
    inner = inspect.unwrap(kind.step)

    @wraps(inner)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        """torch's but for the ends of a graph (`_use_grad_for_differentiable` in torch/optim/optimizer.py)."""
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return inner(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__, "__doc__": kind.__doc__})


def be_deterministic(wanted: bool) -> None:
    """`torch.use_deterministic_algorithms`, which imports the compiler to tell it: its variable does that as well."""
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(wanted)
        return
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = str(int(wanted))
    torch.set_deterministic_debug_mode("error" if wanted else "default")
