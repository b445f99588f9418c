"""What `harness bench train` prints: a row for each number of ranks, a row for each setting, and what to put into the
config. It computes from what the ranks have measured, and starts nothing.

    show(config, [json.loads(path.read_text()) for path in files], threads=1, as_json=False)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from harness.units import show_seconds, show_size

if TYPE_CHECKING:
    from harness.config import Config

BETTER = 0.98
"""A setting is worth a change of the config where it takes this part of the time, and less in every round."""
Told = Mapping[str, Any]
"""What ranks have written (`harness/bench/steps.py`)."""


def show(config: Config, found: Sequence[Told], *, threads: int, as_json: bool) -> None:
    """Print to stdout. `found`: of each number of ranks, in order; the last one has tried other settings."""
    rows = [scaling(one, found[0]) for one in found]
    last = found[-1]
    best = choose(last["settings"])
    if as_json:
        told = {
            "name": config.name,
            "threads_per_rank": threads,
            "scaling": rows,
            "settings": [setting(one, last) for one in last["settings"]],
            "left_out": last["left_out"],
            "best": best["name"],
            "put_into_the_config": best["changes"],
        }
        print(json.dumps(told, indent=1))
        return
    # a pipe gets whole lines, whatever their length
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    per_rank = last["samples"] / last["ranks"]
    console.print(
        f"{config.task.name}: {last['parameters']:,} parameters, {show_size(last['gradients'])} of gradients,"
        f" {last['device']}\neach rank takes {per_rank:g} samples per step on {threads} thread{'s' * (threads != 1)};"
        f" medians of {last['settings'][0]['seconds']['count']} rounds",
        markup=False,
    )
    console.print(_scaling_table(rows))
    if len(last["settings"]) > 1:
        console.print(_settings_table(last))
        for name, why in last["left_out"].items():
            console.print(f"not tried: {name}: {why}", markup=False)
        console.print(advice(best), markup=False)


def scaling(one: Told, first: Told) -> dict[str, Any]:
    """A number of ranks, with the config as it is. Efficiency: samples per second and rank, against the first."""
    own = one["settings"][0]
    rate = one["samples"] / own["seconds"]["median"]
    alone = first["samples"] / first["settings"][0]["seconds"]["median"] / first["ranks"]
    return {
        "ranks": one["ranks"],
        "samples_per_step": one["samples"],
        "samples_per_s": rate,
        "efficiency": rate / one["ranks"] / alone,
        "step_s": own["seconds"]["median"],
        "communication": own["share"],
        "sent_bytes_per_step": own["sent"],
    }


def setting(one: Told, among: Told) -> dict[str, Any]:
    """A setting, against the config as it is."""
    return {
        "name": one["name"],
        "changes": one["changes"],
        "exact": one["exact"],
        "samples_per_s": among["samples"] / one["seconds"]["median"],
        "step_s": one["seconds"]["median"],
        "ratio": one["ratio"]["median"],
        "ratio_least": one["ratio"]["least"],
        "ratio_most": one["ratio"]["most"],
        "communication": one["share"],
    }


def choose(settings: Sequence[Told]) -> Told:
    """The fastest that computes the same, or the config's own (the first) where none is clearly faster."""
    faster = [
        one for one in settings[1:] if one["exact"] and one["ratio"]["median"] <= BETTER and one["ratio"]["most"] < 1
    ]
    return min(faster, key=lambda one: float(one["ratio"]["median"]), default=settings[0])


def advice(best: Told) -> str:
    """What to put into the config, as YAML."""
    if not best["changes"]:
        return f"best: the config as it is; no setting is faster by {1 - BETTER:.0%} and in every round"
    lines = [f"  {name}: {_yaml(value)}" for name, value in best["changes"].items()]
    return "\n".join([f"best: {best['name']}; put this into the config:", "horovod:", *lines])


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value >> 20}MiB" if isinstance(value, int) else str(value)


def _scaling_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("ranks", "samples/s", "efficiency", "step", "communication", "sent per step and rank")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            f"{row['samples_per_s']:.4g}",
            f"{row['efficiency']:.0%}",
            show_seconds(row["step_s"]),
            _part(row["communication"]),
            show_size(row["sent_bytes_per_step"]),
        )
    return table


def _settings_table(last: Told) -> Table:
    table = _table(f"horovod, {last['ranks']} ranks", "step", "against the config's", "communication", "")
    table.columns[0].justify = "left"
    for one in last["settings"]:
        row = setting(one, last)
        table.add_row(
            row["name"],
            show_seconds(row["step_s"]),
            f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})" if row["changes"] else "1",
            _part(row["communication"]),
            "" if row["exact"] else "changes the mathematics",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _part(share: Told | None) -> str:
    """The median and the range over the rounds; below 0 it is noise."""
    return "-" if share is None else f"{share['median']:.0%} ({share['least']:.0%} to {share['most']:.0%})"
