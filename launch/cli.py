"""The `harness` command: run, submit, status, logs, stop, show, check, schema, bench, ckpt, data.

Parsing and order only; the work is in the other modules.

What a command needs is imported when it runs, so that `harness --help` answers at once.

    harness run configs/charlm.yaml train.steps=500 -n 4
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer import BadParameter, TyperException

from launch.ckpt import app as ckpt
from launch.data import app as data

_RUNS = Path("runs")
LAUNCHERS = ("auto", "mpirun", "horovodrun", "srun", "local")

app = typer.Typer(
    name="harness",
    help="Train PyTorch models with Horovod over MPI; stop and restart them anywhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(no_args_is_help=True, help="Measure here what a run would do.")
app.add_typer(bench, name="bench")
app.add_typer(ckpt, name="ckpt")
app.add_typer(data, name="data")


def _launcher(value: str | None) -> str | None:
    if value is not None and value not in LAUNCHERS:
        raise BadParameter(f"{value!r} is not one of {', '.join(LAUNCHERS)}")
    return value


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A config file, or a run directory to go on with.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a run's name below runs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to set, as optim.lr=3e-4.")]
Ranks = Annotated[int | None, typer.Option("-n", "--ranks", min=1, help="Ranks in all.")]
Hosts = Annotated[str | None, typer.Option("-H", "--hosts", metavar="A:2,B:2", help="Hosts and slots.")]
Hostfile = Annotated[Path | None, typer.Option("--hostfile", help="A file with a line `host slots=N` per host.")]
Launcher = Annotated[
    str | None,
    typer.Option("--launcher", metavar="|".join(LAUNCHERS), callback=_launcher, help="How ranks are started."),
]
Restarts = Annotated[
    int | None, typer.Option("--restarts", min=0, help="Restarts in a row, without progress, of a run that fails.")
]
MinRanks = Annotated[
    int | None, typer.Option("--min-ranks", min=1, help="Go on with so many ranks at least where a host is gone.")
]
Elastic = Annotated[bool, typer.Option("--elastic", help="Ranks come and go while it trains (horovodrun over Gloo).")]
MaxRanks = Annotated[int | None, typer.Option("--max-ranks", min=1, help="With --elastic: the most ranks.")]
Discover = Annotated[
    str | None,
    typer.Option("--discover", metavar="COMMAND", help="With --elastic: what prints hosts, as lines host:slots."),
]
Sites = Annotated[list[str] | None, typer.Option("--site", help="A site file of configs/sites, by name or path.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import importlib.metadata

        print(f"harness {importlib.metadata.version('harness')}")
        raise typer.Exit


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hosts: Hosts = None,
    hostfile: Hostfile = None,
    launcher: Launcher = None,
    site: Sites = None,
    time: Annotated[str | None, typer.Option("--time", metavar="1h", help="Save and stop in so long.")] = None,
    follow_up: Annotated[
        bool, typer.Option("--follow-up", help="A job of a chain: end where the run is over.")
    ] = False,
    restarts: Restarts = None,
    min_ranks: MinRanks = None,
    elastic: Elastic = False,
    max_ranks: MaxRanks = None,
    discover: Discover = None,
) -> int:
    """Start a run, or go on with it, and stay until it ends. Ctrl-C saves and stops."""
    from launch import mpi

    mpi.begin()  # it looks around while the rest is imported and the config is read
    from harness.batch import plan_of
    from harness.errors import Exit
    from harness.named import check_classes
    from harness.resolve import resolve
    from harness.rundir import RunDir, make_root, open_run
    from launch.finished import nothing_left
    from launch.lock import alone
    from launch.plan import make_plan
    from launch.requeue import go_on
    from launch.start import start
    from launch.timelimit import time_limit

    values = [*(overrides or []), *_flags(ranks, hosts, hostfile, launcher)]
    values += _elastic(elastic, min_ranks, max_ranks, discover)
    values += [f"stop.time={time}"] if time is not None else []
    values += [f"restart.most={restarts}"] if restarts is not None else []
    resolved = resolve(config, values, sites=site or [])
    settings = resolved.config
    _for_elastic(settings.launch.elastic, max_ranks, discover)
    if (why := nothing_left(RunDir(Path(settings.directory)), settings, follow_up=follow_up)) is not None:
        _tell(why)
        return 0
    check_classes(resolved)
    plan = make_plan(settings, [os.path.abspath(settings.directory)])
    plan_of(settings, plan.job.ranks)
    plan = plan.with_env(time_limit(settings.stop))
    with alone(run_dir := make_root(settings)):
        open_run(settings)  # inside, so that a second start does not change the config of the first
        code = start(plan, run_dir, settings)
    if code == Exit.STOPPED:
        go_on(run_dir, settings)
    return code


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Ranks = None,
    site: Sites = None,
    chain: Annotated[int, typer.Option("--chain", min=0, max=1000, help="So many jobs that go on after it.")] = 0,
    sweep: Annotated[
        list[str] | None, typer.Option("--sweep", metavar="KEY=A,B", help="A run for each value, as one array.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be submitted.")] = False,
) -> int:
    """Submit a run to Slurm, and print its batch script."""
    from harness.named import check_classes
    from harness.resolve import resolve
    from launch.submit import submit as submit_runs
    from launch.submit import sweeps

    values, parent = [*(overrides or []), *_flags(ranks, None, None, None)], None
    resolved = [resolve(config, values, sites=site or [])]
    if sweep:
        parent = Path(resolved[0].config.directory)
        resolved = [
            resolve(config, [*values, *one.overrides, f"run_dir={parent / one.name}"], sites=site or [])
            for one in sweeps(sweep)
        ]
    for one in resolved:
        check_classes(one, in_job=True)
    return submit_runs([one.config for one in resolved], parent=parent, chain=chain, dry_run=dry_run)


@app.command()
def status(
    path: Annotated[Path, typer.Argument(metavar="[RUN|DIR]", help="A run, or a directory with runs.")] = _RUNS,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell the state of a run, or of all runs below a directory."""
    from launch.runs import find_run
    from launch.status import status as show_status

    show_status(path if path.is_dir() or path == _RUNS else find_run(path).root, as_json=json)


@app.command()
def logs(
    run: RunPath,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Whose log; rank 0's when not given.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Of which start; the last one.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
) -> None:
    """Print what a rank has printed."""
    from launch.logs import show_logs
    from launch.runs import find_run

    show_logs(find_run(run), rank=rank, attempt=attempt, follow=follow)


@app.command()
def stop(
    run: RunPath,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended.")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0, help="Seconds to wait at most.")] = None,
) -> int:
    """Ask a run to save its state and stop, which it does in about 10 s, or after the step or evaluation it is in."""
    from launch.runs import find_run
    from launch.stop import stop as ask_to_stop

    return ask_to_stop(find_run(run), wait=wait or timeout is not None, timeout=timeout)


@app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hosts: Hosts = None,
    hostfile: Hostfile = None,
    launcher: Launcher = None,
    site: Sites = None,
    min_ranks: MinRanks = None,
    elastic: Elastic = False,
    max_ranks: MaxRanks = None,
    discover: Discover = None,
) -> None:
    """Print what `run` would do: the config with the origin of every value, batch, command, batch script."""
    from harness.errors import ConfigError
    from harness.named import check_classes
    from harness.resolve import resolve
    from harness.rundir import RunDir, find_frozen
    from launch.show import show as show_all

    going = _elastic(elastic, min_ranks, max_ranks, discover)
    values = [*(overrides or []), *_flags(ranks, hosts, hostfile, launcher), *going]
    sites = [word for name in site or [] for word in ("--site", name)]
    resolved = resolve(config, values, sites=site or [])
    _for_elastic(resolved.config.launch.elastic, max_ranks, discover)
    check_classes(resolved, in_job=True)  # it may be meant for a job
    # inside a job the job's own hosts count, so -H and --hostfile are for here only
    again = [str(config), *(overrides or []), *_flags(ranks, None, None, launcher), *going, *sites]
    show_all(resolved, [str(config), *values, *sites], again)
    try:
        find_frozen(RunDir(Path(resolved.config.directory)), resolved.config)
    except ConfigError as error:
        _tell(f"note: `harness run` would refuse: {error}")


@app.command()
def check(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where a run would write.")] = Path("runs"),
    ranks: Annotated[int, typer.Option("-n", "--ranks", min=1, max=1024, help="Ranks to try with.")] = 2,
    launcher: Launcher = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds the ranks may take.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Tell what works here, and how to mend what does not. Exit code 0, or 69 where something fails."""
    from launch.check import Options
    from launch.check import check as check_all
    from launch.show import findings

    if sys.stderr.isatty() and not json:
        _tell(f"looking at this machine and starting {ranks} ranks, which takes some seconds ...")
    found = check_all(Options(run_dir, ranks, launcher or "auto", timeout))
    return findings(found, as_json=json)


@bench.command("train")
def bench_train(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Ranks = None,
    hosts: Hosts = None,
    hostfile: Hostfile = None,
    launcher: Launcher = None,
    site: Sites = None,
    rounds: Annotated[int, typer.Option("--rounds", min=2, max=1000, help="Rounds that count.")] = 5,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps of each in a round; about half a second's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Measure a config's training on 1, 2, 4, .. N ranks, and Horovod's settings on N. Writes nothing."""
    from harness.resolve import resolve
    from launch.bench import train

    values = [*(overrides or []), *_flags(ranks, hosts, hostfile, launcher)]
    settings = resolve(config, values, sites=site or []).config
    return train(settings, rounds=rounds, steps=steps, as_json=json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    import json

    from harness.resolve import schema as json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """The console script."""
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Run a command line; every error becomes a sentence on stderr and its exit code."""
    from harness.errors import Exit, HarnessError

    try:
        code = app(list(arguments), prog_name="harness", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except HarnessError as error:
        _tell(f"error: {error}")
        return int(error.code)
    except TyperException as error:
        return _usage(error)
    except typer.Exit as error:
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        _tell("interrupted")
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left: nothing more to say
        return 0
    except Exception as error:
        _tell(f"error: {type(error).__name__}: {error}\n  a mistake in harness itself; details are in {_details()}")
        return int(Exit.CRASH)


def _usage(error: TyperException) -> int:
    from harness.errors import Exit

    message = error.format_message()
    if not message:  # no arguments at all: the help has been printed
        return int(Exit.USAGE)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "harness"
    _tell(f"error: {message[0].lower()}{message[1:].rstrip('.')}\n  see `{command} --help`")
    return int(Exit.USAGE)


def _details() -> str:
    if not os.environ.get("HARNESS_DEBUG"):
        with contextlib.suppress(OSError):  # a full disk
            with tempfile.NamedTemporaryFile("w", prefix="harness-", suffix=".log", delete=False) as file:
                traceback.print_exc(file=file)
            return file.name
    traceback.print_exc()
    return "the lines above"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _flags(ranks: int | None, hosts: str | None, hostfile: Path | None, launcher: str | None) -> list[str]:
    """The command line's flags as overrides, so that they are checked, frozen and shown like any other value."""
    from launch.hosts import check_hosts

    check_hosts(hosts, hostfile)
    flags = [f"launch.ranks={ranks}"] if ranks is not None else []
    flags += [f"launch.hosts={hosts}", "launch.hostfile=null"] if hosts is not None else []
    flags += [f"launch.hostfile={hostfile}", "launch.hosts=null"] if hostfile is not None else []
    flags += [f"launch.launcher={launcher}"] if launcher is not None else []
    return flags


def _elastic(elastic: bool, least: int | None, most: int | None, discover: str | None) -> list[str]:
    values = ["launch.elastic=true"] if elastic else []
    values += [f"restart.min_ranks={least}"] if least is not None else []
    values += [f"launch.max_ranks={most}"] if most is not None else []
    return values + ([f"launch.discover={discover}"] if discover is not None else [])


def _for_elastic(elastic: bool, most: int | None, discover: str | None) -> None:
    """Refuse flags that mean nothing to a run that is not elastic."""
    from harness.errors import UsageError

    given = [flag for flag, value in (("--max-ranks", most), ("--discover", discover)) if value is not None]
    if given and not elastic:
        raise UsageError(f"{' and '.join(given)}: for elastic runs only", hint="add --elastic")


if __name__ == "__main__":
    main()
