"""The norm of a gradient whose parts are on several ranks of a replica. Which they are: `tensor.py`, `pipeline.py`.

What one rank alone holds counts there; what all parts of a stage hold alike counts on the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.parallel.groups import Groups


def norm_of_replica(own: Tensor, alike: Tensor, groups: Groups) -> Tensor:
    """L2 norm over all ranks of the replica, from two norms of this rank; scalars, fp32. Collective in the replica.

    `own`: of what only this rank holds. `alike`: of what all ranks of its stage hold. Not finite if any is not.
    """
    import horovod.torch as hvd

    square = own.double() ** 2 + (alike.double() ** 2 if groups.place.part == 0 else 0.0)
    total: Tensor = hvd.allreduce(square.cpu(), op=hvd.Sum, name="norm", process_set=groups.replica.process_set)
    return torch.sqrt(total).float()
