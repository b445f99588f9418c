"""One run's directory: what lies where, and who may write it. Used by the launcher and inside ranks alike.

RUN/config.yaml            the frozen config: `harness run RUN` goes on with it
    config.1.yaml          the one before, when a run went on with other free fields
    lock                   held by `harness run` while it runs
    status.json            state, step, rate, last checkpoint; written by rank 0
    metrics.jsonl          one line per log interval, evaluation and event
    checkpoints/           see `harness.checkpoint`
    stop                   when this file appears, the run saves its state and stops
    hosts                  the hosts of an elastic run, `name:slots` per line; change it while it runs
    save                   when this file appears, the run makes a checkpoint and removes it
    attempts/0001/         one per start of the run
        command.json       what was started, where, with what environment
        logs/rank-0.log    everything each rank printed
        errors/rank-0.json a rank's exception: type, message, traceback, host, step, section
        heartbeats/rank-0.json   where each rank is, every few seconds
        stacks             when this file appears, every rank writes the stacks of its threads into its log
        ending.json        how it ended, and what came of it
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError, InputMissing, StorageError
from harness.heartbeat import Heartbeat, parse

if TYPE_CHECKING:
    from harness.config import Config


CONSEQUENCES = ("HorovodInternalError",)
"""Errors a rank has because another one failed first."""


ROLL_BACK = "HARNESS_ROLL_BACK"
"""Environment variable: the name of the checkpoint that the ranks of this start go back to."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    root: Path

    @property
    def number(self) -> int:
        return int(self.root.name)

    @property
    def command(self) -> Path:
        return self.root / "command.json"

    def log(self, rank: int) -> Path:
        return self.root / "logs" / f"rank-{rank}.log"

    def error(self, rank: int) -> Path:
        return self.root / "errors" / f"rank-{rank}.json"

    def heartbeat(self, rank: int) -> Path:
        return self.root / "heartbeats" / f"rank-{rank}.json"

    def heartbeats(self) -> dict[int, Heartbeat]:
        """The last readable heartbeat of each rank."""
        found = [parse(read_object(path)) for path in (self.root / "heartbeats").glob("rank-*.json")]
        return {one.rank: one for one in sorted(filter(None, found), key=lambda one: one.rank)}

    def forget(self, size: int) -> list[dict[str, Any]]:
        """A new world of so many ranks begins: what others have left no longer tells how this attempt ends.

        Returns the errors that were survived; their files stay, under another name.
        """
        survived = self.errors()
        for path in (self.root / "heartbeats").glob("rank-*.json"):
            if int(path.stem.removeprefix("rank-")) >= size:
                path.unlink(missing_ok=True)
        for path in (self.root / "errors").glob("rank-*.json"):
            os.replace(path, path.with_name(f"survived-{time.time_ns()}-{path.name}"))
        return survived

    @property
    def stacks(self) -> Path:
        return self.root / "stacks"

    @property
    def ending(self) -> Path:
        return self.root / "ending.json"

    def errors(self) -> list[dict[str, Any]]:
        """All readable error files, the cause first: by time, but Horovod's "a peer is gone" comes last."""
        found = [read_object(path) for path in sorted((self.root / "errors").glob("rank-*.json"))]
        return sorted((error for error in found if error), key=_precedence)


@dataclass(frozen=True)
class RunDir:
    """The paths of one run; creating the object touches nothing."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def hosts(self) -> Path:
        return self.root / "hosts"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
    def save(self) -> Path:
        return self.root / "save"

    def attempt(self, number: int) -> Attempt:
        return Attempt(self.root / "attempts" / f"{number:04d}")

    def attempts(self) -> list[Attempt]:
        """Existing attempts, oldest first."""
        folder = self.root / "attempts"
        names = [path.name for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
        return [Attempt(folder / name) for name in sorted(names, key=int)]

    def new_attempt(self) -> Attempt:
        """Create the next attempt's folders. Raises StorageError where the directory cannot be written."""
        number = max((attempt.number for attempt in self.attempts()), default=0) + 1
        with storage_errors(self.root):
            while True:
                attempt = self.attempt(number)
                try:
                    attempt.root.mkdir(parents=True)
                    break
                except FileExistsError:  # another start took the number
                    number += 1
            (attempt.root / "logs").mkdir()
            (attempt.root / "errors").mkdir()
            (attempt.root / "heartbeats").mkdir()
        return attempt

    def read_status(self) -> dict[str, Any]:
        """The last status, {} before the first."""
        return read_object(self.status)


def make_root(config: Config) -> RunDir:
    """The run directory of a config, made where it is not there. Raises StorageError."""
    run = RunDir(Path(config.directory))
    with storage_errors(run.root):
        try:
            run.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            taken = next(path for path in (run.root, *run.root.parents) if os.path.lexists(path) and not path.is_dir())
            raise StorageError(f"{taken} is not a directory", hint="choose another run_dir") from error
    return run


def open_run(config: Config) -> RunDir:
    """Make or enter the run directory of a config and freeze the config in it. Idempotent; one process calls it.

    `checkpoint.resume: false` is about this start, which must be the first one that saves; the run's later starts go on
    from its checkpoints. A run goes on only with a config of the same mathematics (`harness.config.MATHEMATICS`),
    unless all its starts ended before the first step: a mistake that was found then binds nobody. Where other fields
    differ, the new config is frozen and the old one kept as `config.<n>.yaml`. Raises ConfigError naming what differs,
    StorageError where the directory cannot be made or written.
    """
    from harness.frozen import compare, freeze

    run = make_root(config)
    frozen = find_frozen(run, config)
    if not config.checkpoint.resume:
        config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": True})})
    if frozen is None:
        write_atomic(run.config, freeze(config))
        return run
    if compare(frozen, config, under=tuple(type(config).model_fields)):
        with storage_errors(run.config):
            before = run.config.read_text(encoding="utf-8")
        number = 1
        while (kept := run.root / f"config.{number}.yaml").exists():
            number += 1
        write_atomic(kept, before)  # first, so that at no moment a config is lost
        write_atomic(run.config, freeze(config))
    return run


def find_frozen(run: RunDir, config: Config) -> Config | None:
    """The config of what is in a run directory, None where nothing is. Raises ConfigError where this one cannot go on.

    Writes nothing.
    """
    from harness.config import FREE, MATHEMATICS
    from harness.frozen import compare
    from harness.resolve import resolve

    if not config.checkpoint.resume and _has_checkpoints(run):
        raise ConfigError(
            f"{run.root} already holds checkpoints, and checkpoint.resume is false",
            hint="choose another run_dir, or go on from them with checkpoint.resume=true",
        )
    if not os.path.lexists(run.config):
        return None
    frozen = resolve(run.config).config
    if (changed := compare(frozen, config, under=MATHEMATICS, but=FREE)) and not _never_trained(run):
        raise ConfigError(
            "\n  ".join([f"{run.root} holds a run that computes something else than this config:", *changed]),
            hint="choose another run_dir, or go on with that run's values",
        )
    return frozen


def _never_trained(run: RunDir) -> bool:
    return bool(run.attempts()) and not _has_checkpoints(run) and not run.read_status().get("step")


def _has_checkpoints(run: RunDir) -> bool:
    return any(run.checkpoints.glob("step-*")) if run.checkpoints.is_dir() else False


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's errors about a path into sentences."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputMissing(f"{error.filename or where} is not there") from error
    except OSError as error:
        place = error.filename or where
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no space left for {place}", hint="free some, or choose another run_dir") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"{place} cannot be written ({os.strerror(error.errno)})", hint="choose another run_dir"
            ) from error
        raise StorageError(f"{place}: {error.strerror or error}") from error


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file as a whole: a reader sees the old or the new one. Raises StorageError."""
    with storage_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def write_json(path: Path, value: object) -> None:
    """`write_atomic` for a JSON value."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def _precedence(error: dict[str, Any]) -> tuple[bool, float]:
    time = error.get("time")
    return error.get("type") in CONSEQUENCES, float(time) if isinstance(time, (int, float)) else 0.0


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
