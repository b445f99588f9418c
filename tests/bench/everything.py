"""All that is measured here, on one Markdown page with plots.

    python tests/bench/everything.py --out figures/all.md                   # about two hours, on an idle machine
    python tests/bench/everything.py --quick --out all.md training forms    # of two parts, whether they work

Starts the programs beside it; each says what it measures, and how. Nothing here passes or fails by its speed, but for
results that are wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from mpirun import HERE

PARTS = ("checkpoints", "training", "restarts", "forms")
TITLES = {"restarts": "From a death to the first new step", "forms": "Forms of parallelism"}
"""Of parts whose page is what they print; the others write one of their own, beside the one of all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all where none is given")
    parser.add_argument("--out", type=Path, default=Path("all.md"), help="the page; pages of parts and plots go beside")
    parser.add_argument("--quick", action="store_true", help="only whether it works")
    args = parser.parse_args()
    if wrong := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"there is no part {wrong[0]!r}: {', '.join(PARTS)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pages: list[str] = []
    for part in args.parts or PARTS:
        print(f"{part} ...", file=sys.stderr, flush=True)
        pages.append(run(part, args.out.with_name(f"{part}.md"), quick=args.quick))
        args.out.write_text("\n".join(pages), encoding="utf-8")  # what there is, should a later one fail
    print(args.out)


def run(part: str, page: Path, *, quick: bool) -> str:
    """The page of one part. Raises SystemExit where it fails."""
    words = [sys.executable, str(HERE / f"{part}.py")]
    if part not in TITLES:
        words += ["--out", str(page)]
    if quick:
        words += ["--rounds", "1"] if part == "restarts" else ["--quick"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {done.returncode}")
    if part not in TITLES:
        return page.read_text(encoding="utf-8")
    text = done.stdout if "|---" in done.stdout else f"```\n{done.stdout}```\n"
    return f"# {TITLES[part]}\n\n{text}"


if __name__ == "__main__":
    main()
