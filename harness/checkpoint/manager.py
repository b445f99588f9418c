"""The object a training script holds: save the state behind training, restore the newest one that is good.

    manager = Manager("runs/exp7/checkpoints", save=every(steps=500) | on_stop(), keep=keep_last(3))
    state = State(model=model, optimizer=optimizer, extra={"epoch": 0})
    start = manager.restore(state) or 0
    for step in range(start, steps):
        ...
        if manager.step(step + 1, state, metrics={"val/loss": loss}):
            break                                    # asked to stop; the state is saved
    manager.close()

The constructor and all methods but `fence` and `abandon` are collective: all ranks call them in the same order. What
fails on one rank is told to all of them. A save that fails leaves the earlier checkpoints as they were, and training
goes on: it is told in a warning, and raised by `close` where no later one succeeded. One job at a time saves into a
directory: the first save of a second one raises InUse. A job that went back to an older step sets aside what is newer.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from harness.checkpoint.agree import SaveFailed, attempt, describe
from harness.checkpoint.asked import Asked
from harness.checkpoint.comm import Comm, Json, detect
from harness.checkpoint.delivery import Read, known
from harness.checkpoint.engines import EngineName, choose
from harness.checkpoint.loading import Loader
from harness.checkpoint.partial import Partial
from harness.checkpoint.policy import Keep, When, keep_last
from harness.checkpoint.restoring import Report
from harness.checkpoint.saving import Saver
from harness.checkpoint.snapshot import no_collection
from harness.checkpoint.state import State
from harness.checkpoint.writing import Outcome
from harness.errors import StorageError, UsageError

T = TypeVar("T")


class Manager:
    """Checkpoints in one directory.

    save: when `step` saves; None: only `save` does.
    keep: which checkpoints stay; the newest always does. None: the last 3.
    comm: None finds out (`comm.detect`).
    engine: "auto", "direct", "mpio" (independent) or "mpio-collective".
    background: `save` returns once this rank's slice is copied, and a thread writes it; False: once it is durable.
    lazy: what optimizers of the state change is copied in that thread too; the optimizer's next step waits for
        it (`fence`). Only for loops that change them nowhere else.
    busy: what a save does while an earlier one is under way: "skip" it, or "wait" for the earlier one.
    timeout: seconds after which ranks that did not come are named and the save is given up.
    check_replicas: at the first save and every n-th after it, compare the replicas of all ranks; 0 never does.
    strict: replicas that are not equal are an error, and nothing is saved; else rank 0's copy is, with a warning.
    read: "exchange": ranks read shares and send each other what they want; "all": each reads for itself.
    info: JSON that is put into every manifest.
    log: gets a line for the user, on rank 0 only. None: a warning of the logger "harness.checkpoint".
    saved: called on rank 0 with the `Outcome` of each save that succeeded, from within a later call of this object.

    Raises Unavailable where the engine cannot work here.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        comm: Comm | None = None,
        *,
        save: When | None = None,
        keep: Keep | None = None,
        engine: EngineName = "auto",
        background: bool = True,
        lazy: bool = False,
        busy: Literal["skip", "wait"] = "skip",
        timeout: float = 600.0,
        check_replicas: int = 10,
        strict: bool = False,
        read: Read = "exchange",
        info: Mapping[str, Json] | None = None,
        log: Callable[[str], None] | None = None,
        saved: Callable[[Outcome], None] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.comm: Comm = detect() if comm is None else comm
        self._when = _rule(When, When() if save is None else save, "save", "every(steps=500) | on_stop()")
        self._background, self._lazy, self._busy = background, lazy, busy
        self._tell = logging.getLogger("harness.checkpoint").warning if log is None else log
        self._saved = saved
        self.engine = choose(engine, self.comm, self._log, directory=self.directory)
        self._saver = Saver(
            self.directory,
            self.comm,
            self.engine,
            keep=_rule(Keep, keep_last(3) if keep is None else keep, "keep", "keep_last(3)"),
            timeout=timeout,
            check_replicas=check_replicas,
            strict=strict,
            lazy=lazy,
            info=info or {},
        )
        self._read = known(read)
        self._asked = Asked(self.directory, self.comm, self._when)
        self._hooked: weakref.WeakSet[Any] = weakref.WeakSet()
        self.report = Report()
        """What the last restore did with each tensor."""
        self._failure: SaveFailed | None = None
        self._last: tuple[int, State, Mapping[str, float] | None] | None = None
        self._last_saved: int | None = None
        self._skipping = self._closed = False

    def step(self, step: int, state: State, metrics: Mapping[str, float] | None = None) -> bool:
        """After `step` steps: save if it is time to. True when the job was asked to stop; the state is then saved.

        Costs nothing that is not due: the clock and stops are asked for about once a second, in one small exchange.
        """
        _check(state)
        step = _whole(step)
        self.poll()
        self._last = (step, state, metrics)
        asked = self._asked.after(step)
        if asked.stop:
            self.save(step, state, metrics, wait=True)
        elif asked.save or self._when.at(step):
            self._asked.saved()
            self._try(step, state, metrics)
        return asked.stop

    def save(
        self, step: int, state: State, metrics: Mapping[str, float] | None = None, *, wait: bool | None = None
    ) -> Path | None:
        """Save now; returns the path that the checkpoint has, or is going to have. None: skipped, one is under way.

        wait: return once it is durable (None: as `background` says).
        Raises, on all ranks alike, SaveFailed where it cannot begin or, when waiting, where it fails; InUse.
        """
        _check(state)
        step = _whole(step)
        if self._closed:
            raise UsageError("this Manager has been closed", hint="close it after the last save")
        wait = not self._background if wait is None else wait
        self._end(wait=wait or self._busy == "wait")
        if self._lazy:
            self._hook(state)
        try:
            path = self._saver.start(step, state, metrics)
        finally:
            self._flush()
        if path is None:
            if not self._skipping:
                self._log(f"no checkpoint at step {step}: the one before is still being written")
            self._skipping = True
            return None
        self._skipping, self._last_saved = False, step
        self._end(wait=wait)
        if wait:
            self._raise_failure()
        return path

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics that are known only after the newest checkpoint, of this step, was made. Waits for it. Collective.

        Raises StorageError, on all ranks alike, where its manifest cannot be written; it then is as it was.
        """
        self._end(wait=True)
        told: Any = None
        if self.comm.rank == 0:
            told = describe(attempt(lambda: self._saver.add_metrics(step, dict(metrics)))[1])
        told = self.comm.broadcast(told)
        if told is not None:
            raise StorageError(f"metrics of step {step} could not be added: {told['message']}", hint=told["hint"])

    def poll(self) -> None:
        """Tell how the last save ended, if it has by now. Cheap. Local, though best called by all ranks."""
        self._end(wait=False)

    def wait(self) -> None:
        """Return once no save is under way. Raises SaveFailed, on all ranks alike, where the last one failed."""
        self._end(wait=True)
        self._raise_failure()

    def fence(self) -> None:
        """Lazy saves: return once the state may change. Optimizers of the state call it before their step. Local."""
        self._saver.fence()

    def claim(self) -> None:
        """Make sure now, rather than at the first save, that no other job saves here. Raises InUse, StorageError."""
        self._saver.claim()
        self._flush()

    def restore(self, state: State, which: int | str = "latest", *, partial: Partial | None = None) -> int | None:
        """Bring the state to that of a checkpoint; returns its step, None where there is none.

        which: "latest" is the newest that is good: one that is damaged is passed over for the one before, and a line
        says so. A step, a tag, "best:METRIC" or "best:METRIC:max" name one checkpoint, which must be good.
        partial: a `Partial`, see there; by default all must fit. `report` then says what was kept, left out, converted.

        Raises DataError, on all ranks alike, where the checkpoint does not fit the state (which is then unchanged) or
        where none of several is good; InputMissing where the one that is named does not exist.
        """
        _check(state)
        self._end(wait=True)
        loader = Loader(self.directory, self.comm, self._saver.good, self._log, self._read)
        with no_collection():
            found = loader.newest(state, partial) if which == "latest" else loader.chosen(which, state, partial)
        self.report = loader.report
        self._saver.restored()
        return None if found is None else found.step

    def close(self) -> None:
        """End the saves that are under way, save the end where `at_end` asks for it, and wait for all ranks.

        Raises SaveFailed, on all ranks alike, where the last save failed.
        """
        try:
            self._end(wait=True)
            if self._when.end and self._last is not None and self._last_saved != self._last[0]:
                step, state, metrics = self._last
                self.save(step, state, metrics, wait=True)
            self.comm.barrier()
            self._raise_failure()
        finally:
            self._give_back()

    def abandon(self) -> None:
        """End where other ranks are gone: a save that is under way is given up. Local."""
        self._saver.give_up()
        outcome = self._saver.outcome(wait=True)
        if outcome is not None and outcome.failed is not None:
            self._log(f"the checkpoint of step {outcome.step} was given up")
        self._failure = None
        self._give_back()

    def __enter__(self) -> Manager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # the other ranks may be elsewhere: nothing collective
            self._end(wait=True)
            self._give_back()

    def _try(self, step: int, state: State, metrics: Mapping[str, float] | None) -> None:
        try:
            self.save(step, state, metrics)
        except SaveFailed as error:
            self._failure = error
            self._log(f"warning: {error}")

    def _end(self, *, wait: bool) -> None:
        """Take note of how the running save ended."""
        outcome = self._saver.outcome(wait=wait)
        self._flush()
        if outcome is None:
            return
        if outcome.failed is None:
            self._failure = None
            if self._saved is not None and self.comm.rank == 0:
                self._saved(outcome)
            return
        self._last_saved = None
        self._failure = SaveFailed(
            f"the checkpoint of step {outcome.step} was not saved: {outcome.failed}", hint=outcome.hint
        )
        self._log(f"warning: {self._failure}")

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _hook(self, state: State) -> None:
        for name, value in state.entries.items():
            if state.kinds[name] == "optimizer" and value not in self._hooked:
                value.register_step_pre_hook(lambda *_: self.fence())
                self._hooked.add(value)

    def _give_back(self) -> None:
        self._closed = True
        self._saver.close()
        self._flush()
        self._asked.close()

    def _flush(self) -> None:
        while not self._saver.lines.empty():
            self._log(self._saver.lines.get())

    def _log(self, line: str) -> None:
        if self.comm.rank == 0:
            self._tell(line)


def _check(state: State) -> None:
    """Raises UsageError, on all ranks alike: it is the script that is wrong."""
    if not isinstance(state, State):
        raise UsageError(
            f"a checkpoint is made of a State, not of {type(state).__name__}",
            hint="for example State(model=model, optimizer=optimizer)",
        )


def _whole(step: int) -> int:
    """Raises UsageError, as `_check`."""
    try:
        return index(step)
    except TypeError:
        raise UsageError(f"the step {step!r} is no whole number") from None


def _rule(kind: type[T], given: object, name: str, example: str) -> T:
    """Raises UsageError, as `_check`."""
    if not isinstance(given, kind):
        raise UsageError(f"Manager({name}={given!r}): that is no rule", hint=f"for example {name}={example}")
    return given
