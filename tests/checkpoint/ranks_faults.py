"""Ranks that fail, stay away, come late or are slow. Started by `test_checkpoint_deadlines.py` under a real launcher:

python ranks_faults.py DIRECTORY mpi|gloo [PATTERN OF NAMES]

Every function called `check_...` is one test, run in turn by all ranks; the first failure ends the job.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if len(sys.argv) > 2 and sys.argv[2] == "mpi":
    import mpi4py.MPI  # noqa: F401
else:
    import torch  # noqa: F401  (before horovod.torch)

import numpy as np
from ending import all_or_none

from harness.checkpoint import (
    Horovod,
    Manager,
    Mpi,
    SaveFailed,
    State,
    collecting,
    detect,
    every,
    keep_all,
    saving,
    staging,
    writing,
)
from harness.checkpoint.comm import Comm
from harness.checkpoint.engines import EngineName
from harness.checkpoint.engines.output import Output
from harness.errors import HarnessError

TIMEOUT = 1.5
"""Seconds until a save is given up where a rank is missing."""
LONG = 60.0
"""The same where none is."""
SLACK = 20.0
"""Seconds that a busy machine takes for what takes no time; far from LONG."""


def arrays(seed: int, more: int = 0) -> dict[str, Any]:
    """About 2.4 MB, so that each of up to 4 ranks has something to write."""
    generator = np.random.default_rng(seed)
    made = {f"t{index}": generator.standard_normal(40_000) for index in range(6)}
    return {**made, "small": generator.integers(0, 9, 5), **{f"more{index}": np.zeros(3) for index in range(more)}}


class Checks:
    """The checks, with what they share."""

    def __init__(self, comm: Comm, root: Path) -> None:
        self.comm, self.root, self.last = comm, root, comm.size - 1
        self.engines: list[EngineName] = ["direct"] if comm.mpi is None else ["direct", "mpio"]
        self.lines: list[str] = []
        self.schemas = 0

    @contextmanager
    def manager(self, name: str, **options: Any) -> Iterator[Manager]:
        """One for a new directory; afterwards nothing but checkpoints is left there."""
        directory = self.root / name
        if self.comm.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
        self.comm.barrier()
        self.lines = []
        made = Manager(directory, self.comm, log=self.lines.append, **{"keep": keep_all(), "timeout": LONG, **options})
        try:
            yield made
        except BaseException:
            if self.comm.rank == 0:
                print("\n".join(self.lines), flush=True)
            raise
        made.close()
        self.comm.barrier()  # rank 0 tidies up
        self.same(sorted(path.name for path in directory.iterdir() if not path.name.startswith("step-")), ["lease"])
        self.same([path.name for path in directory.iterdir() if ".tmp-" in path.name], [])

    def same(self, value: Any, expected: Any) -> None:
        found = self.comm.all_gather(value)
        assert all(one == expected for one in found), (found, expected)

    def told(self, work: Callable[[], Any], within: float = 2 * TIMEOUT + SLACK) -> str | None:
        """What SaveFailed says, if it is raised, in time."""
        began = time.monotonic()
        try:
            work()
            return None
        except SaveFailed as error:
            return str(error)
        finally:
            took = time.monotonic() - began
            assert took < within, f"{took} s"

    def told_alike(self, work: Callable[[], Any], within: float = 2 * TIMEOUT + SLACK) -> str:
        words: list[Any] = self.comm.all_gather(self.told(work, within))
        assert len(set(words)) == 1 and words[0], words
        return str(words[0])

    def saves_again(self, manager: Manager, step: int) -> None:
        """The next save that all join works, and holds what it must."""
        assert manager.save(step, State(arrays=arrays(step))) is not None
        manager.wait()
        self.holds(manager, step)

    def holds(self, manager: Manager, step: int) -> None:
        found = arrays(0)
        assert manager.restore(State(arrays=found)) == step
        for name, array in arrays(step).items():
            assert found[name].tobytes() == array.tobytes(), name

    def steps(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.root / name).glob("step-*"))

    # Ranks that stay away or come late

    def check_a_rank_that_is_left_out_of_a_save(self) -> None:
        for engine in self.engines:
            with self.manager("left-out", engine=engine) as manager:
                for step in (1, 4) if engine == "direct" else (1,):  # the very first save, and a later one
                    with self.impatient(manager):
                        if self.comm.rank != self.last:
                            words = self.told(lambda step=step: manager.save(step, State(arrays=arrays(step))))  # type: ignore[misc]
                            expected = f"rank {self.last} ({socket.gethostname()}) did not ask for a save within 1.5 s"
                            assert words is not None and expected in words and f"step {step} was not saved" in words
                            assert "left out by an `if`" in words, words
                    self.saves_again(manager, step + 1)
                    self.saves_again(manager, step + 2)

    def check_a_rank_that_comes_late(self) -> None:
        with self.manager("late") as manager:
            for step in (1, 3):
                with self.impatient(manager):
                    if self.comm.rank == self.last:
                        time.sleep(TIMEOUT + 1)
                    within = SLACK if self.comm.rank == self.last else TIMEOUT + SLACK
                    words = self.told_alike(lambda step=step: manager.save(step, State(arrays=arrays(step))), within)  # type: ignore[misc]
                    assert f"rank {self.last} ({socket.gethostname()}) did not ask for a save" in words
                self.saves_again(manager, step + 1)

    def check_rank_0_never_comes(self) -> None:
        with self.manager("no-rank-0") as manager:
            with self.impatient(manager):
                if self.comm.rank != 0:
                    words = self.told(lambda: manager.save(1, State(arrays=arrays(1))))
                    assert words is not None and "step 1 was not saved: rank 0 did not answer within 3 s" in words
                    assert socket.gethostname() in words and "left out by an `if`" in words
            self.saves_again(manager, 2)

    def check_rank_0_comes_late(self) -> None:
        """The others have given up by then: their requests do not count any more."""
        with self.manager("late-rank-0") as manager:
            with self.impatient(manager):
                if self.comm.rank == 0:
                    time.sleep(2 * TIMEOUT + 1)
                words = self.told(lambda: manager.save(1, State(arrays=arrays(1))))
                expected = "did not ask for a save" if self.comm.rank == 0 else "rank 0 did not answer"
                assert words is not None and expected in words, words
            self.saves_again(manager, 2)

    def check_a_rank_that_is_at_another_step(self) -> None:
        with self.manager("ahead") as manager:
            ahead = self.comm.rank == self.last
            words = self.told_alike(lambda: manager.save(2 if ahead else 1, State(arrays=arrays(1))), SLACK)
            assert f"rank 0 saves step 1, rank {self.last} saves step 2" in words
            self.saves_again(manager, 3)

    def check_earlier_steps_after_a_restore(self) -> None:
        """Messages of what was then the future are not taken for those of now."""
        with self.manager("back") as manager:
            for step, absent in ((1, self.last), (2, 0)):
                self.saves_again(manager, step)
                with self.impatient(manager):
                    if self.comm.rank != absent:
                        assert self.told(lambda: manager.save(9, State(arrays=arrays(9))))
                self.holds(manager, step)
            self.saves_again(manager, 3)

    # Ranks that are slow

    def check_a_slow_rank_keeps_nobody_from_training(self) -> None:
        for busy in ("skip", "wait"):
            with self.manager("slow", busy=busy, engine="direct") as manager:
                self.saves_again(manager, 1)
                with self.patched(Output, "write", _after(3.0, Output.write), self.last):
                    began = time.monotonic()
                    assert manager.save(2, State(arrays=arrays(2))) is not None
                    self.comm.barrier()
                    saved = manager.save(3, State(arrays=arrays(3))) is not None
                    self.same(saved, busy == "wait")  # one is left out: training went on while the rank wrote
                    assert busy == "skip" or time.monotonic() - began > 2.5
                    manager.wait()
                self.holds(manager, 3 if busy == "wait" else 2)
                if self.comm.rank == 0 and busy == "skip":
                    assert self.lines == ["no checkpoint at step 3: the one before is still being written"]

    def check_a_rank_that_is_too_slow(self) -> None:
        with self.manager("too-slow", engine="direct") as manager:
            self.saves_again(manager, 1)
            with self.impatient(manager), self.patched(Output, "write", _after(2 * TIMEOUT, Output.write), self.last):
                assert manager.save(2, State(arrays=arrays(2))) is not None
                if self.comm.rank != self.last:
                    words = self.told(manager.wait)
                    assert words is not None and f"rank {self.last} ({socket.gethostname()}) did not finish wr" in words
                self.comm.barrier()
                assert manager.save(3, State(arrays=arrays(3))) is None, "it is still busy: all of them skip"
                self.told(manager.wait)
            self.same(self.steps("too-slow"), ["step-00000001"])
            self.saves_again(manager, 4)

    # Ranks that fail

    def check_a_failure_in_each_phase_behind_training(self) -> None:
        for engine in self.engines:
            with self.manager("phases", engine=engine) as manager:
                self.saves_again(manager, 1)
                moving = sys.modules[type(manager.engine).__module__]
                places: list[tuple[Any, str, int, str]] = [
                    (collecting, "take", self.last, "while it collected the state"),
                    (saving, "lay_out", self.last, "when it laid out the file"),
                    (saving, "lay_out", 0, "before anything was written"),
                    (saving.Staging, "fill", self.last, "while it copied its part"),
                    (saving.Staging, "fill", 0, "while it copied its part"),
                    (writing.commit, "begin", 0, "when it made the new file"),
                    (writing, "build_head", 0, "when it made HDF5's metadata"),
                    (writing.commit, "put_head", 0, "when it made HDF5's metadata"),
                    (writing, "wait_for", self.last, "when it opened the new file"),
                    (moving, "block_digests", self.last, "while it wrote its part"),
                    (moving, "block_digests", 0, "while it wrote its part"),
                    (writing.commit, "seal", 0, "while it committed it"),
                    (writing.commit, "publish", 0, "while it committed it"),
                    (writing, "render", 0, "while it committed it"),
                ]
                for number, (where, name, victim, phase) in enumerate(places):
                    step = 10 * (number + 1)
                    self.lines.clear()
                    self.schemas += 1  # so that it is laid out anew

                    def save(step: int = step) -> None:
                        manager.save(step, State(arrays=arrays(step, more=self.schemas)))
                        manager.wait()

                    with self.patched(where, name, _fail, victim):
                        words = self.told_alike(save)
                    assert f"step {step} was not saved: rank {victim} on" in words, (name, words)
                    assert "Input/output error" in words and phase in words, (name, words)
                    assert len(self.lines) <= 1, self.lines
                    self.same([path for path in self.steps("phases") if ".tmp-" in path or f"{step:08d}" in path], [])
                    self.saves_again(manager, step + 1)

    def check_a_save_that_is_abandoned_in_its_last_phase(self) -> None:
        """Where a rank is gone, the others need not wait for the deadline before they begin anew."""
        with self.manager("abandoned", engine="direct") as manager:
            with self.patched(Output, "write", _after(4.0, Output.write), self.last):
                assert manager.save(1, State(arrays=arrays(1))) is not None
                self.comm.barrier()
                began = time.monotonic()
                manager.abandon()
                assert self.comm.rank == self.last or time.monotonic() - began < SLACK, "LONG was not waited for"
            self.comm.barrier()
            self.same(self.steps("abandoned"), [])
            again = Manager(self.root / "abandoned", self.comm, log=self.lines.append)
            self.saves_again(again, 2)
            again.close()

    def check_an_error_in_a_writer_thread(self) -> None:
        """A rank's part is large enough for several threads; one of them fails."""
        images, staging.IMAGE = staging.IMAGE, 1 << 20
        try:
            with self.manager("thread", engine="direct") as manager:
                self.saves_again(manager, 1)
                hit: list[str] = []
                original = Output.write

                def write(*args: Any) -> Any:
                    time.sleep(0.05)  # so that none of them does all the work
                    if threading.current_thread().name.startswith("checkpoint-writer"):
                        hit.append("here")
                        _fail()
                    return original(*args)

                large = {"a": np.arange(12_000_000)}
                with self.patched(Output, "write", write, self.last):
                    assert manager.save(2, State(arrays=large)) is not None
                    words = self.told_alike(manager.wait)
                assert f"rank {self.last} on" in words and "while it wrote its part: Input/output error" in words
                assert bool(hit) is (self.comm.rank == self.last)
                self.same(self.steps("thread"), ["step-00000001"])
                self.saves_again(manager, 3)
        finally:
            staging.IMAGE = images

    def check_short_writes_are_completed(self) -> None:
        original = os.pwrite
        for engine in self.engines:
            with self.manager("short", engine=engine) as manager:
                for victim in (0, self.last):
                    short = lambda at, data, to: original(at, memoryview(data)[: max(1, len(data) // 3)], to)  # noqa: E731
                    with self.patched(os, "pwrite", short, victim):
                        self.saves_again(manager, victim + 1)

    def check_late_failures_are_told_once(self) -> None:
        with self.manager("once", save=every(steps=1), busy="wait") as manager:
            manager.step(1, State(arrays=arrays(1)))
            manager.wait()
            with self.patched(writing.commit, "publish", _fail, 0):
                manager.step(2, State(arrays=arrays(2)))
                self.until_told(manager)
            for _ in range(3):
                manager.poll()
            if self.comm.rank == 0:
                (line,) = self.lines
                assert line.startswith("warning: the checkpoint of step 2 was not saved: ") and "Input/output" in line
            manager.step(3, State(arrays=arrays(3)))
            manager.wait()  # does not raise: a later one succeeded
            self.holds(manager, 3)

    def check_close_tells_that_the_last_one_failed(self) -> None:
        directory = self.root / "close"
        manager = Manager(directory, self.comm, save=every(steps=1), timeout=LONG, log=self.lines.append)
        manager.step(1, State(arrays=arrays(1)))
        manager.wait()
        with self.patched(writing, "render", _fail, 0):
            manager.step(2, State(arrays=arrays(2)))
            words = self.told_alike(manager.close)  # and rank 0 has tidied up
        assert "the checkpoint of step 2 was not saved" in words
        self.same(sorted(path.name for path in directory.iterdir()), ["lease", "step-00000001"])

    # One job at a time

    def check_a_second_job_is_refused_before_it_trains(self) -> None:
        from harness.checkpoint import lease

        with self.manager("two") as manager:
            manager.claim()
            self.saves_again(manager, 1)
            held = lease._held_here.copy()
            lease._held_here.clear()  # as another process has it: within one the lease is shared
            second, lease.GRACE = Manager(self.root / "two", self.comm), 0.2
            for work in (second.claim, lambda: second.save(2, State(arrays=arrays(2)))):
                try:
                    work()
                    words = ""
                except HarnessError as error:
                    words = str(error)
                found: list[Any] = self.comm.all_gather(words)
                assert len(set(found)) == 1 and "is in use by process" in found[0], found
            second.close()
            lease._held_here.update(held)
            self.saves_again(manager, 3)

    # Helpers

    @contextmanager
    def impatient(self, manager: Manager) -> Iterator[None]:
        """A short deadline for a while, so that the saves around it can take their time on a busy machine."""
        saver = manager._saver
        saver._timeout = saver._writer.timeout = TIMEOUT
        try:
            yield
            self.comm.barrier()  # training goes on
        finally:
            saver._timeout = saver._writer.timeout = LONG

    def until_told(self, manager: Manager) -> None:
        """Until the save under way has ended and rank 0 has said so."""
        manager._saver._running.exception()  # type: ignore[union-attr]
        manager.poll()

    @contextmanager
    def patched(self, where: Any, name: str, new: Any, victim: int) -> Iterator[None]:
        """Another function on one rank. It is put back when all ranks are through."""
        original = getattr(where, name)
        if self.comm.rank == victim:
            setattr(where, name, new)
        try:
            yield
        finally:
            self.comm.barrier()
            setattr(where, name, original)


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")


def _after(seconds: float, original: Callable[..., Any]) -> Callable[..., Any]:
    slept = []

    def work(*args: Any) -> Any:
        if not slept:
            slept.append(True)
            time.sleep(seconds)
        return original(*args)

    return work


def main() -> None:
    root, world = Path(sys.argv[1]), sys.argv[2]
    if world == "gloo":
        import horovod.torch as hvd

        hvd.init()
    comm = detect()
    assert isinstance(comm, Mpi if world == "mpi" else Horovod), comm
    checks = Checks(comm, root)
    for name in vars(Checks):
        if name.startswith("check_") and re.search(sys.argv[3] if len(sys.argv) > 3 else "", name):
            began = time.monotonic()
            getattr(checks, name)()
            if comm.rank == 0:
                print(f"{name} ok, {time.monotonic() - began:.1f} s", flush=True)
    comm.barrier()
    if comm.rank == 0:
        print("all checks passed", flush=True)


if __name__ == "__main__":
    all_or_none(main, mpi=sys.argv[2] == "mpi")
