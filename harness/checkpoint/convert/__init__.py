"""Checkpoints to and from the files of others: safetensors, npz, torch, plain HDF5. In bounded memory, by one process.

    from harness.checkpoint.convert import export_checkpoint, import_checkpoint

    export_checkpoint("runs/exp7/checkpoints/step-00001200", "model.safetensors")
    import_checkpoint("model.safetensors", "runs/new/checkpoints")

A tensor passes through in parts of some MiB, whatever its size. What is read from a checkpoint is checked against its
digests; what is read from elsewhere is not trusted: nothing in it is run, sizes and places are checked before they are
used, and no other file is read than the one that was named (and, of a set in shards, those beside it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from harness.checkpoint.convert.dtypes import fitted, wanted
from harness.checkpoint.convert.names import choose, common_entry, matches, unescape
from harness.checkpoint.convert.stored import read_checkpoint
from harness.checkpoint.convert.target import target
from harness.checkpoint.convert.tensor import Progress, Source, counted
from harness.checkpoint.convert.writing import write_checkpoint
from harness.checkpoint.reader import open_checkpoint
from harness.checkpoint.schema import ITEMSIZE, escape
from harness.checkpoint.store import latest
from harness.errors import DataError, InputMissing, StorageError, UsageError

FORMATS = {
    "safetensors": (".safetensors",),
    "npz": (".npz",),
    "torch": (".pt", ".pth", ".ckpt", ".bin"),
    "hdf5": (".h5", ".hdf5"),
}
"""Formats and how the names of their files end. Each has a module here with DTYPES, `write` and `read`."""
_MODULES = {"torch": "pytorch"}
_HEADERS = 1 << 20


@dataclass(frozen=True)
class Done:
    """What was written: `tensors` and their `nbytes`, without second names. `notes`: what a user should know."""

    path: Path
    tensors: int
    nbytes: int
    notes: tuple[str, ...]


def export_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str | None = None,
    only: Sequence[str] = ("model/*",),
    strip: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Done:
    """Write the tensors of a checkpoint (a `step-...` directory) into one file of another format.

    `to`: a key of FORMATS; None: by the name of `out`. `only`: globs on names in the checkpoint. `strip`: what names
    lose at their beginning; None: the first component, where all have the same, so that the names are those of the
    model's state_dict. `dtype`: bf16, fp16 or fp32 for all floats. `force`: replace `out`, which is otherwise an error.

    `out` is whole or as it was. Raises InputMissing, Damaged, UsageError, DataError, StorageError.
    """
    path = Path(out)
    kind = format_of(path, to)
    module, chosen_dtype = _module(kind), wanted(dtype)
    with open_checkpoint(source) as checkpoint:
        if path.resolve().is_relative_to(checkpoint.path.resolve()):
            raise UsageError(f"{path} lies in the checkpoint itself")
        with read_checkpoint(checkpoint) as held:
            notes = _leave_out_extra_state(held, checkpoint.manifest.state)
            prefix = common_entry(held, only) if strip is None else strip
            tensors, aliases = choose(held, only, prefix, str if kind == "hdf5" else unescape)
            tensors = fitted(tensors, chosen_dtype, module.DTYPES, kind, notes)
            sizes = {tensor.name: tensor.nbytes for tensor in tensors}
            copies = [] if kind in ("hdf5", "torch") else [sizes[first] for first in aliases.values()]
            if copies:
                notes.append(f"{kind} knows no second names: {len(copies)} shared tensors are stored once per name")
            total = sum(sizes.values()) + sum(copies)
            if progress is not None:
                tensors = counted(tensors, progress, total)
            with target(path, total + _HEADERS, force=force) as temporary:
                module.write(temporary, tensors, aliases)
    return Done(path, len(tensors), total, tuple(notes))


def import_checkpoint(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    step: int = 0,
    entry: str = "model",
    kind: str = "module",
    from_: str | None = None,
    key: str | None = None,
    only: Sequence[str] = (),
    strip: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Done:
    """Make a checkpoint in `directory` (where `step-...` directories lie) from a file of another format.

    `entry` and `kind`: what the tensors become, so that `State(entry=...)` takes them: a "module", or "tensors", a dict
    of tensors. `from_`: a key of FORMATS; None: by the name of `source`. `key`: for torch, which of several dicts in
    the file. `only`: globs on names in the file. `strip`: what names lose at their beginning, as "module.". `dtype`:
    bf16, fp16 or fp32 for all floats.

    Raises InputMissing, UsageError, DataError, StorageError; then there is no new checkpoint.
    """
    path = _file_in(Path(source))
    if kind not in ("module", "tensors"):
        raise UsageError(f"tensors cannot become a {kind!r}", hint="use module, or tensors")
    if step < 0:
        raise UsageError(f"the step is {step}; steps count from 0")
    chosen_dtype, name = wanted(dtype), format_of(path, from_)
    if key is not None and name != "torch":
        raise UsageError(f"--key is for files of torch, {path.name} is one of {name}")
    with _read(name, path, only, key) as held:
        notes = held.notes
        tensors, aliases = choose(held, only, strip, lambda text: f"{escape(entry)}/{escape(text)}")
        tensors = fitted(tensors, chosen_dtype, ITEMSIZE, "a checkpoint", notes)
        total = sum(tensor.nbytes for tensor in tensors)
        if progress is not None:
            tensors = counted(tensors, progress, total)
        state: dict[str, Any] = {entry: {"kind": kind}}
        made = write_checkpoint(Path(directory), step, tensors, aliases, state, {"imported": path.name})
    newest = latest(directory)
    if newest is not None and newest != made:
        notes.append(f"it is not the newest: a restore takes {newest.name}")
    return Done(made, len(tensors), total, tuple(notes))


def format_of(path: Path, name: str | None) -> str:
    """A key of FORMATS: `name`, or what the file's name ends with. Raises UsageError."""
    if name is not None:
        if name not in FORMATS:
            raise UsageError(f"there is no format {name!r}", hint=f"use one of {', '.join(FORMATS)}")
        return name
    if path.name.endswith(".safetensors.index.json"):
        return "safetensors"
    found = next((name for name, suffixes in FORMATS.items() if path.suffix.lower() in suffixes), None)
    if found is None:
        raise UsageError(
            f"the format of {path.name} is not clear from its name", hint=f"name one: {', '.join(FORMATS)}"
        )
    return found


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{_MODULES.get(name, name)}")


def _read(name: str, path: Path, only: Sequence[str], key: str | None) -> Source:
    def is_wanted(tensor: str) -> bool:
        return matches(tensor, only)

    read: Callable[..., Source] = _module(name).read
    options: dict[str, Any] = {"key": key} if name == "torch" else {}
    try:
        return read(path, is_wanted, **options)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


def _file_in(path: Path) -> Path:
    """The path, or the safetensors in it where it is a directory, as models are published."""
    if not path.is_dir():
        return path
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (path / name).exists():
            return path / name
    raise InputMissing(f"there is no model.safetensors in {path}", hint="name the file itself")


def _leave_out_extra_state(held: Source, state: Mapping[str, Any]) -> list[str]:
    """What modules return as `get_extra_state` are Python values, with tensors in them or not."""
    extra = [entry for entry, record in state.items() if isinstance(record, dict) and record.get("extra")]
    roots = tuple(f"{escape(entry)}/_extra_state/" for entry in extra)
    held.tensors = [tensor for tensor in held.tensors if not tensor.name.startswith(roots)]
    return [f"the extra state of modules of {entry} is left out: other formats hold tensors only" for entry in extra]


__all__ = ["FORMATS", "DataError", "Done", "export_checkpoint", "format_of", "import_checkpoint"]
