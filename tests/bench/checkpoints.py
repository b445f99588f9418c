"""Saves and restores of our checkpoints and of what users pick today, beside plain reads and writes; one Markdown page.

    python tests/bench/checkpoints.py --out figures/checkpoints.md                  # all of it; about an hour
    python tests/bench/checkpoints.py --scale 0.25 --ranks 2 --rounds 3             # about five minutes
    python tests/bench/checkpoints.py --quick                                       # seconds; its figures mean nothing

Starts `saving.py` by mpirun on each number of ranks. It needs an otherwise idle machine, a disk with 6 GB free under
--directory, and memory for two states of 1.5 GB on every rank. Nothing here passes or fails by its
speed, but for wrong bytes. matplotlib (`pip install harness[bench]`) adds plots. What saves cost the training that
goes on meanwhile is measured by `behind.py`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import page, plot
from mpirun import command, environment
from workloads import NAMES


def run(ranks: int, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One job. Raises SystemExit where it fails."""
    out = folder / "found.json"
    options = ["--folder", str(folder / "data"), "--out", str(out), "--scale", str(args.scale)]
    options += ["--rounds", str(args.rounds), *args.workloads]
    words = command(ranks, "saving.py", *options)
    (folder / "data").mkdir()
    with subprocess.Popen(words, env=environment(TORCHSNAPSHOT_DISABLE_TELEMETRY="1")) as job:
        try:
            code = job.wait(args.timeout)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{ranks} ranks did not come to an end in {args.timeout} s") from None
        finally:
            job.terminate()  # also where this one is: mpirun ends its ranks then
    if code:
        raise SystemExit(f"{shlex.join(words)} ended with code {code}")
    shutil.rmtree(folder / "data")
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints.md"), help="the page; plots go beside it")
    parser.add_argument("--directory", type=Path, default=Path("."), help="on the file system to measure")
    parser.add_argument("--ranks", type=int, nargs="+", help="1 2 4 where not given")
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--scale", type=float, default=1.0, help="of the bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for a job")
    parser.add_argument("--quick", action="store_true", help="tiny states, one round, two ranks: is all of it right?")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, and removed, before
    if args.quick:
        args.scale, args.rounds = 0.002, 1
    args.ranks = args.ranks or ([2] if args.quick else [1, 2, 4])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix=".bench-checkpoints-", dir=args.directory) as folder:
        for ranks in args.ranks:
            results += run(ranks, Path(folder), args)
            write(results, args)  # each time, as an hour is long
    print(f"wrote {args.out}")


def write(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The page, its plots, and the seconds themselves as JSON."""
    picture = args.out.with_suffix(".png")
    drawn = plot(results, picture)
    args.out.with_suffix(".json").write_text(json.dumps(results))
    command = shlex.join(["python", "tests/bench/checkpoints.py", *sys.argv[1:]])
    args.out.write_text(page(results, command, picture.name if drawn else None, judged=not args.quick))


if __name__ == "__main__":
    main()
