"""The last checkpoint of a run with parameter servers that has lost a worker: made by the servers alone.

What is not here: how a loss is noticed (`server.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from harness.checkpoint import Manager
from harness.checkpoint.rules import keep_rule
from harness.parallel.server import Server, WorkerLost

if TYPE_CHECKING:
    from harness.job import Job


def rescue(job: Job, server: Server) -> NoReturn:
    """Save the state as of the last step that is complete, and end this rank with exit code 75.

    Collective over the servers; every one comes here, because each waits for the same worker. Their slices may be a
    step apart. Buffers are those of the last evaluation or checkpoint.
    """
    job.progress.step = min(int(str(told)) for told in server.among.all_gather(job.progress.step))
    job.manager.abandon()
    server.gather(server.among, state=True)
    rule = keep_rule(job.config.checkpoint.keep)
    manager = Manager(job.run.checkpoints, server.among, keep=rule, engine="direct", background=False)
    manager.save(job.progress.step, job.state(job.extra()), wait=True)
    manager.close()
    lost = ", ".join(map(str, server.missing())) or "?"  # a server that has heard from all waits for another server
    raise WorkerLost(f"worker {lost} was lost in step {job.progress.step}; the servers have saved the state without it")
