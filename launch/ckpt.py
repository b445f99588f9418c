"""`harness ckpt`: look at the checkpoints of a run, check, compare, name, go back, delete. Needs neither MPI nor torch,
but for `bench`, which starts ranks.

RUN is a run directory, its checkpoints directory, or one checkpoint; RUN@WHICH says which: @latest (also without),
@1200, @best:val/loss, or a tag. `--json` prints one JSON document to stdout and nothing else.

    harness ckpt ls runs/exp7
    harness ckpt diff runs/exp7@1000 runs/exp7@latest
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch import ckpt_bench, ckpt_convert

if TYPE_CHECKING:
    from harness.checkpoint.select import Place

app = typer.Typer(no_args_is_help=True, help="Checkpoints: list, check, compare, name, go back, delete.")

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory or a checkpoints directory.")]
One = Annotated[str, typer.Argument(metavar="RUN[@WHICH]", help="@latest, @1200, @best:val/loss, @TAG; or its path.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Also while a job saves there.")]


@app.command()
def ls(
    run: Run,
    everything: Annotated[bool, typer.Option("--all", help="Also what was not completed.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run. Quick: their data are not read."""
    from harness.checkpoint.lease import live_holder
    from harness.checkpoint.survey import survey
    from harness.errors import InputMissing
    from launch.ckpt_show import show_survey

    directory = _directory(run)
    if not directory.is_dir():
        raise InputMissing(f"there are no checkpoints yet: {directory} is not there")
    with _told(directory):
        found = survey(directory, everything=everything)
        holder = live_holder(directory)
    show_survey(directory, found, holder, as_json=as_json)


@app.command()
def latest(
    run: Run,
    deep: Annotated[bool, typer.Option("--deep", help="Read it all; the newest that is whole.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the path of the newest good checkpoint. Exit code 66 where there is none."""
    from harness.checkpoint.names import parse_name
    from harness.checkpoint.select import select
    from harness.checkpoint.store import Damaged, listing
    from harness.checkpoint.verify import verify
    from harness.errors import InputMissing
    from launch.ckpt_show import bar, print_json, tell

    directory = _directory(run)
    with _told(directory):
        path = select(directory)
        if deep:
            for stored in reversed(listing(directory)):
                try:
                    with bar(stored.path.name, quiet=as_json) as progress:
                        report = verify(stored.path, progress=progress)
                except Damaged as error:
                    tell(f"{stored.path.name} is passed over: {error.message}")
                    continue
                if not report.damaged:
                    path = stored.path
                    break
                tell(f"{stored.path.name} is passed over: damaged: {', '.join(report.damaged[:10])}")
            else:
                raise InputMissing(f"no checkpoint in {directory} is whole")
    if as_json:
        name = parse_name(path.name)
        print_json({"path": str(path), "step": name[0] if name else None})
    else:
        print(path)


@app.command()
def inspect(
    one: One,
    glob: Annotated[str, typer.Argument(metavar="GLOB", help="Names to show, as model/*.weight.")] = "*",
    stats: Annotated[bool, typer.Option("--stats", help="Read the tensors: least, greatest, mean, NaN.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Most rows of the table; 0: all.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: tensors with shape, dtype and place in the file."""
    import difflib
    import fnmatch

    from harness.checkpoint.reader import open_checkpoint
    from harness.checkpoint.store import read_manifest
    from harness.checkpoint.values import statistics
    from harness.errors import InputMissing
    from launch.ckpt_show import bar, show_tensors

    path = _one(one)
    with _told(path):
        manifest = read_manifest(path)
        chosen = [
            (leaf, int(start))
            for leaf, start in zip(manifest.layout.leaves, manifest.layout.starts, strict=True)
            if fnmatch.fnmatchcase(leaf.name, glob.removeprefix("/"))
        ]
        chosen.sort(key=lambda pair: pair[0].name)
        if not chosen and glob != "*":
            names = [leaf.name for leaf in manifest.layout.leaves[:100_000]]
            close = difflib.get_close_matches(glob, names, 3)
            raise InputMissing(
                f"{path} holds no tensor {glob!r}", hint=f"similar: {', '.join(close)}" if close else "try model/*"
            )
        numbers = {}
        if stats:
            total = sum(leaf.nbytes for leaf, _ in chosen)
            with open_checkpoint(path) as checkpoint, bar("reading", quiet=as_json) as progress:
                done = 0
                for leaf, _ in chosen:
                    numbers[leaf.name] = statistics(checkpoint, leaf.name)
                    done += leaf.nbytes
                    if progress is not None:
                        progress(done, total)
    show_tensors(path, manifest, chosen, numbers, limit=limit, as_json=as_json)


@app.command()
def verify(
    one: Annotated[str, typer.Argument(metavar="RUN[@WHICH]", help="Without WHICH all of the run.")],
    jobs: Annotated[int | None, typer.Option("-j", "--jobs", min=1, max=256, help="Threads that read.")] = None,
    mark: Annotated[bool, typer.Option("--mark", help="Take damaged ones out of use, without deleting them.")] = False,
    as_json: AsJson = False,
) -> int:
    """Read everything and compare every digest. Exit code 65 where something is damaged."""
    from harness.checkpoint.select import locate
    from harness.checkpoint.store import listing
    from harness.errors import InputMissing
    from launch.ckpt_check import verify_all

    place = locate(one)
    with _told(place.directory):
        if place.path is None and place.which is None:
            paths = [stored.path for stored in listing(place.directory, aside=True, broken=True)]
            if not paths:
                raise InputMissing(f"there are no checkpoints in {place.directory}")
        else:
            paths = [_one(one)]
        return verify_all(paths, jobs=jobs, mark=mark, as_json=as_json)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="RUN[@WHICH] or the path of a checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    tolerance: Annotated[float, typer.Option("--tol", min=0, help="Numbers this close are equal.")] = 0.0,
    as_json: AsJson = False,
) -> int:
    """Compare two checkpoints: tensors and state. Exit code 0 where they are equal, 1 where not."""
    from launch.ckpt_check import compare

    first, second = _one(a), _one(b)
    with _told(first.parent):
        return compare(first, second, tolerance=tolerance, as_json=as_json)


@app.command()
def tag(
    one: One,
    name: Annotated[str, typer.Argument(metavar="TAG", help="Letters, digits and . _ -")],
    move: Annotated[bool, typer.Option("--move", help="Also if another checkpoint has it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a checkpoint a name. A tagged checkpoint is never pruned."""
    from harness.checkpoint.tags import add_tag, check_tag
    from launch.ckpt_show import print_json

    check_tag(name)
    path = _one(one)
    with _told(path):
        add_tag(path.parent, name, path.name, move=move)
    if as_json:
        print_json({"tag": name, "path": str(path)})
    else:
        print(f"{path.name} is tagged {name}")


@app.command()
def untag(
    run: Run, name: Annotated[str, typer.Argument(metavar="TAG", help="The tag.")], as_json: AsJson = False
) -> None:
    """Take a name away. The checkpoint stays, until it is pruned."""
    from harness.checkpoint.tags import remove_tag
    from launch.ckpt_show import print_json

    directory = _directory(run)
    with _told(directory):
        target = remove_tag(directory, name)
    if as_json:
        print_json({"tag": name, "path": str(directory / target)})
    else:
        print(f"{target} is tagged {name} no more")


@app.command()
def rollback(
    one: Annotated[str, typer.Argument(metavar="RUN@WHICH", help="Where to resume from.")],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an older checkpoint the one to resume from. Newer ones are set aside, not deleted."""
    from harness.checkpoint.select import locate
    from harness.checkpoint.store import check, roll_back
    from harness.errors import UsageError
    from launch.ckpt_show import print_json

    place = locate(one)
    if place.path is None and place.which is None:
        raise UsageError(f"say which one to go back to, as in {one}@1200")
    path = _one(one)
    path = path.parent.resolve() / path.name if path.name else path.resolve()
    with _told(path), _nobody_saves(path.parent, force):
        check(path)
        aside, back = roll_back(path.parent, path)
    if as_json:
        told = {"set_aside": [str(one) for one in aside], "brought_back": [str(one) for one in back]}
        print_json({"path": str(path), **told})
        return
    print(f"the place to resume from is {path.name}")
    for label, paths in (("set aside", aside), ("brought back", back)):
        if paths:
            print(f"{label}: {', '.join(one.name for one in paths)}")


@app.command()
def prune(
    run: Run,
    keep: Annotated[str, typer.Option("--keep", metavar="RULES", help="last 3 | every 1000 | best val/loss 2 min")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    aside: Annotated[bool, typer.Option("--aside", help="Also all that were set aside, unless tagged.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Delete what no rule keeps. The newest one and tagged ones always stay."""
    from harness.checkpoint.rules import keep_rule
    from harness.checkpoint.store import listing
    from harness.errors import InputMissing, UsageError
    from launch.ckpt_check import prune_run

    try:
        rule = keep_rule(keep)
    except ValueError as error:
        raise UsageError(f"--keep: {error}") from error
    directory = _directory(run)
    with _told(directory):
        if not listing(directory, aside=True):
            raise InputMissing(f"there are no checkpoints in {directory}")  # before there is a lease in it
        if dry_run:
            prune_run(directory, rule, dry_run=True, aside=aside, as_json=as_json)
        else:
            with _nobody_saves(directory, force):
                prune_run(directory, rule, dry_run=False, aside=aside, as_json=as_json)


@app.command()
def plan(
    one: Annotated[str | None, typer.Argument(metavar="[RUN[@WHICH]]", help="Tensors of this checkpoint.")] = None,
    tensors: Annotated[int | None, typer.Option("--tensors", min=1, max=10**7, help="So many made-up ones.")] = None,
    ranks: Annotated[int | None, typer.Option("-n", "--ranks", min=1, max=10**7, help="Ranks that would save.")] = None,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Whose part to show.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what each rank would write, and what planning costs. Starts no rank."""
    from harness.checkpoint.forecast import forecast, sample_leaves
    from harness.checkpoint.store import read_manifest
    from harness.errors import UsageError
    from launch.ckpt_show import show_forecast

    if (one is None) == (tensors is None):
        raise UsageError("give a checkpoint or --tensors, one of them", hint="as in `harness ckpt plan --tensors 1000`")
    if one is not None:
        path = _one(one)
        with _told(path):
            manifest = read_manifest(path)
        leaves, ranks = list(manifest.layout.leaves), ranks or manifest.world
    else:
        leaves, ranks = sample_leaves(tensors or 1), ranks or 8
    try:
        found = forecast(leaves, ranks=ranks, rank=rank)
    except ValueError as error:
        raise UsageError(str(error)) from error
    show_forecast(found, as_json=as_json)


ckpt_convert.register(app)
ckpt_bench.register(app)


def _directory(run: str) -> Path:
    """The checkpoints directory of RUN, which names no single checkpoint."""
    place = _place(run)
    if place.path is not None or place.which is not None:
        from harness.errors import UsageError

        raise UsageError(f"{run} names one checkpoint; give the run: {place.directory}")
    return place.directory


def _one(text: str) -> Path:
    from harness.checkpoint.select import resolve

    with _told(Path(text)):
        return resolve(text)


def _place(text: str) -> Place:
    from harness.checkpoint.select import locate

    with _told(Path(text)):
        return locate(text)


@contextmanager
def _nobody_saves(directory: Path, force: bool) -> Iterator[None]:
    """Hold the directory's lease meanwhile. Raises InUse where a job that may live has it, unless forced."""
    from harness.checkpoint.lease import InUse, Lease

    if force:
        yield
        return
    try:
        lease = Lease.acquire(directory, wait=0)
    except InUse as error:
        raise InUse(error.message, hint="wait for that job to end; --force does it all the same") from None
    try:
        yield
    finally:
        lease.release()


@contextmanager
def _told(place: Path) -> Iterator[None]:
    """Turn the operating system's errors into sentences."""
    from harness.errors import StorageError

    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else place
        raise StorageError(f"{where}: {error.strerror or error}") from error
