"""`harness ckpt export` and `import`: checkpoints to and from the files of others. The work is in `checkpoint.convert`.

harness ckpt export runs/exp7@latest model.safetensors
harness ckpt import model.safetensors runs/new --strip module.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from harness.checkpoint.convert import Done

FORMATS = "safetensors|npz|torch|hdf5"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="bf16|fp16|fp32", help="Convert all floats to this.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `harness ckpt`."""
    app.command(name="export")(export)
    app.command(name="import")(import_)


def export(
    source: Annotated[str, typer.Argument(metavar="RUN[@WHICH]", help="@latest, @1200, @best:val/loss, @TAG; a path.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    to: Annotated[str | None, typer.Option("--to", metavar=FORMATS, help="Without: by OUT's name.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="GLOB", help="Tensors; without: model/*.")] = None,
    strip: Annotated[
        str | None,
        typer.Option("--strip", metavar="PREFIX", help="What names lose; without: their first part, if all share it."),
    ] = None,
    dtype: Dtype = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the model of a checkpoint as safetensors, npz, torch or plain HDF5. OUT is whole, or as it was."""
    from harness.checkpoint.convert import export_checkpoint
    from harness.checkpoint.select import resolve
    from harness.errors import StorageError
    from launch.ckpt_show import bar

    _without_mpi()
    try:
        path = resolve(source)
    except OSError as error:
        raise StorageError(f"{source} cannot be read: {error.strerror or error}") from error
    with bar(out.name, quiet=as_json) as progress:
        done = export_checkpoint(
            path, out, to=to, only=only or ["model/*"], strip=strip, dtype=dtype, force=force, progress=progress
        )
    _show("wrote", done, as_json)


def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Or FILE.safetensors.index.json, or a directory.")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="A run or checkpoints directory, or a new one.")
    ],
    step: Annotated[int, typer.Option("--step", min=0, help="The step of the checkpoint.")] = 0,
    entry: Annotated[str, typer.Option("--as", metavar="NAME", help="What State calls it.")] = "model",
    kind: Annotated[str, typer.Option("--kind", metavar="module|tensors", help="A model, or a dict.")] = "module",
    from_: Annotated[str | None, typer.Option("--from", metavar=FORMATS, help="Without: by FILE's name.")] = None,
    key: Annotated[str | None, typer.Option("--key", metavar="NAME", help="For torch: which dict in the file.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="GLOB", help="Tensors; without: all.")] = None,
    strip: Annotated[str | None, typer.Option("--strip", metavar="PREFIX", help="What names lose: module.")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint from safetensors, npz, torch or HDF5. Nothing in the file is run; other files are not read."""
    from harness.checkpoint.convert import import_checkpoint
    from launch.ckpt_show import bar

    _without_mpi()
    place = _checkpoints(directory)
    with bar(source.name, quiet=as_json) as progress:
        done = import_checkpoint(
            source,
            place,
            step=step,
            entry=entry,
            kind=kind,
            from_=from_,
            key=key,
            only=only or [],
            strip=strip,
            dtype=dtype,
            progress=progress,
        )
    _show("made", done, as_json)


def _checkpoints(directory: Path) -> Path:
    """The checkpoints directory that is meant; one that is not there will be made."""
    from harness.checkpoint.select import locate
    from harness.errors import UsageError

    if not os.path.isdir(directory):
        return directory
    place = locate(directory)
    if place.path is not None:
        raise UsageError(f"{directory} is one checkpoint; give the directory it is to stand beside: {place.directory}")
    return place.directory


def _without_mpi() -> None:
    """A login node may not start MPI, which an h5py that is built with it does as it is imported."""
    from harness.checkpoint.convert.hdf5 import without_mpi

    without_mpi()


def _show(verb: str, done: Done, as_json: bool) -> None:
    from dataclasses import asdict

    from harness.units import show_size
    from launch.ckpt_show import clean, print_json, tell

    if as_json:
        print_json({**asdict(done), "path": str(done.path)})
        return
    for note in done.notes:
        tell(f"note: {note}")
    tensors = "1 tensor" if done.tensors == 1 else f"{done.tensors} tensors"
    print(clean(f"{verb} {done.path}: {tensors}, {show_size(done.nbytes)}"))
