"""Everything about the speed of training and of starts, on one Markdown page.

    python tests/bench/training.py --out training.md             # about 15 minutes, on an otherwise idle machine
    python tests/bench/training.py --quick --out training.md     # seconds; its figures mean nothing

Starts `train.py` and `behind.py` by mpirun on two ranks, and `starts.py`; see there what is measured, and how. It needs
20 GB of memory for the larger model. Nothing here passes or fails by its speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from mpirun import HERE, command, environment

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
    page = "# Training and starts\n"
    for title, targets, commands in PARTS:
        page += f"\n## {title}\n\n{targets}\n"
        for name, *options in commands[:1] if args.quick else commands:
            print(f"{name} {' '.join(options)} ...", file=sys.stderr, flush=True)
            page += run(name, [*options, *(["--quick"] if args.quick else [])], args.ranks)
            args.out.write_text(page, encoding="utf-8")  # what there is, should a later one fail
    print(args.out)


def run(name: str, options: list[str], ranks: int) -> str:
    """What one of them prints. Raises SystemExit where it fails."""
    words = command(ranks, name, *options)
    if name == "starts.py":  # which starts the ranks itself
        words = [sys.executable, str(HERE / name), *options, "--ranks", str(ranks)]
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        done = subprocess.run(words, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
