"""What `harness ckpt bench` concludes from its numbers, and the state that it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.bench import checkpoints, contents, memory
from harness.bench.advice import advise, rows, speed
from harness.bench.state import lengths, make
from harness.checkpoint import Single
from harness.config import Config
from harness.errors import Unavailable, UsageError

ROUND = {
    "memcpy": 0.1, "digest": 0.05, "raw write odirect": 1.0, "raw write odirect 2": 0.8, "raw write buffered": 2.0,
    "raw read odirect": 1.0, "raw read buffered": 2.0, "raw read warm": 0.5, "save direct": 1.0, "held up direct": 0.12,
    "restore cold": 1.25, "restore warm": 1.0, "save without digests": 0.8, "held up without digests": 0.1,
    "save mpio": 1.6, "held up mpio": 1.6, "save lazy": 1.1, "held up lazy": 0.004, "copied lazy": 0.2,
}  # fmt: skip


def result(**changes: Any) -> dict[str, Any]:
    """What ranks would tell, with some seconds changed; names with _ for spaces."""
    engines = changes.pop("engines", {"direct": None, "mpio": None})
    facts = {key: changes.pop(key) for key in ("cold", "rounds") if key in changes}
    one = ROUND | {name.replace("_", " "): value for name, value in changes.items()}
    used = [name for name, problem in engines.items() if problem is None]
    for name in ("direct", "mpio"):
        if name not in used:
            one = {key: value for key, value in one.items() if not key.endswith(f" {name}")}
    read = {"called": 2000, "device": 1010}
    return {"ranks": 2, "hosts": 1, "filesystem": "ext4", "bytes": 1000, "tensors": 4, "engines": engines, "cold": True,
            "read": read, "rounds": [{**one, "save direct": 3.0}, one, one], **facts}  # fmt: skip


def test_rows_compare_with_the_best_plain_way_of_the_round() -> None:
    found = {row.what: row for row in rows(result())}
    durable = found["engine direct: until durable"]
    assert durable.ratio is not None and durable.share and durable.ratio.median == pytest.approx(0.8)
    assert speed(durable) == "1.0 kB/s"
    held = found["engine direct: training held up"].ratio
    assert held is not None and held.median == pytest.approx(1.2)
    digests = found["engine direct: digests"].ratio
    assert digests is not None and digests.median == pytest.approx(1.25)
    cold, warm = found["restore, cold"].ratio, found["restore, warm"].ratio
    assert cold is not None and cold.median == pytest.approx(0.8)
    assert warm is not None and warm.median == pytest.approx(0.5)
    assert speed(found["restore, warm"]) == "2.0 kB/s"  # each of two ranks gets all of it
    assert {"mode lazy: until durable", "engine mpio: until durable", "plain writes, O_DIRECT"} <= set(found)


def test_the_defaults_are_best_where_nothing_gains() -> None:
    advice = advise(result(held_up_lazy=0.118))
    assert advice.yaml == {}
    text = "\n".join(advice.sentences)
    assert "engine direct is the best here" in text and "gains nothing" in text
    assert "one save per minute holds training up for 0.20% of the time" in text
    assert "the first save of a run takes 3.00 s" in text and "read 1.01 times the state" in text


def test_lazy_mode_is_advised_where_it_gains() -> None:
    advice = advise(result())
    assert advice.yaml == {"mode": "lazy"}
    assert any("4.0 ms only, where forward and backward pass take 200.0 ms or more" in one for one in advice.sentences)


def test_an_engine_that_is_far_quicker_is_advised() -> None:
    advice = advise(result(save_direct=9.0, held_up_direct=0.1, save_mpio=1.0, held_up_mpio=1.0))
    assert advice.yaml == {"engine": "mpio"} and advice.sentences[0].startswith("engine mpio is the best here")
    only = advise(result(engines={"mpio": None}))
    assert only.yaml == {"engine": "mpio"} and only.sentences[0].startswith("engine mpio is durable after")


def test_what_cannot_be_used_or_relied_on_is_told() -> None:
    slow = {**ROUND, "raw write odirect 2": 8.0, "raw write odirect": 9.0, "raw write buffered": 9.0}
    told = result(engines={"direct": None, "mpio": "this h5py was built without MPI"}, cold=False)
    told["rounds"].append({key: value for key, value in slow.items() if not key.endswith("mpio")})
    text = "\n".join(advise(told).sentences)
    assert "engine mpio cannot be used here: this h5py was built without MPI" in text
    assert "may have come from memory" in text and "others use this disk" in text


@pytest.mark.parametrize("settings", [{"mode": "lazy"}, {"engine": "mpio"}, {"engine": "mpio-collective"}])
def test_advice_is_a_good_config(settings: dict[str, str]) -> None:
    document = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 1}}
    Config.model_validate({**document, "checkpoint": settings})


@given(st.integers(1, 10**12), st.integers(1, 10**4))
def test_a_state_has_about_the_size_and_tensors_that_were_wished_for(size: int, tensors: int) -> None:
    parameters = -(-tensors // 3)
    if size // 12 < parameters:
        with pytest.raises(UsageError, match="too few"):
            lengths(size, tensors)
        return
    found = lengths(size, tensors)
    assert len(found) == parameters and min(found) >= 1
    assert size - 12 * parameters < 12 * sum(found) + 12 <= size + 12


def test_a_state_is_changed_wiped_and_known_again() -> None:
    training, same = make([3000, 5, 1]), make([3000, 5, 1])
    assert training.nbytes == 12 * 3006 and len(training.tensors) == 9
    first = contents.digest(training.tensors)
    assert first == contents.digest(same.tensors) != contents.digest(make([3000, 5, 1], seed=2).tensors)
    assert all(tensor.min() >= 0 and tensor.max() < 1 for tensor in training.tensors)
    before = [tensor.clone() for tensor in training.tensors]
    contents.change(training.tensors)
    assert contents.digest(training.tensors) != first
    for old, new in zip(before, training.tensors, strict=True):
        differ = torch.nonzero(old != new).flatten().tolist()
        assert differ == list(range(0, len(old), 1024))  # on each page
    contents.wipe(training.tensors)
    assert not any(tensor.any() for tensor in training.tensors)


def test_memory_that_a_job_may_use(tmp_path: Path) -> None:
    table, root = tmp_path / "cgroup", tmp_path / "fs"
    folder = root / "slurm/job_1"
    folder.mkdir(parents=True)
    table.write_text("0::/slurm/job_1\n1:cpu:/elsewhere\n")
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text("0\n")
    most = memory.available(table, root)
    assert most > 1000
    (root / "slurm/memory.max").write_text("1000\n")
    (root / "slurm/memory.current").write_text("700\n")
    (root / "slurm/memory.stat").write_text("anon 200\ninactive_file 300\nactive_file 100\n")
    assert memory.available(table, root) == 700  # 400 of those in use are page cache
    assert memory.available(tmp_path / "absent", root) >= 1000


def test_too_little_memory_is_refused_with_the_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "available", lambda: 2 << 30)
    checkpoints._check_memory(100 << 20, Single())
    with pytest.raises(Unavailable, match=r"need .* GB of memory for a state of 1\.1 GB") as error:
        checkpoints._check_memory(1 << 30, Single())
    assert error.value.hint is not None and "--size up to 29" in error.value.hint
