"""`harness data`: the parts of an HDF5 data set, for runs in which each rank trains on a part of its own.

harness data partition "train-*.h5" -o parts.h5 --parts 8 --by groups --of user
harness data split "train-*.h5" parts.h5 -o parts/

Parsing and printing only; the work is in `harness.partition`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from harness.hdf5data import Hdf5Dataset
    from harness.partition.balance import Part

METHODS = "random|contiguous|groups|ranges|kmeans|ward"

app = typer.Typer(name="data", help="Parts of an HDF5 data set, one or more for each rank.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="DATA", help="A file, or a pattern in quotes as 'train-*.h5'.")]
Fields = Annotated[
    str | None, typer.Option("--fields", metavar="A,B", help="Fields of the data set; without: all in the first file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def partition(
    source: Source,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PARTS.h5", help="The file to write.")],
    parts: Annotated[
        int | None, typer.Option("-p", "--parts", min=1, help="How many parts: the ranks, or a multiple.")
    ] = None,
    by: Annotated[str, typer.Option("--by", metavar=METHODS, help="How samples are spread.")] = "random",
    of: Annotated[
        str, typer.Option("--of", metavar="FIELD", help="The attribute, or the features, to go by and to report on.")
    ] = "",
    sizes: Annotated[
        str | None, typer.Option("--sizes", metavar="4,2,1", help="Relative sizes of the parts; without: equal.")
    ] = None,
    fields: Fields = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="For random, kmeans and ward.")] = 0,
    json: AsJson = False,
) -> None:
    """Decide which part each sample belongs to, and tell how even that is. No sample is copied.

    random; contiguous: neighbours stay together; groups: samples of one value of --of (a user) stay together; ranges:
    of the values of --of (a time); kmeans: clusters of --of; ward: clusters of --of with the least variance inside.
    """
    shares = _shares(sizes, parts)
    data = _open(source, fields)
    from harness.partition.assign import assign
    from harness.partition.balance import balance
    from harness.partition.file import Partition, check_new, write

    check_new(out)
    made = Partition(assign(data, by, of, shares=shares, seed=seed), by, of, seed, source)
    report = balance(made, data, of)
    write(made, out)
    _show(f"wrote {out}", report, of, json)


@app.command()
def split(
    source: Source,
    parts: Annotated[Path, typer.Argument(metavar="PARTS.h5", help="What `harness data partition` wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIRECTORY", help="The directory to make.")],
    fields: Fields = None,
    json: AsJson = False,
) -> None:
    """Copy the samples of each part into a file of its own. DIRECTORY is whole, or not there."""
    data = _open(source, fields)
    from harness.partition.balance import balance
    from harness.partition.file import read
    from harness.partition.split import split as copy
    from launch.ckpt_show import bar

    made = read(parts)
    with bar(out.name, quiet=json) as progress:
        copy(data, made, out, progress)
    _show(f"wrote {out}/part-*.h5 and {out}/partition.h5", balance(made, data), "", json)


def _open(source: str, fields: str | None) -> Hdf5Dataset:
    """The data set with these fields, or all. Before anything else that imports h5py."""
    from harness.checkpoint.convert.hdf5 import without_mpi

    without_mpi()  # a login node may not start it
    from harness.hdf5data import Hdf5Dataset, all_fields

    return Hdf5Dataset(source, fields.split(",") if fields else all_fields(source))


def _shares(sizes: str | None, parts: int | None) -> list[float]:
    from harness.errors import UsageError

    if sizes is None:
        if parts is None:
            raise UsageError("how many parts?", hint="--parts 4, or their sizes: --sizes 4,2,1")
        return [1.0] * parts
    try:
        shares = [float(word) for word in sizes.split(",")]
    except ValueError:
        shares = []
    if not shares or parts not in (None, len(shares)) or not all(0 < share < float("inf") for share in shares):
        wanted = "" if parts is None else f"{parts} "
        raise UsageError(f"--sizes {sizes} is no list of {wanted}positive numbers", hint="such as --sizes 4,2,1")
    return shares


def _show(head: str, report: list[Part], of: str, as_json: bool) -> None:
    from harness.units import show_size
    from launch.ckpt_show import number, print_json, print_line, print_table

    samples = sum(part.samples for part in report)
    if as_json:
        print_json({"samples": samples, "of": of or None, "parts": [asdict(part) for part in report]})
        return
    columns = ["part", "samples", "share", "size"]
    told = [name for name in ("least", "mean", "greatest", "values", "spread") if getattr(report[0], name) is not None]
    rows = [
        [at, part.samples, f"{part.samples / samples:.1%}", show_size(part.nbytes)]
        + [number(getattr(part, name)) for name in told]
        for at, part in enumerate(report)
    ]
    print_table([*columns, *(f"{of}: {name}" for name in told)], rows, right=[*columns, *(f"{of}: {n}" for n in told)])
    sizes = [part.samples for part in report]
    uneven = f"the largest has {max(sizes) / min(sizes):.3g} times the samples of the smallest"
    print_line(f"{head}: {samples} samples in {len(report)} parts; {uneven}")
