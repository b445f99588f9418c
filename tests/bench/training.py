"""Everything about the speed of training and of starts, on one Markdown page with plots.

    python tests/bench/training.py --out training.md             # about 15 minutes, on an otherwise idle machine
    python tests/bench/training.py --quick --out training.md     # seconds; its figures mean nothing

Starts `train.py` and `behind.py` by mpirun on two ranks, and `starts.py`; see there what is measured, and how. It needs
20 GB of memory for the larger model. Nothing here passes or fails by its speed. matplotlib (`pip install
harness[bench]`) adds plots.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from mpirun import HERE, command, environment
from plots import Panel, draw, load

PARTS = (
    (
        "Training steps",
        "Targets: harness at most 1.05 x DDP, and at most 1.01 x the bare Horovod loop.",
        (("train.py", "--model", "25M", "--rounds", "15"), ("train.py", "--model", "126M", "--rounds", "9")),
    ),
    (
        "Checkpoints behind training",
        "Targets: a step with a save in flight all the time at most 1.05 x one without; once a minute at most 1 %.",
        (("behind.py", "--model", "25M"),),
    ),
    (
        "Starts",
        "Targets: the first step of a run at most 1.3 x that of a script by hand; `harness --help` at most 0.3 s;"
        " `harness ckpt ls` of 1,000 checkpoints at most 1 s.",
        (("starts.py",),),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("training.md"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only whether it works")
    args = parser.parse_args()
    page, panels = "", []
    for title, targets, commands in PARTS:
        page += f"\n## {title}\n\n{targets}\n"
        for name, *options in commands[:1] if args.quick else commands:
            print(f"{name} {' '.join(options)} ...", file=sys.stderr, flush=True)
            text, panel = run(name, [*options, *(["--quick"] if args.quick else [])], args.ranks)
            page += text
            panels.append(panel)
            write(page, panels, args.out)  # what there is, should a later one fail
    print(args.out)


def run(name: str, options: list[str], ranks: int) -> tuple[str, Panel]:
    """What one of them prints, and what of it is plotted. Raises SystemExit where it fails."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        options = [*options, "--panel", "panel.json"]
        words = command(ranks, name, *options)
        if name == "starts.py":  # which starts the ranks itself
            words = [sys.executable, str(HERE / name), *options, "--ranks", str(ranks)]
        done = subprocess.run(words, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True, timeout=3600)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with code {done.returncode}")
        return done.stdout, load(Path(folder) / "panel.json")


def write(page: str, panels: list[Panel], out: Path) -> None:
    """The page, and its plots beside it."""
    picture = out.with_suffix(".png")
    drawn = draw([[panel] for panel in panels], picture)
    plots = f"\n![Training and starts]({picture.name})\n" if drawn else ""
    out.write_text(f"# Training and starts\n{plots}{page}", encoding="utf-8")


if __name__ == "__main__":
    main()
