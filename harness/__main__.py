"""One rank of a run: `python -m harness RUN_DIR`, or `python -m harness CONFIG [key=value ...]` under any MPI launcher.

The order matters: environment, config, forkserver, threads, then MPI, GPU and Horovod (see `harness.world`). Imports
of torch, MPI and HDF5 are inside functions, because loader processes import this module too and must stay free of MPI.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from harness.clock import Clock
from harness.env import Environment, identify
from harness.errors import Exit, HarnessError, InternalError, Stopped, Unavailable
from harness.failure import code_of, leave, record
from harness.heartbeat import limit
from harness.log import redirect
from harness.rundir import Attempt, RunDir, make_root, open_run, storage_errors
from harness.stop import listen
from harness.watchdog import Watchdog

if TYPE_CHECKING:
    from harness.config import Config
    from harness.elastic import Elastic
    from harness.job import Job
    from harness.world import World


def main() -> None:
    """Ends the process with one of the codes of `harness.errors.Exit`."""
    parser = Parser(prog="python -m harness", description="One rank of a run; start it with an MPI launcher.")
    parser.add_argument("config", type=Path, help="a config file, or a run directory to go on with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, as optim.lr=3e-4")
    parser.add_argument("--site", action="append", default=[], help="a site file from configs/sites/")
    parser.add_argument("--measure", metavar="JSON", help="measure steps instead of training (see harness/bench)")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        os.dup2(2, 1)  # what is printed meanwhile is no result
    environment: Environment | None = None
    try:
        environment = identify()
        config = _read(arguments, environment)
    except HarnessError as error:
        if environment is None or environment.rank == 0:  # every rank finds the same mistakes: rank 0 tells them
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif environment.local_rank in (0, None):  # or only those of this host, which lacks a file or a variable
            print(f"error on {environment.host}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    rank = Rank(config, environment, arguments.measure)
    listen(config.stop.signals)
    try:
        rank.run()
        rank.finish(Exit.FINISHED)
    except Stopped:
        rank.finish(Exit.STOPPED)
    except BaseException as error:
        record(error, rank.environment, rank.clock, rank.attempt)
        leave(code_of(error))


class Parser(argparse.ArgumentParser):
    """argparse with the exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(int(Exit.USAGE), f"error: {message}\n")


class Rank:
    """One process from start to end; holds what a failure report needs at any moment."""

    def __init__(self, config: Config, environment: Environment, measure: str | None = None) -> None:
        self.config = config
        self.environment = environment
        self.measure = measure
        self.run_dir = RunDir(Path(config.directory))
        self.clock = Clock()
        self.attempt: Attempt | None = None
        self.world: World | None = None
        self.watchdog: Watchdog | None = None

    def run(self) -> None:
        """Train. Raises what goes wrong, on this rank."""
        from harness.device import set_threads

        if self.environment.attempt is not None:  # started by `harness run`, which made the run directory
            attempt = self.run_dir.attempt(self.environment.attempt)
            if not attempt.root.is_dir():
                raise Unavailable(
                    f"HARNESS_ATTEMPT is {self.environment.attempt}, but {attempt.root} is not there",
                    hint="unset HARNESS_ATTEMPT, or see that all hosts share the run directory",
                )
            self._use(attempt)
        set_threads(self.config.launch.threads, self.environment.local_size)
        if self.config.data.workers:
            from harness.data import start_forkserver

            start_forkserver()
        if self.environment.elastic:
            from harness.elastic import survive

            survive(self.train, self.clock)
        else:
            self.train()

    def train(self, elastic: Elastic | None = None) -> None:
        """Join the other ranks, build the job and train; in an elastic run again after each change of the ranks."""
        from harness.world import bring_up

        self.environment = identify()
        self.clock.section = "start"
        settings = self.config
        self.world = world = bring_up(
            self.environment,
            settings.horovod,
            self.run_dir.root,
            parallel=settings.parallel,
            limit=min(limit(settings.watchdog, section) for section in ("data", "step")),
        )
        self._check_same_config()
        self._agree_on_attempt(world)
        assert self.attempt is not None

        from harness.job import build

        work = self._work()
        job = build(self.config, self.run_dir, self.attempt.number, world, self.clock, elastic)
        job.stop.install()
        try:
            work(job)
        except Stopped as stopped:
            job.sinks.record("state", job.progress.step, state="stopped", summary=stopped.message)
            job.sinks.say(str(stopped))
            job.close()  # loader processes must not outlive the run; all ranks are here
            raise
        except BaseException as error:
            if elastic is not None and elastic.survives(error):
                job.abandon()
                raise
            with suppress(HarnessError, OSError):  # a full disk must not hide the cause
                job.sinks.record("state", job.progress.step, state="failed", summary=f"{type(error).__name__}: {error}")
            raise
        finally:
            job.sinks.close()
        job.close()

    def finish(self, code: Exit) -> None:
        """Leave together: a rank that exits early with a code other than 0 makes mpirun kill the others."""
        self.clock.section = "exit"
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        if self.world is not None and self.world.size > 1:
            self.world.comm.barrier()
        if self.world is not None and self.world.controller != "none":
            import horovod.torch as hvd

            hvd.shutdown()  # also on a single rank: its background thread talks to MPI, which ends below
        if "mpi4py.MPI" in sys.modules:
            from mpi4py import MPI

            if MPI.Is_initialized() and not MPI.Is_finalized():
                MPI.Finalize()
        os._exit(code)  # nothing is left to do, and atexit hooks of torch or MPI can only hang

    def _work(self) -> Callable[[Job], None]:
        """What is done with the job."""
        if self.measure is None:
            from harness.loop import train

            return train
        from harness.bench.steps import Request, measure

        return partial(measure, Request.model_validate_json(self.measure))

    def _new_attempt(self) -> int:
        from harness.checkpoint.lease import wait_until_free

        run = make_root(self.config)
        wait_until_free(run.checkpoints, log=print)  # first: a refused start leaves the other job's run as it is
        run = open_run(self.config)
        with storage_errors(run.root):
            run.stop.unlink(missing_ok=True)  # asked of an earlier start
        return run.new_attempt().number

    def _agree_on_attempt(self, world: World) -> None:
        """All ranks take the number that one of them has, or a new one. Collective."""
        own = None if self.attempt is None else self.attempt.number
        number = next((known for known in world.comm.all_gather(own) if known is not None), None)
        if number is None:
            # a failure on rank 0 ends the job, and with it those who wait here
            number = world.comm.broadcast(self._new_attempt() if world.is_root else None)
        if self.environment.elastic or self.attempt is None:
            self._use(self.run_dir.attempt(int(str(number))))
            for error in self.attempt.forget(world.size) if world.is_root and self.attempt is not None else []:
                what = f"rank {error.get('rank')} on {error.get('host')} failed at step {error.get('step')}"
                print(f"survived: {what}: {error.get('type')}: {error.get('message')}", flush=True)

    def _use(self, attempt: Attempt) -> None:
        self.attempt = attempt
        log = redirect(attempt.log(self.environment.rank), console=self.environment.rank == 0)
        if self.watchdog is not None:
            self.watchdog.move(self.environment, log)
            return
        self.watchdog = Watchdog(self.clock, attempt, self.environment, self.config.watchdog, log)
        self.watchdog.start()

    def _check_same_config(self) -> None:
        """Ranks that train different configs would hang or mix their gradients. Collective."""
        assert self.world is not None
        digest = hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()
        digests = self.world.comm.all_gather(digest)
        if len(set(map(str, digests))) > 1:
            other = next(rank for rank, told in enumerate(digests) if told != digests[0])
            raise InternalError(
                f"rank {other} ({self.world.hosts[other]}) read another config than rank 0",
                hint="is the file the same on all hosts, and every ${env:...} variable exported to them?",
            )


def _read(arguments: argparse.Namespace, environment: Environment) -> Config:
    from harness.batch import plan_of
    from harness.resolve import resolve

    config = resolve(arguments.config, arguments.overrides, sites=arguments.site).config
    plan_of(config, environment.size, uneven=environment.elastic)
    return config


if __name__ == "__main__":
    main()
