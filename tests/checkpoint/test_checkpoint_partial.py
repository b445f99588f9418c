"""A part of a checkpoint, under other names, into other dtypes and shapes; and states that stay whole when it fails."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Net, bits, manager, train

from harness.checkpoint import State
from harness.checkpoint.cached import share_in_cache
from harness.checkpoint.casting import Cast, can_cast
from harness.checkpoint.partial import EXACT, Partial
from harness.checkpoint.restoring import Report
from harness.checkpoint.schema import ITEMSIZE
from harness.errors import DataError, UsageError


def saved(directory: Path, **entries: Any) -> Any:
    """Save a state; returns what restores from there into another: (state, **choice) -> the report."""
    saver = manager(directory)
    saver.save(1, State(**entries))

    def restore(target: dict[str, Any], part: Partial | None = None, **choice: Any) -> Report:
        part = Partial(**choice) if part is None else part
        saver.lines.clear()
        assert saver.restore(State(**target), partial=part) == 1
        report: Report = saver.report
        assert saver.lines == ([] if report.complete else [f"step-00000001: {report}"])
        return report

    return restore


# What a Partial means


@pytest.mark.parametrize(
    ("only", "name", "wanted"),
    [
        ("*", "model/a.b", True),
        ("model/*", "model/a/b", True),
        ("model/*", "models/a", False),
        ("model/layer?.*", "model/layer3.weight", True),
        ("model/layer?.*", "model/layer33.weight", False),
        (("ema/*", "model/head.*"), "model/head.bias", True),
        ((), "model/a", False),
        ("model/[ab].w", "model/b.w", True),
        ("*\n*", "model/\n", True),
        ("model/*.weight", "Model/a.weight", False),
    ],
)
def test_globs(only: Any, name: str, wanted: bool) -> None:
    assert Partial(only=only).wants(name) == wanted


@pytest.mark.parametrize(
    ("rename", "name", "here"),
    [
        ({}, "model/a", "model/a"),
        ({"model/a": "model/b"}, "model/a", "model/b"),
        ({"model/a": "model/b"}, "model/aa", "model/aa"),
        ({"model/old.*": "model/new.*"}, "model/old.0.w", "model/new.0.w"),
        ({"model/*.gamma": "model/*.weight"}, "model/norm.1.gamma", "model/norm.1.weight"),
        ({"ab*ba": "*"}, "aba", "aba"),  # the two sides may not share their text
        ({"*": "x/*"}, "model/w", "x/model/w"),
        ({"model/a*": "model/b*", "model/*": "other/*"}, "model/ax", "model/bx"),
    ],
)
def test_renaming(rename: dict[str, str], name: str, here: str) -> None:
    assert Partial(rename=rename).renamed(name) == here


def test_entries_are_chosen_and_renamed_by_their_name_or_by_what_is_below_them() -> None:
    assert Partial(only="opt*").wants_entry("optimizer") and Partial(only="optimizer/*").wants_entry("optimizer")
    assert not Partial(only="optimizer/fc*").wants_entry("optimizer")
    assert Partial(rename={"ema/*": "model/*"}).renamed_entry("ema") == "model"
    assert Partial(rename={"ema": "shadow"}).renamed_entry("ema") == "shadow"
    assert Partial(rename={"model/a.*": "model/b.*"}).renamed_entry("model") == "model"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"rename": {"a*": "b"}}, r"needs one \* on both sides"),
        ({"rename": {"a": "b*"}}, r"needs one \* on both sides"),
        ({"rename": {"a**": "b**"}}, r"needs one \* on both sides"),
        ({"missing": "skip"}, r"Partial\(missing='skip'\) is unknown; it is error or keep"),
        ({"unexpected": True}, r"Partial\(unexpected=True\) is unknown"),
        ({"mismatched": "keep"}, r"Partial\(mismatched='keep'\) is unknown"),
    ],
)
def test_wrong_choices_are_refused_at_once(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Partial(**choice)


# Into a model


class Tuned(torch.nn.Module):
    """Net's layers as a part called `encoder`, and another head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Net(seed=7)
        self.head = torch.nn.Linear(11, 12)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.encoder(words))
        return result


def test_fine_tuning_the_model_of_a_checkpoint_under_a_new_head(tmp_path: Path) -> None:
    """The whole use: other names, half precision there, no optimizer; then train, save and go on as ever."""
    old = Net().to(torch.bfloat16)
    adam = torch.optim.Adam(old.parameters())
    restore = saved(tmp_path / "pretrained", model=old, optimizer=adam, scheduler={"x": 1}, extra={"epoch": 9})

    model = Tuned()
    head = bits(model.head.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    extra = {"epoch": 0}
    report = restore(
        {"model": model, "optimizer": optimizer, "extra": extra},
        only="model/*",
        rename={"model/*": "model/encoder.*"},
        cast=True,
        missing="keep",
    )
    for name, tensor in old.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor.to(model.encoder.state_dict()[name].dtype)), name
    assert bits(model.head.state_dict()) == head and extra == {"epoch": 0} and not optimizer.state
    assert report.missing == ["model/head.weight", "model/head.bias"]
    assert sorted(report.untouched) == ["extra", "optimizer"] and not report.unexpected
    assert "model/encoder.hidden.weight" in report.cast and "model/encoder.norm.num_batches_tracked" not in report.cast
    assert str(report) == (
        "restored 9 tensors and entries; converted: model/encoder.embedding.weight, model/encoder.norm.weight,"
        " model/encoder.norm.bias, model/encoder.hidden.weight and 3 more; kept, not in the checkpoint:"
        " model/head.weight, model/head.bias; kept, not asked for: optimizer, extra"
    )

    train(model, optimizer, range(2))
    tuned = manager(tmp_path / "tuned")
    tuned.save(2, State(model=model, optimizer=optimizer, extra=extra))
    again = Tuned()
    second = torch.optim.AdamW(again.parameters(), lr=0.1)
    assert tuned.restore(State(model=again, optimizer=second, extra=extra)) == 2
    for net, opt in ((model, optimizer), (again, second)):
        train(net, opt, range(2, 4))
    assert bits(again.state_dict()) == bits(model.state_dict())


def test_only_some_layers(tmp_path: Path) -> None:
    restore = saved(tmp_path, model=Net(), optimizer=torch.optim.SGD(Net().parameters(), 0.1))
    model = Net(seed=1)
    before = bits(model.state_dict())
    report = restore({"model": model}, only="model/norm.*")
    after, there = bits(model.state_dict()), bits(Net().state_dict())
    for name in after:
        assert after[name] == (there if name.startswith("norm.") else before)[name], name
    assert len(report.loaded) == 5 and "model/hidden.weight" in report.untouched


def test_what_is_missing_unexpected_or_of_another_shape(tmp_path: Path) -> None:
    restore = saved(tmp_path, model=Net(), extra={"epoch": 1})
    model = Net(seed=1)
    model.hidden = torch.nn.Linear(6, 7)
    model.norm = torch.nn.Identity()
    before = bits(model.state_dict())
    for choice, words in (
        ({"only": "model/*"}, "missing from the checkpoint: model/hidden.bias"),
        ({"only": "model/*", "missing": "keep"}, "only in the checkpoint: model/norm.bias"),
        ({"only": "model/*", "missing": "keep", "unexpected": "skip"}, r"model/hidden.weight is float32\[7, 6\] here"),
        ({"missing": "keep", "mismatched": "skip"}, "only in the checkpoint: extra"),
    ):
        with pytest.raises(DataError, match=words):
            restore({"model": model}, **choice)
        assert bits(model.state_dict()) == before
    report = restore({"model": model}, missing="keep", unexpected="skip", mismatched="skip")
    assert report.missing == ["model/hidden.bias"] and report.skipped == ["model/hidden.weight"]
    assert report.unexpected[:2] == ["extra", "model/norm.bias"] and len(report.unexpected) == 6
    assert torch.equal(model.embedding.weight, Net().embedding.weight)
    assert bits(model.hidden.state_dict()) == {n[7:]: value for n, value in before.items() if n.startswith("hidden.")}


def test_a_plain_restore_reports_nothing_left_out(tmp_path: Path) -> None:
    restore = saved(tmp_path, model=Net(), extra={"epoch": 1})
    report = restore({"model": Net(seed=1), "extra": {}}, EXACT)
    assert report.complete and str(report) == f"restored {len(Net().state_dict()) + 1} tensors and entries"
    model = Net(seed=1)
    report = restore({"model": model}, only="model/*")
    assert bits(model.state_dict()) == bits(Net().state_dict()) and report.complete


# Between entries


def test_averaged_weights_into_the_model(tmp_path: Path) -> None:
    """A dict of averages, and torch's own averaged model, in place of what was trained."""
    model = Net()
    ema = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    swa = torch.optim.swa_utils.AveragedModel(Net(seed=5))
    restore = saved(tmp_path, model=model, ema=ema, swa=swa)
    target = Net(seed=9)
    report = restore({"model": target}, only="model/*", rename={"ema/*": "model/*"})
    assert all(torch.equal(parameter, ema[name]) for name, parameter in target.named_parameters())
    assert torch.equal(target.norm.running_var, model.norm.running_var)
    assert "model/hidden.weight" in report.unexpected  # of the two that could be it, the one that was asked for
    restore({"model": target}, only="model/*", rename={"swa/module.*": "model/*"})
    assert bits(target.state_dict()) == bits(Net(seed=5).state_dict())
    averages = {name: torch.zeros_like(value) for name, value in ema.items()}
    restore({"average": averages}, only="average/*", rename={"ema": "average", "ema/*": "average/*"})
    assert bits(averages) == bits(ema)
    empty: dict[str, Any] = {}
    restore({"some": empty}, only="some/[hn]*", rename={"ema/*": "some/*"})
    assert sorted(empty) == ["head.bias", "hidden.weight", "norm.bias", "norm.weight"]


def test_two_of_the_same_name_are_refused(tmp_path: Path) -> None:
    restore = saved(tmp_path, a={"x": torch.zeros(1)}, b={"x": torch.ones(1)})
    with pytest.raises(DataError, match="both a/x and b/x would be called c/x"):
        restore({"c": {"x": torch.zeros(1)}}, rename={"a/*": "c/*", "b/*": "c/*"})


def test_dicts_and_holders_under_another_name(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(Net().parameters(), 0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    restore = saved(tmp_path, schedule=cosine, extra={"epoch": 4})
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1)
    progress: dict[str, Any] = {}
    restore({"scheduler": other, "progress": progress}, rename={"schedule": "scheduler", "extra/*": "progress/*"})
    assert other.T_max == 7 and progress == {"epoch": 4}


def test_one_tensor_here_and_two_there(tmp_path: Path) -> None:
    loose = Net()
    loose.head.weight = torch.nn.Parameter(torch.zeros(11, 6))
    restore = saved(tmp_path, model=loose)
    tied = Net(seed=1)
    report = restore({"model": tied})
    assert torch.equal(tied.head.weight, loose.embedding.weight)
    assert report.notes == [
        "model/embedding.weight and model/head.weight are one tensor here and two there; the first is used"
    ]


# Optimizers


def two_groups(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    norm = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    rest = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    return torch.optim.AdamW([{"params": rest, "weight_decay": 0.5}, {"params": norm, "weight_decay": 0.0}], lr=lr)


def test_the_optimizers_state_of_the_parameters_that_both_have(tmp_path: Path) -> None:
    model = Net()
    optimizer = two_groups(model, 0.25)
    train(model, optimizer, range(3))
    restore = saved(tmp_path, model=model, optimizer=optimizer)
    tuned = Tuned()
    second = two_groups(tuned, 0.1)
    train(tuned, second, range(1))
    head = bits([second.state[parameter] for parameter in tuned.head.parameters()])
    names = {"model/*": "model/encoder.*", "optimizer/*": "optimizer/encoder.*"}
    with pytest.raises(DataError, match=r"missing from the checkpoint: optimizer: head\.bias"):
        restore({"model": tuned, "optimizer": second}, rename=names)
    report = restore({"model": tuned, "optimizer": second}, rename=names, missing="keep")
    assert "optimizer: head.bias" in report.missing and "optimizer" in report.loaded
    here = dict(tuned.encoder.named_parameters())
    for name, parameter in model.named_parameters():
        assert bits(second.state[here[name]]) == bits(optimizer.state[parameter]), name
    assert bits([second.state[parameter] for parameter in tuned.head.parameters()]) == head
    assert [group["lr"] for group in second.param_groups] == [0.25, 0.25]
    # And the way back: a frozen part, whose state is left out.
    for parameter in model.norm.parameters():
        parameter.requires_grad_(False)
    few = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    report = restore({"model": model, "optimizer": few}, unexpected="skip")
    assert sorted(report.unexpected) == ["optimizer: norm.bias", "optimizer: norm.weight"]
    assert few.param_groups[0]["weight_decay"] == 0.5 and len(few.state) == 3


def test_groups_that_were_divided_otherwise(tmp_path: Path) -> None:
    model = Net()
    optimizer = two_groups(model, 0.25)
    train(model, optimizer, range(3))
    restore = saved(tmp_path / "two", model=model, optimizer=optimizer)
    other = Net(seed=1)
    together = torch.optim.AdamW(other.parameters(), lr=1.0)
    with pytest.raises(
        DataError, match=r"groups its parameters differently: norm.weight is with embedding.weight here"
    ):
        restore({"model": other, "optimizer": together})
    report = restore({"model": other, "optimizer": together}, mismatched="skip")
    assert report.skipped == ["optimizer: group 0"] and together.param_groups[0]["lr"] == 1.0
    assert bits(together.state[other.norm.bias]) == bits(optimizer.state[model.norm.bias])
    restore = saved(tmp_path / "one", model=other, optimizer=together)
    with pytest.raises(DataError, match=r"norm.weight is not with embedding.weight here, but in the checkpoint"):
        restore({"model": model, "optimizer": two_groups(model, 0.25)})


def test_another_optimizer_or_scheduler_is_not_mistaken_for_this_one(tmp_path: Path) -> None:
    model = Net()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, range(1))
    step = torch.optim.lr_scheduler.StepLR(adam, 3)
    restore = saved(tmp_path, model=model, optimizer=adam, scheduler=step)
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 9)
    with pytest.raises(DataError, match="optimizer is of the class SGD here and Adam in the checkpoint"):
        restore({"model": model, "optimizer": sgd, "scheduler": step})
    with pytest.raises(DataError, match="scheduler is of the class CosineAnnealingLR here and StepLR in the check"):
        restore({"model": model, "optimizer": adam, "scheduler": cosine})
    report = restore({"model": model, "optimizer": sgd, "scheduler": cosine}, mismatched="skip")
    assert report.skipped == ["optimizer", "scheduler"] and sgd.param_groups[0]["lr"] == 0.5
    other = torch.optim.AdamW(model.parameters())  # of another class, with the same settings
    restore({"model": model, "optimizer": other, "scheduler": step})


def test_an_optimizer_without_its_model_is_told_to_bring_it(tmp_path: Path) -> None:
    model = Net()
    restore = saved(tmp_path, model=model, optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(DataError, match="parameters of no module in this State: give it the model, too"):
        restore({"optimizer": torch.optim.Adam(model.parameters())}, only="optimizer/*")


def test_state_goes_along_when_its_parameter_is_converted(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(2))
    restore = saved(tmp_path, model=model, optimizer=optimizer)
    half = Net().to(torch.bfloat16)
    second = torch.optim.Adam(half.parameters())
    restore({"model": half, "optimizer": second}, cast=True)
    found = second.state[half.hidden.weight]
    assert found["exp_avg"].dtype == torch.bfloat16 and found["step"].dtype == torch.float32
    assert torch.equal(found["exp_avg"], optimizer.state[model.hidden.weight]["exp_avg"].bfloat16())


# Conversion

FLOATS = [dtype for dtype in ITEMSIZE if "float" in dtype]
INTEGERS = [dtype for dtype in ITEMSIZE if "int" in dtype or dtype == "bool"]


def test_what_can_be_converted() -> None:
    values = {dtype: np.iinfo(dtype) for dtype in INTEGERS if dtype != "bool"}
    for source in ITEMSIZE:
        for target in ITEMSIZE:
            if source in values and target in values:
                wide = values[target].min <= values[source].min and values[source].max <= values[target].max
                assert can_cast(source, target) == wide, (source, target)
            elif "float" in source or "float" in target:
                assert can_cast(source, target) == ("float" in source and "float" in target)
            elif source == "bool":
                assert can_cast(source, target) == (target in INTEGERS)
            else:
                assert can_cast(source, target) == (source == target), (source, target)


@given(
    source=st.sampled_from(FLOATS + INTEGERS),
    target=st.sampled_from(FLOATS + INTEGERS),
    shape=st.lists(st.integers(0, 5), max_size=3),
    turn=st.booleans(),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    order=st.randoms(use_true_random=False),
    kind=st.sampled_from(["torch", "numpy"]),
)
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_size_in_any_order(
    source: str, target: str, shape: list[int], turn: bool, cuts: list[int], order: Any, kind: str
) -> None:
    """Conversion in pieces is torch's conversion of the whole, whatever the strides."""
    if not can_cast(source, target) or (
        kind == "numpy" and any("bfloat" in d or "float8" in d for d in (source, target))
    ):
        return
    count = int(np.prod(shape, dtype=int))
    generator = torch.Generator().manual_seed(count)
    stored = (torch.randn(count, generator=generator) * 50).abs().to(getattr(torch, source)).reshape(shape)
    expected = stored.to(getattr(torch, target))
    live = torch.zeros(shape[::-1] if turn else shape, dtype=getattr(torch, target))
    array: Any = live.permute(list(reversed(range(len(shape))))) if turn else live
    if kind == "numpy":
        array = array.numpy()
    data = stored.reshape(-1).view(torch.uint8).numpy()
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = list(itertools.pairwise(bounds))
    order.shuffle(pieces)
    cast = Cast(array, source, "w")
    for lo, hi in pieces:
        cast.write(lo, data[lo:hi])
    found = torch.zeros(shape, dtype=live.dtype).copy_(torch.as_tensor(array))
    assert bits(found) == bits(expected) and cast.nbytes == len(data)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_values_beyond_the_range_are_told(kind: str, tmp_path: Path) -> None:
    big = torch.tensor([1.0, 1e30, float("inf")])
    restore = saved(tmp_path, t={"fits": big[:1].clone(), "not": big[:2].clone(), "was": big[2:].clone()})
    live = {name: torch.zeros(length, dtype=torch.float16) for name, length in (("fits", 1), ("not", 2), ("was", 1))}
    target: Any = live if kind == "torch" else {name: tensor.numpy() for name, tensor in live.items()}
    assert restore({"t": target}, cast=True).cast == ["t/fits", "t/not", "t/was"]
    assert live["not"].tolist() == [1.0, float("inf")] and live["was"].item() == float("inf")

    report = restore({"t": target}, cast=True)
    assert report.infinite == ["t/not"]
    assert "warning: too large for their new dtype, now infinite: t/not" in str(report)


def test_conversion_takes_little_memory(tmp_path: Path) -> None:
    """64 MB of float32 into bfloat16 with strides: never the whole of it twice."""
    import tracemalloc

    live = torch.zeros(4096, 4096, dtype=torch.bfloat16).t()
    data = np.zeros(4096 * 4096, np.float32)
    data[-1] = 3.0
    cast = Cast(live, "float32", "w")
    tracemalloc.start()
    raw = data.view(np.uint8)
    for lo in range(0, len(raw), 32 << 20):
        cast.write(lo, raw[lo : lo + (32 << 20)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert live[-1, -1] == 3.0 and live[0, 0] == 0
    assert peak < 20 << 20


# Nothing is changed by what is known beforehand


class Stubborn:
    """A holder of state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_state_that_does_not_fit_stays_whole(tmp_path: Path) -> None:
    """Each of these is found before anything is written, whatever comes before it in the state."""
    model = Net()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, range(1))
    restore = saved(tmp_path, model=model, optimizer=adam, t={"x": torch.ones(2)}, holder=Stubborn([torch.ones(2)]))

    readonly = np.zeros(2, np.float32)
    readonly.flags.writeable = False
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"t": {"x": torch.ones(1).expand(2)}}, "t/x has elements that share memory"),
        ({"t": {"x": readonly}}, "t/x is read-only"),
        ({"t": {"x": torch.zeros(2, dtype=torch.int64)}}, "t/x is int64"),
        ({"t": {"y": torch.zeros(2)}}, "only in the checkpoint: t/x"),
        ({"t": Stubborn(1)}, "t is a holder here and a tensors in the checkpoint"),
        ({"holder": {"value": 1}}, "holder is a tree here and a holder in the checkpoint"),
        ({"optimizer": torch.optim.SGD(model.parameters(), 0.1)}, "is of the class SGD here"),
        ({"more": {}}, "missing from the checkpoint: more"),
    ]
    for change, words in wrong:
        other = Net(seed=4)
        optimizer = torch.optim.Adam(other.parameters())
        holder = Stubborn(None)
        target = {"model": other, "optimizer": optimizer, "t": {"x": torch.zeros(2)}, "holder": holder, **change}
        if change.get("optimizer"):
            target["optimizer"] = torch.optim.SGD(other.parameters(), 0.1)
        before = bits(other.state_dict())
        with pytest.raises(DataError, match=words):
            restore(target)
        assert bits(other.state_dict()) == before and not optimizer.state and holder.value is None


def test_what_refuses_its_values_is_found_before_anything_is_handed_over(tmp_path: Path) -> None:
    """A sparse tensor with impossible indices can only be seen once it was read; no holder gets its values before."""
    from harness.checkpoint.restoring import Restore

    handed: list[str] = []
    restore = Restore()

    def fail() -> Any:
        raise DataError("the indices are outside the tensor")

    restore.steps += [lambda: lambda: handed.append("first"), fail]
    with pytest.raises(DataError):
        restore.finish()
    assert handed == []


def test_an_ordered_dict_is_a_dict(tmp_path: Path) -> None:
    restore = saved(tmp_path, weights=OrderedDict(Net().state_dict()))
    target = OrderedDict(Net(seed=2).state_dict())
    restore({"weights": target})
    assert bits(target) == bits(Net().state_dict())


def test_what_is_in_memory_is_seen(tmp_path: Path) -> None:
    """Every rank reads all of a file that is: see `cached`."""
    path = tmp_path / "file"
    path.write_bytes(bytes(32 << 20))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if share_in_cache(file.fileno(), 0, 1 << 20) != 1.0:
            pytest.skip("this file system does not say, or has no page cache")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert share_in_cache(file.fileno(), 0, 32 << 20) < 0.5
        file.read()
        assert share_in_cache(file.fileno(), 0, 32 << 20) == 1.0
        assert share_in_cache(file.fileno(), 5, 5) in (0.0, 1.0)
