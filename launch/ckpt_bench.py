"""`harness ckpt bench`: how fast checkpoints are on the user's own file system, and which settings are best there.

harness ckpt bench /scratch/me --size 8GiB -n 8

Starts ranks as a run would (`harness.bench.checkpoints` measures) in a hidden folder, which is removed however it ends.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

MARK = "HARNESS_BENCH "  # harness.bench.checkpoints prints it
ENGINES = ("direct", "mpio", "mpio-collective")


def register(app: typer.Typer) -> None:
    """Add the command to `harness ckpt`."""
    app.command(name="bench")(bench)


def bench(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="On the file system to measure, as runs/.")],
    size: Annotated[
        str, typer.Option("--size", metavar="8GiB", help="Bytes of parameters and Adam's moments.")
    ] = "1GiB",
    ranks: Annotated[int | None, typer.Option("-n", "--ranks", min=1, help="Ranks in all.")] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar=",".join(ENGINES), help="Which engines, with commas between.")
    ] = "direct,mpio",
    tensors: Annotated[int, typer.Option("--tensors", min=1, max=10**6, help="Parameters and moments in all.")] = 450,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=1000, help="Rounds that count.")] = 5,
    hosts: Annotated[str | None, typer.Option("-H", "--hosts", metavar="A:2,B:2", help="Hosts and slots.")] = None,
    hostfile: Annotated[Path | None, typer.Option("--hostfile", help="A file with lines `host slots=N`.")] = None,
    launcher: Annotated[
        str | None, typer.Option("--launcher", metavar="auto|mpirun|horovodrun|srun|local", help="How ranks start.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure saves and restores beside plain writes and reads of the same bytes, and tell the best settings.

    All take turns in rounds. Nothing is left in DIR, and nothing that is there is touched.
    """
    from harness.errors import UsageError
    from harness.units import size as parse_size
    from launch.plan import make_plan

    try:
        wanted = parse_size(size)
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error
    engines = [name.strip() for name in engine.split(",")]
    if unknown := [name for name in engines if name not in ENGINES]:
        raise UsageError(f"--engine: {unknown[0]!r} is not one of {', '.join(ENGINES)}")
    if wanted < 12 * tensors:
        raise UsageError(
            f"--size {size} is too small for {tensors} tensors", hint="a larger --size, or fewer --tensors"
        )
    plan = make_plan(_config(ranks, hosts, hostfile, launcher), [])
    engines = list(dict.fromkeys(engines))
    # each keeps what it has saved until its next turn, lazy mode too; besides there are the plain files
    _check_room(directory, wanted, times=len(engines) + ("direct" in engines) + 1)
    request = {"size": wanted, "tensors": tensors, "rounds": rounds, "engines": engines}
    with _folder(directory) as folder, _progress(rounds, quiet=as_json) as progress:
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        result = _measure(plan, folder, request, progress)
    _show(directory, result, as_json=as_json)


def _config(ranks: int | None, hosts: str | None, hostfile: Path | None, launcher: str | None) -> Any:
    from pydantic import ValidationError

    from harness.config import Config
    from harness.errors import UsageError
    from launch.hosts import check_hosts

    check_hosts(hosts, hostfile)
    launch = {"ranks": ranks, "hosts": hosts, "hostfile": str(hostfile) if hostfile else None, "launcher": launcher}
    given = {name: value for name, value in launch.items() if value is not None}
    document = {"name": "bench", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 1}}
    try:
        return Config.model_validate({**document, "launch": given})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{first['loc'][-1]}: {first['msg']}") from error


def _check_room(directory: Path, size: int, times: int) -> None:
    """Raises InputMissing, UsageError, StorageError."""
    from harness.checkpoint.space import preflight
    from harness.errors import InputMissing, StorageError, UsageError
    from harness.units import show_size

    if not directory.exists():
        raise InputMissing(f"{directory} is not there", hint="give a folder on the file system to measure")
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a folder")
    try:
        preflight(directory, times * size, files=64)
    except StorageError as error:
        raise StorageError(
            f"{directory} has not room enough: to measure {show_size(size)}, {error.message}", hint="a smaller --size"
        ) from error
    except OSError as error:
        raise StorageError(f"{directory}: {error.strerror or error}") from error


@contextlib.contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards, with all in it. Raises StorageError."""
    from harness.errors import StorageError

    try:
        made = tempfile.TemporaryDirectory(
            prefix=".harness-bench-", dir=directory.resolve(), ignore_cleanup_errors=True
        )
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror or error}") from error
    with made as name:
        yield Path(name)


Progress = Callable[[dict[str, Any]], None]


def _measure(plan: Any, folder: Path, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Start the ranks and return what they found. Raises HarnessError with the code of what went wrong."""
    from harness.errors import Exit, HarnessError, Unavailable
    from harness.units import show_duration
    from launch.ranks import run_ranks

    heard: list[dict[str, Any]] = []

    def hear(line: str) -> bool:
        _, mark, text = line.partition(MARK)
        try:
            said = json.loads(text) if mark else None
        except ValueError:
            said = None
        if not isinstance(said, dict):
            return False
        if "name" in said:
            progress(said)
        else:
            heard.append(said)
        return True

    silence = 900 + request["size"] / 2e6
    arguments = ("-m", "harness.bench.checkpoints", str(folder), json.dumps(request))
    ended = run_ranks(plan, arguments, silence=silence, heard=hear)
    for said in heard:
        if "error" in said:
            failure = HarnessError(said["error"], hint=said["hint"])
            failure.code = Exit(said["code"])
            raise failure
    if heard and ended.returncode == 0:
        found: dict[str, Any] = heard[0]["result"]
        return found
    last = "\n  ".join(ended.output.strip().splitlines()[-5:])
    why = f"said nothing for {show_duration(silence)}" if ended.late else f"ended with code {ended.returncode}"
    raise Unavailable(f"the ranks {why}", hint=last or "`harness check` tells what works here")


@contextlib.contextmanager
def _progress(rounds: int, *, quiet: bool) -> Iterator[Progress]:
    """On stderr: a bar on a terminal, else a line for each round; yields what is called before each measurement."""
    if quiet:
        yield lambda said: None
        return
    if not sys.stderr.isatty():
        told: set[int] = set()

        def line(said: dict[str, Any]) -> None:
            if said["round"] not in told:
                told.add(said["round"])
                print(f"round {said['round']} of {rounds}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("starting ranks", total=None)

        def update(said: dict[str, Any]) -> None:
            text = f"round {said['round']} of {rounds}: {said['name']}"
            shown.update(task, description=text, completed=said["done"], total=said["total"])

        yield update


def _show(directory: Path, result: dict[str, Any], *, as_json: bool) -> None:
    from harness.bench.advice import advise, rows, speed
    from harness.units import show_size
    from launch.ckpt_show import print_json, print_line, print_table

    found, advice = rows(result), advise(result)
    if as_json:
        table = [{**asdict(row), "bytes_per_second": row.moved and row.moved / row.seconds.median} for row in found]
        print_json({**result, "rows": table, "advice": advice.sentences, "checkpoint": advice.yaml})
        return
    noun = "rank" if result["ranks"] == 1 else "ranks"
    nodes = "1 node" if result["hosts"] == 1 else f"{result['hosts']} nodes"
    state = f"{show_size(result['bytes'])} in {result['tensors']} tensors"
    print_line(f"{directory} on {result['filesystem']}: {state}, {result['ranks']} {noun} on {nodes}")
    columns = ("measured", "seconds", "from", "to", "speed", "ratio", "range", "compared with")
    table_rows = []
    for row in found:
        many = row.ratio
        scale, unit = (100.0, " %") if row.share else (1.0, " x")
        digits = 0 if row.share else 2
        ratio = "" if many is None else f"{many.median * scale:.{digits}f}{unit}"
        reach = "" if many is None else f"{many.least * scale:.{digits}f} to {many.most * scale:.{digits}f}"
        seconds = [f"{value:.4f}" for value in (row.seconds.median, row.seconds.least, row.seconds.most)]
        table_rows.append([row.what, *seconds, speed(row), ratio, reach, row.of])
    print_table(columns, table_rows, right=columns[1:7])
    count = found[0].seconds.count
    several = f"medians of {count} rounds" if count > 1 else "one round"
    print_line(f"{several}; the slowest rank counts; ratios are taken within a round")
    for sentence in advice.sentences:
        print_line(sentence)
    if advice.yaml:
        print_line("put into the config:")
        print("checkpoint:")
        for name, value in advice.yaml.items():
            print(f"  {name}: {value}")
    else:
        print_line("the config's defaults are the best here: put nothing into it")
