"""Start ranks of `harness.probe` as a run would start them, and read what they say. They are ended after a time limit.

probe = run_probe(plan, Path("/scratch/folder"), timeout=60)
print([rank.facts for rank in probe.ranks], probe.timed_out)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.plan import Plan
from launch.ranks import run_ranks

MARK = "HARNESS_PROBE "  # harness.probe prints it


@dataclass
class Rank:
    """What one process said, by step; `doing` is the step that it began and did not end."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    doing: str | None = None

    def get(self, step: str, name: str, default: Any = None) -> Any:
        return self.facts.get(step, {}).get(name, default)


@dataclass(frozen=True)
class Probe:
    """What the started ranks left: their words, the rest of the output, how it ended."""

    ranks: tuple[Rank, ...]
    output: str
    returncode: int
    timed_out: bool = False


def run_probe(plan: Plan, folder: Path | None, timeout: float, environ: Mapping[str, str] = os.environ) -> Probe:
    """Start the probe's ranks and read what they say; ended after `timeout` seconds, whatever they do."""
    arguments = ("-m", "harness.probe", *([str(folder)] if folder else []))
    ended = run_ranks(plan, arguments, timeout=timeout, environ=environ)
    ranks, rest = read_probe(ended.output)
    return Probe(ranks, rest, ended.returncode, ended.late)


def read_probe(text: str) -> tuple[tuple[Rank, ...], str]:
    """The ranks' words by process, in order of rank, and the other lines."""
    ranks: dict[tuple[Any, Any], Rank] = {}
    rest = []
    for line in text.splitlines():
        before, mark, body = line.partition(MARK)
        try:
            said = json.loads(body) if mark else None
        except ValueError:
            said = None
        if not isinstance(said, dict) or "pid" not in said:
            rest.append(line)
            continue
        rank = ranks.setdefault((before, said["pid"]), Rank())
        step = str(said.get("step"))
        if said.get("state") == "begin":
            rank.doing = step
            continue
        rank.doing = None
        if said.get("state") == "failed":
            rank.failed[step] = str(said.get("error"))
        else:
            rank.facts[step] = said
    ordered = sorted(ranks.values(), key=lambda rank: (rank.get("place", "rank", 0), rank.get("mpi", "rank", 0)))
    return tuple(ordered), "\n".join(rest)
