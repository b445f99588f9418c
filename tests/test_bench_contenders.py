"""`tests/bench/checkpoints.py` in its short form: contenders get back what they saved, and the page has all rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, needs_mpirun

sys.path.append(str(ROOT / "tests" / "bench"))

from figures import page, plot, targets
from plots import Panel, draw, load
from workloads import NAMES, gpt2, make

from harness.bench.rounds import Spread, spread


@needs_mpirun
@pytest.mark.mpi
def test_the_short_form_on_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/bench/checkpoints.py"), "--quick", "--workloads", "A", "D"]
    command += ["--directory", str(tmp_path), "--out", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {path.suffix for path in tmp_path.iterdir()} <= {".md", ".json", ".png"}  # nothing of what was saved
    found = json.loads((tmp_path / "page.json").read_text())
    assert [(one["workload"], one["ranks"]) for one in found] == [("A", 2), ("D", 2)]
    for result in found:
        assert set(result["skipped"]) <= {"torchsnapshot", "h5py mpio, a data set per tensor"}
        saved = {name.removeprefix("save ") for name in result["rounds"][0] if name.startswith("save ")}
        for name in ("direct", "mpio", "rank-0 torch.save", "rank-0 safetensors", "DCP", "DCP, 4 threads", "DCP async",
                     "serial h5py on rank 0"):  # fmt: skip
            assert name in saved
        for name in ("ours", "torch.load by each rank", "rank 0 + broadcast", "DCP load", "safetensors by each rank"):
            assert all(f"{heat} {name}" in one for heat in ("cold", "warm") for one in result["rounds"])
        assert result["bytes"] <= result["rounds"][1]["called ours"]
        # a direct save sets aside memory for its share, and not for the state
        assert "memory direct" in result["rounds"][0] and "memory direct" not in result["rounds"][1]
    text = (tmp_path / "page.md").read_text()
    assert text.count("| **ours, direct** |") == 4 and "| rank 0 + broadcast |" in text and "## Targets" not in text


def measured(workload: str, **changes: float) -> dict[str, Any]:
    one = {
        "memcpy": 0.1, "raw write odirect": 1.0, "raw write buffered": 2.0, "raw read odirect": 1.0,
        "raw read warm": 0.5, "save direct": 1.1, "held up direct": 0.12, "save mpio": 2.2, "held up mpio": 2.2,
        "cold ours": 1.1, "warm ours": 0.9, "device ours": 1000.0, "save rank-0 torch.save": 6.0,
        "held up rank-0 torch.save": 6.0,
        "cold torch.load by each rank": 2.0, "warm torch.load by each rank": 1.0,
        "device torch.load by each rank": 1000.0,
        "memory direct": 500.0,
    } | {name.replace("_", " "): value for name, value in changes.items()}  # fmt: skip
    return {"workload": workload, "ranks": 2, "scale": 1.0, "bytes": 1000, "tensors": 4, "filesystem": "ext4",
            "cold": True, "skipped": {"torchsnapshot": "it is not here"}, "rounds": [one, one]}  # fmt: skip


def test_targets_are_met_or_missed() -> None:
    good = {what: (found, met) for what, _, found, met in targets([measured("A"), measured("B")])}
    assert good["save, direct, of the limit: A, 2 ranks"] == ("0.91", "met")
    assert good["save, direct, faster than rank-0 torch.save: B, 2 ranks"] == ("5.45 x", "met")
    assert good["save, mpio, of buffered plain writes: A, 2 ranks"] == ("0.91", "met")
    assert {met for _, met in good.values()} == {"met"}
    slow = {"save_direct": 1.3, "held_up_direct": 0.2, "cold_ours": 1.3, "warm_ours": 1.2, "memory_direct": 1e9,
            "device_ours": 1100.0, "save_mpio": 7.0, "held_up_lazy": 0.03}  # fmt: skip
    bad = {what.split(":")[0]: met for what, _, _, met in targets([measured("A", **slow), measured("B", **slow)])}
    met = {what for what, verdict in bad.items() if verdict == "met"}
    assert met == set(), met


def test_a_page_tells_what_was_not_tried(tmp_path: Path) -> None:
    text = page([measured("A")], "python x")
    assert "torchsnapshot (it is not here)" in text and "## Targets" in text
    assert "| **ours, direct** | 1.100 | 909 B/s | 0.91 (0.91 to 0.91) | 120 ms | 1.20 |" in text
    assert "nan" not in text
    pytest.importorskip("matplotlib")
    assert plot([measured("A"), measured("B")], tmp_path / "x.png") and (tmp_path / "x.png").stat().st_size > 1000


def test_a_panel_goes_by_a_file(tmp_path: Path) -> None:
    panel = Panel("step, x DDP", {"DDP": Spread(1.0, 1.0, 1.0, 3), "harness": Spread(0.9, 0.8, 1.0, 3)}, ["harness"])
    panel.save(tmp_path / "panel.json")
    assert load(tmp_path / "panel.json") == panel
    pytest.importorskip("matplotlib")
    unmeasured = Panel("seconds", {"a run": spread([])}, line=None)
    assert draw([[panel, None], [unmeasured, panel]], tmp_path / "x.png") and (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_workloads_hold_what_they_say(name: str) -> None:
    ranks = [make(name, 0.001, rank, 2) for rank in range(2)]
    first, second = ranks
    assert first.nbytes == second.nbytes and first.count == second.count
    assert {key: tensor.shape for key, tensor in first.whole.items()} == {
        key: tensor.shape for key, tensor in second.whole.items()
    }
    for key, part in first.parts.items():
        other = second.parts[key]
        assert (part.lo, part.hi, other.hi) == (0, other.lo, part.length)
    own = sum(tensor.nbytes for tensor in first.training.tensors)
    steps = sum(tensor.nbytes for tensor in first.whole.values() if tensor.ndim == 0)
    both = own + sum(part.tensor.nbytes for part in second.parts.values())
    assert both == first.nbytes - steps
    if name == "C":
        sizes = sorted(tensor.nbytes for tensor in first.whole.values())
        assert math.isclose(sizes[-1], 0.4 * sum(sizes), rel_tol=0.05)


def test_gpt2_is_as_large_as_gpt2() -> None:
    shapes = gpt2()
    assert len(shapes) == 148 and sum(math.prod(shape) for shape in shapes.values()) == 124_439_808
