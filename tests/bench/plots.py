"""Plots of the benchmarks' pages: bars with their range, a panel for each thing that was measured.

    draw([[Panel("step, x DDP", {"DDP": one, "harness": other}, ours=("harness",))]], Path("training.png"))

matplotlib (`pip install harness[bench]`) draws; without it a page has its tables only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.bench.rounds import Spread


@dataclass(frozen=True)
class Panel:
    """Bars by name, from the bottom to the top: medians, with the least and the greatest."""

    title: str
    bars: Mapping[str, Spread]
    ours: Collection[str] = ()
    """Those in colour."""
    line: float | None = 1.0
    """Where a line is, as of ratios."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def load(path: Path) -> Panel:
    told = json.loads(path.read_text(encoding="utf-8"))
    return Panel(**told | {"bars": {name: Spread(**one) for name, one in told["bars"].items()}})


def draw(rows: Sequence[Sequence[Panel | None]], path: Path) -> bool:
    """A picture of rows of panels, all rows as long. False: there is no matplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(
        len(rows), len(rows[0]), figsize=(6 * len(rows[0]), 3 * len(rows)), squeeze=False, layout="constrained"
    )
    for panel, axis in zip((one for row in rows for one in row), axes.flat, strict=True):
        if panel is None:
            axis.set_visible(False)
            continue
        found = list(panel.bars.values())
        errors = [
            [max(0.0, one.median - one.least) for one in found],
            [max(0.0, one.most - one.median) for one in found],
        ]
        colours = ["tab:blue" if name in panel.ours else "tab:gray" for name in panel.bars]
        axis.barh(list(panel.bars), [one.median for one in found], xerr=errors, color=colours)
        if panel.line is not None:
            axis.axvline(panel.line, color="black", linewidth=0.8)
        axis.set_title(panel.title, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
