"""When a start must be over: the end of the allocation it runs in, or `stop.time` from now, whichever comes first.

Found out here, because ranks cannot ask Slurm: they must not start processes. They decide when to stop by it
(`harness.stop`), since they know how long a save takes.

    plan.with_env(time_limit(config.stop))
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.errors import Unavailable
from harness.stop import DEADLINE
from launch import jobs

if TYPE_CHECKING:
    from harness.config import Stop


def time_limit(stop: Stop, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that tell ranks when they must be gone; {} where nothing ends them.

    Raises Unavailable when the allocation ends within `stop.margin`: the run would stop before its first step.
    """
    now, ends = time.time(), jobs.end_time(environ)
    if ends is not None and ends - now <= stop.margin:
        raise Unavailable(
            f"the Slurm job {environ.get('SLURM_JOB_ID')} ends in {max(0.0, ends - now):.0f} s, which is not longer"
            f" than stop.margin ({stop.margin:g} s)",
            hint="ask for more time (slurm.time), or lower stop.margin",
        )
    limits = [limit for limit in (ends, None if stop.time is None else now + stop.time) if limit is not None]
    return {DEADLINE: f"{min(limits):.0f}"} if limits else {}
