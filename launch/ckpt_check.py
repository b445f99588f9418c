"""The longer ones of the `harness ckpt` commands: verify, diff, prune. What they print comes from `ckpt_show`.

verify_all([Path("runs/exp7/checkpoints/step-00001200")], jobs=None, mark=False, as_json=False)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ckpt_show import bar, clean, number, print_json, print_table, tell

if TYPE_CHECKING:
    from harness.checkpoint.policy import Keep


def verify_all(paths: Sequence[Path], *, jobs: int | None, mark: bool, as_json: bool) -> int:
    """Read checkpoints whole, the newest first, and tell of each; the exit code."""
    from harness.checkpoint.store import Damaged, mark_damaged
    from harness.checkpoint.verify import verify
    from harness.errors import DataError, Exit, some
    from harness.units import show_size

    results: list[dict[str, Any]] = []
    for path in reversed(paths):
        began = time.perf_counter()
        proven, message = False, None
        names: tuple[str, ...] = ()
        size = 0
        try:
            with bar(path.name, quiet=as_json) as progress:
                report = verify(path, jobs=jobs, progress=progress)
            names, size = report.damaged, report.bytes
            if names:
                proven, message = True, f"damaged: {some(names, 20)}"
        except DataError as error:
            proven, message = isinstance(error, Damaged) and error.proven, error.message
        seconds = time.perf_counter() - began
        if message is None:
            if not as_json:
                print(f"{path.name}: good, {show_size(size)} in {seconds:.1f} s")
        elif not as_json:
            print(clean(f"{path.name}: {message}"))
        marked = False
        if mark and proven and message is not None:
            mark_damaged(path, message)
            marked = True
            tell(f"{path.name} is marked: nobody uses it any more")
        results.append(
            {"path": str(path), "good": message is None, "damaged": list(names), "error": message, "bytes": size,
             "seconds": round(seconds, 3), "marked": marked}
        )  # fmt: skip
    bad = sum(not result["good"] for result in results)
    if as_json:
        print_json({"good": bad == 0, "checkpoints": results})
    elif len(results) > 1:
        print(f"{len(results)} checkpoints, {bad} damaged" if bad else f"{len(results)} checkpoints, all good")
    return int(Exit.DATA) if bad else 0


def compare(a: Path, b: Path, *, tolerance: float, as_json: bool) -> int:
    """Tell where two checkpoints differ; 0 where they do not, else 1."""
    from harness.checkpoint.reader import open_checkpoint
    from harness.checkpoint.values import differences, state_differences

    with open_checkpoint(a) as first, open_checkpoint(b) as second, bar("comparing", quiet=as_json) as progress:
        tensors = list(differences(first, second, tolerance=tolerance, progress=progress))
        one, other = first.manifest, second.manifest
        states = list(state_differences(one.state, other.state))
        compared = len({*first.names(), *second.names()})
    equal = not tensors and not states
    if as_json:
        print_json(
            {"equal": equal, "a": {"path": str(a), "step": one.step}, "b": {"path": str(b), "step": other.step},
             "tolerance": tolerance, "tensors": [asdict(found) for found in tensors],
             "state": [{"path": path, "a": x, "b": y} for path, x, y in states]}
        )  # fmt: skip
        return 0 if equal else 1
    print(clean(f"A: step {one.step}, {a}"))
    print(clean(f"B: step {other.step}, {b}"))
    if tensors:
        rows = [
            [found.name, found.kind, found.a or "", found.b or "", "" if found.count is None else found.count,
             "" if found.most is None else number(found.most)]
            for found in tensors
        ]  # fmt: skip
        columns = ("tensor", "what differs", "A", "B", "elements", "largest difference")
        print_table(columns, rows, right=("elements", "largest difference"))
    if states:
        print_table(("state", "A", "B"), [[path, number(x), number(y)] for path, x, y in states])
    if equal:
        within = f" within {tolerance:g}" if tolerance else ""
        print(f"equal{within}: {compared} tensors and their state")
    else:
        print(f"different: {len(tensors)} of {compared} tensors, {len(states)} in the state")
    return 0 if equal else 1


def prune_run(directory: Path, keep: Keep, *, dry_run: bool, aside: bool, as_json: bool) -> None:
    """Delete what the rule does not keep, or tell what that would be. Raises InputMissing, OSError."""
    from harness.checkpoint.names import ASIDE
    from harness.checkpoint.select import select
    from harness.checkpoint.store import listing, remove, superfluous
    from harness.checkpoint.tags import read_tags
    from harness.units import show_size

    stored = listing(directory, aside=True)
    for metric in keep.metrics:  # a metric that none has would keep none
        select(directory, f"best:{metric}")
    chosen = superfluous(directory, keep, {}, tell)
    if aside:
        tagged = set(read_tags(directory).values())
        chosen += [one.path for one in stored if (one.path / ASIDE).exists() and one.path.name not in tagged]
    sizes = {path: sum(one.lstat().st_size for one in path.iterdir()) for path in chosen}
    gone = [path for path in chosen if dry_run or remove(path)]
    total = sum(sizes[path] for path in gone)
    if as_json:
        removed = [{"path": str(path), "bytes": sizes[path]} for path in gone]
        print_json({"dry_run": dry_run, "removed": removed, "bytes": total, "left": len(stored) - len(gone)})
        return
    for path in gone:
        print(f"{'would remove' if dry_run else 'removed'} {path.name}, {show_size(sizes[path])}")
    print(f"{len(gone)} {'would go' if dry_run else 'removed'}, {show_size(total)}; {len(stored) - len(gone)} stay")
