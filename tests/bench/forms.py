"""Every form of training on the same model and batches: time of a step, bytes sent, memory of a rank, beside theory.

    python tests/bench/forms.py                       a table; about 15 minutes on two cores
    python tests/bench/forms.py --quick               a tiny model, half a minute: is what the table says right?
    python tests/bench/forms.py --late 0.2 --turns    with ranks that are late in a quarter of their steps

Each run is a fresh mpirun of `one_form.py`, so that its peak of memory is its own, with one thread per rank. In every
round all forms run once, one after the other; a step's time is divided by that of data parallelism on as many ranks in
the same round. Bytes are those that Open MPI's monitoring counts of all messages of a rank, also those that make up its
collectives, in the steps that are timed. `told` is what the run's own log says, and `must` what has to travel, from the
sizes alone (`Model`). `grown` is what resident memory has grown by at its peak since the model was made, less that of a
process with next to no model (not in a quick run); `held` are the bytes of all tensors of floats before the optimizer's
step; both the most of any rank. `least` is what parameters, gradients and AdamW's moments take on ranks that share them
evenly.

What does not pass or fail is speed. A form whose losses are not the same (synchronous forms) or that does not
learn (the others) ends with exit code 1; so does a run that tells fewer bytes than it must send, or more than it sent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mpirun import ROOT, command, environment

sys.path.insert(0, str(ROOT))

from harness.parallel.traffic import allreduce_bytes

EVERY = 8
"""Local steps between two averages; runs are multiples of it long."""
FLOAT = 4
VOCABULARY = 256


@dataclass(frozen=True)
class Model:
    """A GPT of task charlm, and its batches."""

    width: int
    layers: int
    block: int
    batch: int
    """Samples of a step, over all ranks; divides by the replicas of all forms."""

    @property
    def cut(self) -> int:
        """Parameters that tensor parallelism cuts: matrices, and biases of outputs."""
        return self.layers * (12 * self.width**2 + 7 * self.width) + 2 * VOCABULARY * self.width

    @property
    def whole(self) -> int:
        """The others: norms, and biases of sums."""
        return self.layers * 6 * self.width + 2 * self.width

    @property
    def parameters(self) -> int:
        return self.cut + self.whole

    def activations(self, replicas: int) -> float:
        """Bytes of what a layer hands on, for all samples of a replica."""
        return self.batch / replicas * self.block * self.width * FLOAT


@dataclass(frozen=True)
class Form:
    """A section `parallel`, and what it should do. `must`: bytes that a rank sends in a step, the mean over ranks."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    same: bool = True
    """Its losses are those of one rank."""

    def must(self, model: Model, ranks: int) -> float:
        get = self.parallel.get
        gradients = float(model.parameters * FLOAT)
        if "strategy" in self.parallel:  # each worker pushes all of its gradient, and pulls all parameters
            return 2 * gradients * (ranks - get("servers", 1)) / ranks
        if "average_every" in self.parallel:
            return allreduce_bytes(model.parameters * FLOAT, ranks) / get("average_every")
        parts, stages = get("model", 1), get("pipeline", 1)
        replicas = ranks // (parts * stages)
        mine = (model.cut / parts + model.whole) / stages * FLOAT
        sent = allreduce_bytes(1, replicas) * mine
        hands = model.activations(replicas)
        # a block sums twice forward and twice backward, the embedding once forward, the head once backward; the loss
        # sums the greatest logit, the sum of exponents and the target's logit of each sample
        sums = (4 * model.layers + 2) * hands + 3 * hands / model.width
        sent += allreduce_bytes(1, parts) * sums / stages
        return sent + 2 * hands * (stages - 1) / stages  # activations forward, gradients backward

    def least(self, model: Model, ranks: int) -> float:
        """Bytes that the fullest rank has to hold: parameters, gradients, two moments."""
        get = self.parallel.get
        numbers = float(model.parameters * FLOAT)
        if "strategy" in self.parallel:  # a worker: parameters and gradients
            return max(2.0, 4 / get("servers", 1)) * numbers
        if "optimizer_shards" in self.parallel:
            return (2 + 2 / ranks) * numbers
        if get("outer") is not None:  # the shared parameters and their momentum
            return 6 * numbers
        parts, stages = get("model", 1), get("pipeline", 1)
        return 4 * (model.cut / parts + model.whole) / stages * FLOAT


def server(servers: int, staleness: int | str) -> Form:
    words = {0: "synchronous", "unbounded": "asynchronous"}.get(staleness, f"at most {staleness} steps apart")
    settings = {"strategy": "parameter_server", "servers": servers, "staleness": staleness}
    return Form(f"{servers} server{'s' * (servers > 1)}, {words}", settings, same=staleness == 0)


PLAIN = Form("data parallel")
SHARDS = Form("optimizer_shards: all", {"optimizer_shards": "all"})
FORMS: dict[int, list[Form]] = {
    1: [PLAIN],
    2: [
        PLAIN,
        SHARDS,
        Form("model: 2", {"model": 2}),
        Form("pipeline: 2", {"pipeline": 2}),
        Form(f"average_every: {EVERY}", {"average_every": EVERY}, same=False),
        Form(f"average_every: {EVERY}, outer", {"average_every": EVERY, "outer": {}}, same=False),
        server(1, 0),
    ],
    4: [
        PLAIN,
        SHARDS,
        Form("model: 2", {"model": 2}),
        Form("model: 4", {"model": 4}),
        Form("pipeline: 2", {"pipeline": 2}),
        Form("model: 2, pipeline: 2", {"model": 2, "pipeline": 2}),
        Form(f"average_every: {EVERY}", {"average_every": EVERY}, same=False),
        Form(f"average_every: {EVERY}, outer", {"average_every": EVERY, "outer": {}}, same=False),
        *(server(servers, staleness) for servers in (1, 2) for staleness in (0, 2, "unbounded")),
    ],
}
QUICK = {2: [0, 1, 5, 6], 4: [5]}
"""Of those, what a quick run tries: each way of sending once."""
MONITORED = {"OMPI_MCA_pml_monitoring_enable": "1", "OMPI_MCA_pml_monitoring_enable_output": "3"}


@dataclass(frozen=True)
class Run:
    """What one run of a form has found."""

    began: np.ndarray
    """[ranks, steps + 1], seconds."""
    told: np.ndarray
    """[ranks, steps + 1], bytes."""
    losses: np.ndarray
    """[steps], the mean over replicas."""
    sent: float
    """Bytes in all messages of the steps that are timed, the mean over ranks."""
    grown: float
    held: float


def run(form: Form, ranks: int, model: Model, args: argparse.Namespace) -> Run:
    """Raises SystemExit with what it printed where it fails."""
    folder = Path(tempfile.mkdtemp(prefix="forms-"))
    parallel = dict(form.parallel)
    stages, replicas = parallel.get("pipeline", 1), (ranks - parallel.get("servers", 0)) // parallel_ranks(parallel)
    config = {
        "name": "forms",
        "run_dir": str(folder / "run"),
        "task": {
            "name": "charlm",
            "args": {
                "text": str(ROOT / "harness"),
                "block": model.block,
                "layers": model.layers,
                "width": model.width,
                "heads": 8,
                "limit": 1_000_000,
            },
        },
        "train": {
            "steps": args.warm + args.steps + 1,
            "global_batch": model.batch,
            # a pipeline works on several micro batches at once
            "micro_batch": max(1, model.batch // replicas // 4) if stages > 1 else None,
        },
        "optim": {"name": "adamw", "lr": 1e-3},
        "log": {"every": 100_000},
        "parallel": parallel,
    }
    try:
        done = subprocess.run(
            command(ranks, "one_form.py", json.dumps(config), str(args.warm), str(args.late), str(int(args.turns))),
            env=environment(**MONITORED, OMPI_MCA_pml_monitoring_filename=str(folder / "sent")),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=args.timeout,
            stdin=subprocess.DEVNULL,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
        if done.returncode or not lines:
            sys.exit(f"{form.name} on {ranks} ranks failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found = json.loads(lines[-1])
        sent = [messages(folder / f"sent.{rank}.prof") for rank in range(ranks)]
    finally:
        shutil.rmtree(folder)
    return Run(
        began=np.array([each["began"] for each in found]),
        told=np.array([each["told"] for each in found]),
        losses=np.mean([each["losses"] for each in found if each["speaks"] and each["losses"]], axis=0),
        sent=statistics.mean(sent),
        grown=max(each["grown"] for each in found),
        held=max(each["held"] for each in found),
    )


def parallel_ranks(parallel: dict[str, Any]) -> int:
    return int(parallel.get("model", 1) * parallel.get("pipeline", 1))


def messages(path: Path) -> float:
    """Bytes that a rank has sent, from what Open MPI's monitoring has written."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return sum(float(words[3]) for words in lines if words[:1] in (["E"], ["I"]))


@dataclass(frozen=True)
class Row:
    """What the table tells of a form; bytes per rank and step."""

    form: Form
    ranks: int
    seconds: list[float]
    """Per step, of each round."""
    sent: float
    told: float
    grown: float
    held: float
    losses: np.ndarray


def measure(chosen: Sequence[tuple[int, Form]], model: Model, args: argparse.Namespace) -> list[Row]:
    """All rounds."""
    least = Model(width=16, layers=1, block=model.block, batch=model.batch)
    empty = 0.0 if args.quick else run(PLAIN, 1, least, args).grown
    runs: list[list[Run]] = [[] for _ in chosen]
    for number in range(args.rounds):
        for at in list(range(len(chosen)))[:: 1 if number % 2 == 0 else -1]:
            ranks, form = chosen[at]
            runs[at].append(run(form, ranks, model, args))
            print(f"round {number + 1}: {form.name} on {ranks}", file=sys.stderr, flush=True)
    rows = []
    for (ranks, form), found in zip(chosen, runs, strict=True):
        last = found[-1]
        rows.append(
            Row(
                form,
                ranks,
                [float((one.began[:, -1] - one.began[:, args.warm]).max()) / args.steps for one in found],
                sent=last.sent / args.steps,
                told=float((last.told[:, -1] - last.told[:, args.warm]).mean()) / args.steps,
                grown=statistics.median(one.grown for one in found) - empty,
                held=last.held,
                losses=last.losses,
            )
        )
    return rows


def check(rows: Sequence[Row], model: Model) -> list[str]:
    """What is wrong; losses are compared with those of the first form. Pure."""
    wrong, first = [], rows[0].losses
    for row in rows:
        name, must = f"{row.form.name} on {row.ranks} ranks", row.form.must(model, row.ranks)
        if row.form.same and not np.allclose(row.losses, first, rtol=2e-3):
            wrong.append(f"{name}: the losses {row.losses} are not {first}")
        if not row.losses[-1] < first[0] - (first[0] - first[-1]) / 4:
            wrong.append(f"{name}: the loss has fallen from {row.losses[0]:.3f} to {row.losses[-1]:.3f} only")
        least = must * (0.99 if row.form.same else 0.9)  # asynchronous ranks are not all within the steps that count
        if not least <= row.told <= must * 1.05 + 4096:
            wrong.append(f"{name}: it tells {row.told:.0f} bytes per step, and must send {must:.0f}")
        if row.sent < row.told * 0.99:
            wrong.append(f"{name}: it tells {row.told:.0f} bytes per step, and has sent {row.sent:.0f}")
        if row.held < row.form.least(model, row.ranks) * 0.99:
            wrong.append(f"{name}: {row.held:.0f} bytes cannot hold what it needs")
    return wrong


def table(rows: Sequence[Row], model: Model) -> str:
    """Markdown. Pure."""
    unit, name = (2**20, "MiB") if model.parameters > 1e6 else (2**10, "KiB")
    lines = [
        f"| form | ranks | step | ratio | sent, {name} | told | must | grown, {name} | held | least |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {row.ranks: row for row in rows if row.form == PLAIN}
    for row in rows:
        ratios = sorted(mine / its for mine, its in zip(row.seconds, plain.get(row.ranks, row).seconds, strict=True))
        bytes_ = [row.sent, row.told, row.form.must(model, row.ranks), row.grown, row.held]
        cells = [f"{value / unit:.1f}" for value in [*bytes_, row.form.least(model, row.ranks)]]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        time = f"{statistics.median(row.seconds) * 1e3:.0f} ms"
        lines.append("| " + " | ".join([row.form.name, str(row.ranks), time, spread, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a tiny model and some of the forms, once")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(FORMS), choices=FORMS, help="numbers of ranks")
    parser.add_argument("--only", default="", help="forms whose name contains this, beside the plain one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=EVERY, help=f"that are measured, a multiple of {EVERY}")
    parser.add_argument("--warm", type=int, default=EVERY, help="steps before those, a multiple, too")
    parser.add_argument("--width", type=int, default=384, help="of the model; a multiple of 16")
    parser.add_argument("--late", type=float, default=0.0, help="seconds that the last rank sleeps in each step")
    parser.add_argument("--turns", action="store_true", help="instead, each rank in a quarter of its steps")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a run")
    args = parser.parse_args()
    model = Model(width=args.width, layers=4, block=32, batch=12)
    forms = [(ranks, form) for ranks in sorted({1, *args.ranks}) for form in FORMS[ranks]]
    if args.quick:
        args.rounds, model = 1, Model(width=32, layers=2, block=16, batch=12)
        forms = [(ranks, FORMS[ranks][number]) for ranks in QUICK for number in QUICK[ranks]]
    forms = [(ranks, form) for ranks, form in forms if form == PLAIN or args.only in form.name]
    rows = measure(forms, model, args)
    print(
        f"{model.parameters / 1e6:.1f}M parameters, {model.batch} samples of {model.block} tokens per step; medians of"
        f" {args.rounds} rounds of {args.steps} steps; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    print(table(rows, model))
    if wrong := check(rows, model):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
