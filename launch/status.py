"""What `harness status` prints: one run in full, or all runs below a directory as a table.

Not here: finding out (`runs.py`).
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.errors import InputMissing
from harness.units import show_duration
from launch.runs import Life, find_run, find_runs, is_run, look, look_at_all

_COLOURS = {
    "running": "green",
    "finished": "bold green",
    "failed": "bold red",
    "lost": "bold red",
    "stopped": "yellow",
    "restarting": "yellow",
}


def status(path: Path, *, as_json: bool = False) -> None:
    """Print the state of a run, or of all runs below a directory. Raises InputMissing where there is none."""
    console = Console(highlight=False, soft_wrap=True)
    if not is_run(path):
        lives = look_at_all(find_runs(path))
        if as_json:
            print(json.dumps([asdict(life) for life in lives], indent=1))
        elif not lives:
            raise InputMissing(f"there is no run below {path}", hint="`harness run CONFIG` starts one")
        else:
            # a pipe gets whole lines, whatever their length
            Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table(lives, path))
        return
    life = look(find_run(path))
    if as_json:
        print(json.dumps(asdict(life), indent=1))
        return
    for name, text in facts(life):
        line = Text(f"{name:<12}")
        line.append(text, style=_COLOURS.get(life.state, "") if name == "state" else "")
        console.print(line)


def facts(life: Life) -> list[tuple[str, str]]:
    """What is told about one run, as name and text."""
    rows = [("run", life.directory), ("state", life.state)]
    if life.step is not None:
        rows.append(("step", _steps(life)))
    if life.rate is not None:
        rows.append(("rate", f"{life.rate:.3g} steps/s"))
    if life.alive and life.eta_s is not None:
        rows.append(("left", show_duration(life.eta_s)))
    if life.loss is not None:
        rows.append(("loss", f"{life.loss:.4g}"))
    rows.append(("checkpoint", "none" if life.last_checkpoint is None else f"step {life.last_checkpoint}"))
    if life.attempts:
        where = f", the last with {life.ranks} ranks from {life.host}" if life.ranks and life.host else ""
        rows.append(("attempts", f"{life.attempts}{where}"))
    if life.job is not None:
        again = f", started again {life.restarts} times" if life.restarts else ""
        rows.append(("Slurm job", f"{life.job}: {life.job_state or 'forgotten by Slurm'}{again}"))
    if life.ended is not None:
        rows.append(("last end", life.ended))
    if life.updated is not None:
        rows.append(("last sign", f"{show_duration(max(0.0, time.time() - life.updated))} ago"))
    if life.state in ("failed", "lost", "stopped"):
        rows.append(("go on with", f"harness {'run' if life.job is None else 'submit'} {shlex.quote(life.directory)}"))
    return rows


def table(lives: Sequence[Life], below: Path) -> Table:
    """One line per run."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "state", "step", "rate", "left", "checkpoint", "job", "note"):
        shown.add_column(name, no_wrap=name != "note", justify="right" if name in ("step", "rate", "left") else "left")
    for life in lives:
        shown.add_row(
            Text(str(Path(life.directory).relative_to(below))),
            Text(life.state, style=_COLOURS.get(life.state, "")),
            _steps(life) if life.step is not None else "",
            f"{life.rate:.3g}/s" if life.rate is not None else "",
            show_duration(life.eta_s) if life.alive and life.eta_s is not None else "",
            str(life.last_checkpoint) if life.last_checkpoint is not None else "",
            Text(f"{life.job} {life.job_state or ''}".strip() if life.job else ""),
            Text(life.ended if life.ended and life.state != "finished" else ""),
        )
    return shown


def _steps(life: Life) -> str:
    return f"{life.step}" if life.steps is None else f"{life.step}/{life.steps}"
