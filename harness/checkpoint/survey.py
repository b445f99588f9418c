"""What lies in a checkpoints directory, told quickly: names, sizes and the beginnings and ends of manifests.

    for entry in survey(Path("runs/exp7/checkpoints")):
        print(entry.step, entry.state, entry.metrics)

For people who look, not for programs that restore: `good` means here that the manifest, as far as it was read, and the
size of the data file are as they should be. `store.check` looks at more, `verify` at everything.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from harness.checkpoint.commit import DATA, MANIFEST, TEMPORARY
from harness.checkpoint.manifest import MAX_TEXT, VERSION
from harness.checkpoint.names import ASIDE, DAMAGED, parse_name
from harness.checkpoint.tags import read_tags

State = Literal["good", "set aside", "damaged", "newer", "incomplete"]
"""newer: written by a newer program than this."""

WHOLE = 4 << 20
"""Manifests up to this size are read whole, of larger ones only so much at both ends."""
_END = 1 << 20
_LEAVES = b'"leaves":['
_AFTER = b'],"aliases":'
_METRICS = b',"metrics":{'


@dataclass(frozen=True)
class Entry:
    """One directory. What could not be found out is None."""

    path: Path
    step: int | None
    number: int
    state: State
    bytes: int
    created: float | None = None
    world: int | None = None
    tensors: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class _Head:
    created: float
    world: int
    data: int
    tensors: int | None
    metrics: dict[str, Any]


def survey(directory: Path, *, everything: bool = False) -> list[Entry]:
    """What there is, oldest first; with `everything` also what was not completed. Raises OSError."""
    tags: dict[str, list[str]] = {}
    for tag, name in read_tags(directory).items():
        tags.setdefault(name, []).append(tag)
    found = []
    with os.scandir(directory) as entries:
        for item in entries:
            name, temporary, _ = item.name.partition(TEMPORARY)
            parsed = parse_name(name)
            if parsed is None or not item.is_dir(follow_symlinks=False):
                continue
            try:
                inside = {one.name for one in os.scandir(item.path)}
                if temporary or MANIFEST not in inside:
                    if everything:
                        found.append(_incomplete(Path(item.path), parsed))
                    continue
                found.append(_entry(Path(item.path), parsed, inside, tuple(tags.get(name, ()))))
            except FileNotFoundError:
                continue  # it went while we looked
    return sorted(found, key=lambda entry: (entry.step or 0, entry.number, entry.state == "incomplete"))


def _incomplete(path: Path, parsed: tuple[int, int]) -> Entry:
    size = sum(one.stat(follow_symlinks=False).st_size for one in os.scandir(path))
    return Entry(path, *parsed, "incomplete", size, created=path.stat().st_mtime)


def _entry(path: Path, parsed: tuple[int, int], inside: set[str], tags: tuple[str, ...]) -> Entry:
    size = sum(os.lstat(path / name).st_size for name in (DATA, MANIFEST) if name in inside)
    head: _Head | None = None
    state: State = "good"
    note: str | None = None
    try:
        head = _read(path / MANIFEST)
        data = os.lstat(path / DATA)
        if not stat.S_ISREG(data.st_mode) or data.st_size != head.data:
            state, note = "damaged", f"{DATA} has {data.st_size} bytes, not {head.data}"
    except _Newer as error:
        state, note = "newer", str(error)
    except FileNotFoundError:
        state, note = "damaged", f"there is no {DATA}"
    except OSError as error:
        state, note = "damaged", f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        state, note = "damaged", f"the manifest is damaged: {str(error)[:100]}"
    if state == "good" and DAMAGED in inside:
        state, note = "damaged", _remark(path / DAMAGED)
    elif state == "good" and ASIDE in inside:
        state = "set aside"
    if head is None:
        return Entry(path, *parsed, state, size, tags=tags, note=note)
    return Entry(path, *parsed, state, size, head.created, head.world, head.tensors, head.metrics, tags, note)


class _Newer(Exception):
    pass


def _read(path: Path) -> _Head:
    """The fields at the two ends of a manifest. Raises OSError, ValueError, KeyError, TypeError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TEXT:
            raise ValueError("it is no file that a manifest can be")
        if status.st_size <= WHOLE:
            text = os.pread(descriptor, WHOLE, 0)
            first, _, rest = text.partition(b"\n")
            if first != f'{{"checksum":"{xxhash.xxh3_128_hexdigest(rest)}",'.encode():
                raise ValueError("it does not match its checksum")
            begin, end = rest, rest
        else:
            begin = os.pread(descriptor, _END, 0).partition(b"\n")[2]
            end = os.pread(descriptor, _END, status.st_size - _END)
    finally:
        os.close(descriptor)
    at = begin.index(_LEAVES)
    head = json.loads(b"{" + begin[:at].rstrip(b",") + b"}")
    if type(head["version"]) is int and head["version"] > VERSION:
        raise _Newer(f"format version {head['version']}; this program reads up to {VERSION}")
    stop = begin.find(_AFTER, at)
    info, metrics = _tail(end)
    tensors = begin.count(b'{"name":', at, stop) if stop > 0 else info.get("tensors")
    return _Head(
        float(head["created"]), int(head["world"]), int(head["file"]["data_end"]),
        tensors if type(tensors) is int else None, metrics,
    )  # fmt: skip


def _tail(text: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(info, metrics), which end the text. In JSON no quote of a text stands without a backslash before it."""
    at = len(text)
    while (at := text.rfind(_METRICS, 0, at)) >= 0:
        try:
            value = json.loads(b"{" + text[at + 1 :])
        except ValueError:
            continue
        if set(value) == {"metrics", "info"} and isinstance(value["info"], dict):
            return value["info"], value["metrics"]
    return {}, {}


def _remark(path: Path) -> str:
    """Why somebody marked it, if that can be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            message = str(json.loads(os.read(descriptor, 1 << 16))["message"])
        finally:
            os.close(descriptor)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "it is marked as damaged"
    return re.sub(r"\s+", " ", message)[:500]
