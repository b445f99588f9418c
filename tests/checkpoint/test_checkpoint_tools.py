"""What the commands are made of: rules as text, the quick look, verifying, statistics, comparing, forecasts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import manager

from harness.checkpoint import Damaged, State, keep_all, keep_best, keep_every, keep_last, open_checkpoint, store
from harness.checkpoint import forecast as forecast_module
from harness.checkpoint import survey as survey_module
from harness.checkpoint.blocks import SEGMENT
from harness.checkpoint.forecast import forecast, sample_leaves
from harness.checkpoint.layout import lay_out
from harness.checkpoint.manifest import render
from harness.checkpoint.names import ASIDE, make_name
from harness.checkpoint.plan import make_plan
from harness.checkpoint.rules import keep_rule
from harness.checkpoint.schema import ITEMSIZE
from harness.checkpoint.store import check, mark_damaged, read_manifest
from harness.checkpoint.survey import Entry, survey
from harness.checkpoint.tags import add_tag
from harness.checkpoint.values import Difference, differences, state_differences, statistics
from harness.checkpoint.verify import verify
from harness.errors import DataError, InputMissing


def save(directory: Path, step: int = 1, extra: Any = None, metrics: Any = None, **arrays: Any) -> Path:
    saver = manager(directory, keep=keep_all())
    try:
        return saver.save(step, State(arrays=arrays, extra=extra or {}), metrics=metrics)
    finally:
        saver.close()


# Rules

CANDIDATES = [(step, {"val/loss": 1 / step, "last": step}) for step in range(1, 21)]


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("last 3", keep_last(3)),
        ("  last   3  ", keep_last(3)),
        ("every 5", keep_every(steps=5)),
        ("every 5 steps", keep_every(steps=5)),
        ("best val/loss", keep_best("val/loss")),
        ("best val/loss 2", keep_best("val/loss", 2)),
        ("best val/loss max", keep_best("val/loss", 1, mode="max")),
        ("best val/loss 2 max", keep_best("val/loss", 2, mode="max")),
        ("best last 2 max", keep_best("last", 2, mode="max")),
        ("all", keep_all()),
        ("last 3 | every 5 | best val/loss 2 min", keep_last(3) | keep_every(steps=5) | keep_best("val/loss", 2)),
        ("last 2|tagged", keep_last(2)),
    ],
)
def test_rules_as_text(text: str, keep: Any) -> None:
    assert keep_rule(text).select(CANDIDATES) == keep.select(CANDIDATES)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is an empty rule in ''; write it as in: last 3 | every 1000 | best val/loss 2 min"),
        ("last 3 |", "there is an empty rule in 'last 3 |'; write it as in: last 3 | every 1000 | best val/loss 2 min"),
        ("lst 3", "there is no rule 'lst'; did you mean `last`?"),
        ("Last 3", "there is no rule 'Last'; did you mean `last`?"),
        ("xyz 3", "there is no rule 'xyz'; there are last, every, best, all, tagged"),
        ("last", "`last` needs one number of checkpoints, as in `last 3`"),
        ("every 1 2", "`every` needs one number of steps, as in `every 1000`"),
        ("last 0", "`last` needs a whole number of at least 1, not '0'"),
        ("last -1", "`last` needs a whole number of at least 1, not '-1'"),
        ("last 1.5", "`last` needs a whole number of at least 1, not '1.5'"),
        ("last ٣", "`last` needs a whole number of at least 1, not '٣'"),
        ("best", "`best` needs a metric, as in `best val/loss 2 min`"),
        (
            "best loss two",
            "`best loss two` is not understood; write it as in: last 3 | every 1000 | best val/loss 2 min",
        ),
        ("best loss 0", "`best` needs a whole number of at least 1, not '0'"),
        ("all 3", "`all` stands alone, without '3'"),
        ("x" * 3000, "a rule of 3000 characters is none"),
    ],
)
def test_rules_that_are_none(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        keep_rule(text)
    assert str(caught.value) == sentence


@given(st.text(st.sampled_from("lasteverybt 0123|/"), max_size=40))
def test_any_text_is_a_rule_or_a_sentence(text: str) -> None:
    try:
        kept = keep_rule(text).select(CANDIDATES)
    except ValueError as error:
        assert len(str(error)) < 300
    else:
        assert len(CANDIDATES) - 1 in kept


# The quick look


def test_a_survey_tells_what_there_is(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, metrics={"loss": step / 2}, a=np.zeros(3), b=np.zeros(4))
    mark_damaged(tmp_path / make_name(1), "tensor a")
    os.truncate(tmp_path / make_name(2) / "data.h5", 7)
    (tmp_path / make_name(4) / ASIDE).write_text("{}")
    add_tag(tmp_path, "x", make_name(5))
    add_tag(tmp_path, "y", make_name(5))
    (tmp_path / "step-00000006.tmp-ab").mkdir()
    (tmp_path / "step-00000006.tmp-ab" / "data.h5").write_bytes(b"123")
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000008").symlink_to(tmp_path / make_name(5))
    (tmp_path / "step-00000009").write_text("a file")
    found = {entry.step: entry for entry in survey(tmp_path)}
    states = {step: entry.state for step, entry in found.items()}
    assert states == {1: "damaged", 2: "damaged", 3: "good", 4: "set aside", 5: "good"}
    assert found[1].note == "tensor a" and str(found[2].note).startswith("data.h5 has 7 bytes, not ")
    three = found[3]
    assert (three.tensors, three.world, three.metrics, three.tags) == (2, 1, {"loss": 1.5}, ())
    assert three.created == read_manifest(three.path).created and found[5].tags == ("x", "y")
    assert three.bytes == sum(path.stat().st_size for path in three.path.iterdir())
    more = [entry for entry in survey(tmp_path, everything=True) if entry.state == "incomplete"]
    assert [(entry.step, entry.bytes) for entry in more] == [(6, 3), (7, 0)]


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, with a checksum that fits."""
    import xxhash

    value = json.loads((path / "manifest.json").read_text())
    del value["checksum"]
    change(value)
    rest = json.dumps(value, separators=(",", ":"))[1:] + "\n"
    (path / "manifest.json").write_text(f'{{"checksum":"{xxhash.xxh3_128_hexdigest(rest.encode())}",\n{rest}')


BROKEN: dict[str, Callable[[Path], object]] = {
    "no data": lambda path: (path / "data.h5").unlink(),
    "data is a link": lambda path: ((path / "data.h5").unlink(), (path / "data.h5").symlink_to("/dev/zero")),
    "data is a directory": lambda path: ((path / "data.h5").unlink(), (path / "data.h5").mkdir()),
    "manifest is empty": lambda path: (path / "manifest.json").write_text(""),
    "manifest is noise": lambda path: (path / "manifest.json").write_bytes(b"\xff" * 100),
    "manifest is cut": lambda path: os.truncate(path / "manifest.json", 300),
    "manifest is huge": lambda path: os.truncate(path / "manifest.json", 1 << 40),
    "manifest is a pipe": lambda path: ((path / "manifest.json").unlink(), os.mkfifo(path / "manifest.json")),
    "manifest is a link": lambda path: ((path / "manifest.json").rename(path / "m"),
                                        (path / "manifest.json").symlink_to("m")),
    "fields missing": lambda path: rewrite(path, lambda value: value.pop("world")),
    "fields of other types": lambda path: rewrite(path, lambda value: value.update(file=[1])),
    "no leaves": lambda path: rewrite(path, lambda value: value.pop("leaves")),
    "odd version": lambda path: rewrite(path, lambda value: value.update(version="x" * 9, created=None)),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_ones_are_told_and_the_others_are_listed(name: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, a=np.zeros(3))
    BROKEN[name](tmp_path / make_name(1))
    found = survey(tmp_path)
    assert [entry.state for entry in found] == ["damaged", "good"]
    assert found[0].note and "\n" not in found[0].note and len(found[0].note) < 300


def test_newer_ones_are_told(tmp_path: Path) -> None:
    save(tmp_path, 1, a=np.zeros(3))
    rewrite(tmp_path / make_name(1), lambda value: value.update(version=2))
    (entry,) = survey(tmp_path)
    assert entry.state == "newer" and entry.note == "format version 2; this program reads up to 1"


def test_texts_that_look_like_a_manifest_do_not_confuse_it(tmp_path: Path) -> None:
    evil = ',"metrics":{"loss":9},"info":{}}\n'
    extra = {"a": evil, "metrics": {"loss": 8}, "info": {"metrics": {"loss": 7}, "info": {}}, '"leaves":[': 1}
    save(
        tmp_path, 1, extra=extra, metrics={"loss": 1, evil: 2}, **{'],"aliases":': np.zeros(2), '{"name":': np.ones(1)}
    )
    (entry,) = survey(tmp_path)
    assert entry.state == "good" and entry.metrics == {"loss": 1, evil: 2} and entry.tensors == 2


def test_large_manifests_are_read_at_both_ends_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, metrics={"loss": 1}, **{f"t{i:04d}": np.zeros(1) for i in range(200)})
    (whole,) = survey(tmp_path)
    monkeypatch.setattr(survey_module, "WHOLE", 1000)
    monkeypatch.setattr(survey_module, "_END", 5000)
    (entry,) = survey(tmp_path)
    assert dataclasses.replace(entry, tensors=None) == dataclasses.replace(whole, tensors=None)
    assert whole.tensors == 200 and entry.tensors in (200, None)


def many(directory: Path, count: int) -> None:
    """So many checkpoints, of which the data are the same file."""
    path = save(directory / "one", metrics={"val/loss": 0.5}, **{f"layer{i}.weight": np.zeros(4) for i in range(50)})
    manifest = read_manifest(path)
    for step in range(1, count + 1):
        made = directory / "many" / make_name(step)
        made.mkdir(parents=True)
        (made / "manifest.json").write_text(render(dataclasses.replace(manifest, step=step)))
        os.link(path / "data.h5", made / "data.h5")


def test_a_thousand_checkpoints_are_listed_within_a_second(tmp_path: Path) -> None:
    many(tmp_path, 1000)
    seconds = []
    for _ in range(3):
        began = time.thread_time()  # all of it is this thread's work, whatever else the machine does
        found = survey(tmp_path / "many")
        seconds.append(time.thread_time() - began)
    assert len(found) == 1000 and {entry.state for entry in found} == {"good"} and found[7].tensors == 50
    assert min(seconds) < 1.0, f"{min(seconds):.2f} s"


def test_a_survey_of_nothing(tmp_path: Path) -> None:
    assert survey(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        survey(tmp_path / "not there")


# Verifying


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_damaged_tensor_is_named(tmp_path: Path, jobs: int) -> None:
    arrays = {f"t{i}": np.full(400_000, float(i)) for i in range(8)}
    path = save(tmp_path, **arrays)
    seen: list[tuple[int, int]] = []
    report = verify(path, jobs=jobs, progress=lambda done, total: seen.append((done, total)))
    assert report.damaged == () and report.tensors == 8 and report.bytes >= 8 * 3_200_000
    assert seen[-1] == (report.bytes, report.bytes) and len(seen) >= report.bytes / SEGMENT
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    layout = check(path).layout
    starts = {leaf.name: int(start) for leaf, start in zip(layout.leaves, layout.starts, strict=True)}
    with open(path / "data.h5", "r+b") as file:
        for name in ("arrays/t2", "arrays/t6"):
            file.seek(starts[name] + 1_600_000)
            file.write(b"\x55")
    assert set(verify(path, jobs=jobs).damaged) == {"arrays/t2", "arrays/t6"}


def test_damage_between_tensors_and_of_metadata(tmp_path: Path) -> None:
    path = save(tmp_path, a=np.zeros(8193), b=np.zeros(8193))
    layout = check(path).layout
    gap = int(layout.ends[0])
    assert gap < layout.starts[1]
    good = (path / "data.h5").read_bytes()
    (path / "data.h5").write_bytes(good[:gap] + b"\1" + good[gap + 1 :])
    assert verify(path).damaged
    (path / "data.h5").write_bytes(good[:5000] + b"\1" + good[5001:])
    with pytest.raises(Damaged, match="metadata"):
        verify(path)
    (path / "data.h5").unlink()
    with pytest.raises(Damaged, match="cannot be read"):
        verify(path)
    with pytest.raises(InputMissing):
        verify(tmp_path)


def test_an_error_while_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, a=np.zeros(300_000))

    def fail(*_: Any) -> list[int]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("harness.checkpoint.blocks.Blocks.read", fail)
    with pytest.raises(Damaged, match=r"cannot be read: .*Input/output error") as caught:
        verify(path)
    assert not caught.value.proven, "it may be good, elsewhere or later"


def test_an_empty_checkpoint_is_good(tmp_path: Path) -> None:
    assert verify(save(tmp_path, extra={"a": 1})).damaged == ()
    assert verify(save(tmp_path, 2, a=np.zeros((0, 3)))).bytes == 0


# Statistics and differences


def test_statistics_of_every_dtype(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        dtype: (torch.randint(0, 2 if dtype == "bool" else 255, (ITEMSIZE[dtype] * 5001,), generator=generator))
        .to(torch.uint8)
        .view(getattr(torch, dtype))
        for dtype in ITEMSIZE
    }
    saver = manager(tmp_path)
    path = saver.save(1, State(tensors=tensors))
    saver.close()
    with open_checkpoint(path) as checkpoint:
        for dtype, tensor in tensors.items():
            found = statistics(checkpoint, f"tensors/{dtype}")
            if tensor.is_complex():
                wide = tensor.to(torch.complex64 if dtype == "complex32" else tensor.dtype).numpy()
                values = np.abs(wide)
            else:
                values = tensor.to(torch.float64).numpy() if tensor.is_floating_point() else tensor.numpy()
            nan = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
            assert found.nan == nan.sum(), dtype
            numbers = values[~nan]
            assert (found.least, found.greatest) == (numbers.min(), numbers.max()), dtype
            with np.errstate(all="ignore"):
                mean = numbers.astype(np.float64).mean()
            assert found.mean == pytest.approx(mean, rel=1e-6, nan_ok=True), dtype
            assert found.infinite == (np.isinf(values).sum() if values.dtype.kind == "f" else 0), dtype


def test_statistics_of_what_has_none(tmp_path: Path) -> None:
    path = save(tmp_path, empty=np.zeros((0, 3)), nan=np.full(3, np.nan), inf=np.array([1.0, np.inf, -np.inf]))
    with open_checkpoint(path) as checkpoint:
        empty, nan, inf = (statistics(checkpoint, f"arrays/{name}") for name in ("empty", "nan", "inf"))
    assert dataclasses.astuple(empty) == (None, None, None, 0, 0)
    assert dataclasses.astuple(nan) == (None, None, None, 3, 0)
    assert (inf.least, inf.greatest, inf.infinite) == (-math.inf, math.inf, 2) and math.isnan(inf.mean or 0.0)


@given(st.integers(0, 20_000), st.integers(0, 20_000), st.sampled_from([4096, 10_000, 1 << 20]))
@settings(max_examples=30, deadline=None)
def test_chunks_are_the_tensor(lo: int, hi: int, most: int) -> None:
    path = GOLDEN / "step-00000007"
    with open_checkpoint(path) as checkpoint:
        whole = checkpoint.read("tensors/big")
        lo, hi = min(lo, hi), max(lo, hi)
        parts = [part.copy() for part in checkpoint.chunks("tensors/big", lo, hi, most=most)]
        assert np.concatenate([np.empty(0, whole.dtype), *parts]).tolist() == whole[lo:hi].tolist()
        assert all(part.nbytes <= max(most, checkpoint.manifest.layout.block) for part in parts)


GOLDEN = Path(__file__).parent / "golden"


def found_between(a: Path, b: Path, tolerance: float = 0.0) -> list[Difference]:
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        return list(differences(first, second, tolerance=tolerance))


def test_differences(tmp_path: Path) -> None:
    base = np.arange(2_000_000, dtype=np.float64)  # more than one piece
    other = base.copy()
    other[[5, 1_999_999]] += [0.5, -2.0]
    a = save(
        tmp_path / "a", values=base, same=np.array([1.0, np.nan, -0.0]), shape=np.zeros(3), dtype=np.zeros(3),
        gone=np.zeros((2, 2)), big=np.array([2**63, 2**53], np.uint64), flags=np.array([True, False]),
    )  # fmt: skip
    b = save(
        tmp_path / "b", values=other, same=np.array([1.0, np.nan, 0.0]), shape=np.zeros((3, 1)),
        dtype=np.zeros(3, "f4"), new=np.zeros(1, "i4"), big=np.array([2**63, 2**53 + 1], np.uint64),
        flags=np.array([True, True]),
    )  # fmt: skip
    assert found_between(a, b) == [
        Difference("arrays/big", "values", count=1, most=1.0),
        Difference("arrays/dtype", "dtype", "float64", "float32"),
        Difference("arrays/flags", "values", count=1, most=1.0),
        Difference("arrays/gone", "only in A", a="float64[2, 2]"),
        Difference("arrays/new", "only in B", b="int32[1]"),
        Difference("arrays/shape", "shape", "[3]", "[3, 1]"),
        Difference("arrays/values", "values", count=2, most=2.0),
    ]
    values = [found for found in found_between(a, b, 0.5) if found.name == "arrays/values"]
    assert values == [Difference("arrays/values", "values", count=1, most=2.0)]
    assert not [found for found in found_between(a, b, 2.0) if found.kind == "values"]
    assert found_between(a, a) == []


def test_nan_on_one_side_is_a_difference_whatever_the_tolerance(tmp_path: Path) -> None:
    a = save(tmp_path / "a", x=np.array([1.0, 2.0, np.inf]), c=np.array([1 + 1j]))
    b = save(tmp_path / "b", x=np.array([np.nan, 2.0, np.inf]), c=np.array([1 + 2j]))
    complex_, real = found_between(a, b, 1e9)[:1], found_between(a, b)
    assert [found.name for found in complex_] == ["arrays/x"]
    assert [(found.name, found.count) for found in real] == [("arrays/c", 1), ("arrays/x", 1)]
    assert real[0].most == 1.0 and math.isnan(real[1].most or 0.0)


def test_state_differences() -> None:
    a = {"lr": 0.1, "same": [1, {"x": 2}], "list": [1, 2], "deep": {"a": 1}, "type": 1}
    b = {"lr": 0.2, "same": [1, {"x": 2}], "list": [1, 2, 3], "deep": {"b": 1}, "type": True}
    assert list(state_differences(a, b)) == [
        ("deep/a", 1, None),
        ("deep/b", None, 1),
        ("list", [1, 2], [1, 2, 3]),
        ("lr", 0.1, 0.2),
        ("type", 1, True),
    ]
    assert list(state_differences(a, a)) == [] and list(state_differences(1, 2)) == [("", 1, 2)]


# Forecasts


def test_a_forecast_is_the_plan(tmp_path: Path) -> None:
    leaves = sample_leaves(60)
    layout = lay_out(leaves)
    found = [forecast(leaves, ranks=5, rank=rank) for rank in range(5)]
    assert sum(one.bytes for one in found) == layout.data_end - layout.data_start
    covered = sorted(part for one in found for part in one.ranges)
    assert covered[0][0] == layout.data_start and covered[-1][1] == layout.data_end
    assert all(one[1] == other[0] for one, other in itertools.pairwise(covered))
    assert found[0].least == min(one.bytes for one in found) and found[0].most == max(one.bytes for one in found)
    assert found[0].file_bytes == layout.data_end and found[0].memory > 1000
    with pytest.raises(ValueError, match="rank 5 is not one of 5 ranks"):
        forecast(leaves, ranks=5, rank=5)
    with pytest.raises(DataError, match="two tensors are called"):
        forecast([*leaves, leaves[0]], ranks=5)


def test_ten_thousand_ranks_and_a_hundred_thousand_tensors() -> None:
    leaves = sample_leaves(100_000)
    found = forecast(leaves, ranks=10_000, rank=17)
    assert found.memory < 100e6, found
    # In processor time, the least of three: other programs may keep this machine busy.
    colds, warms = [], []
    for _ in range(3):
        began = time.thread_time()
        layout = forecast_module._plan(leaves, 10_000, 17)
        colds.append(time.thread_time() - began)
        began = time.thread_time()
        make_plan(layout, rank=18, size=10_000)
        warms.append(time.thread_time() - began)
    assert min(colds) < 1.0 and min(warms) < 0.05, f"{colds} s cold, {warms} s warm"
    assert found.looked_at == 64 and found.most - found.least <= found.block


def test_entries_are_plain_data() -> None:
    json.dumps({**dataclasses.asdict(Entry(Path("x"), 1, 1, "good", 5)), "path": "x"})
    assert store.DAMAGED == "damaged.json"
