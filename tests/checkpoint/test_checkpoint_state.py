"""torch objects and plain values: what is restored is what was saved, by bits and by type."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import OPTIMIZERS, Net, bits, manager, train
from support import needs_mpirun, ranks

from harness.checkpoint import Partial, SaveFailed, State, open_checkpoint
from harness.checkpoint.schema import ITEMSIZE, MAX_NAME
from harness.checkpoint.tree import complete, decode, encode
from harness.errors import DataError

ELSEWHERE = {"SparseAdam"}
"""Tested with sparse gradients, below."""


def test_all_optimizers_of_torch_are_tested() -> None:
    found = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"}
    assert found == {name.partition(",")[0] for name in OPTIMIZERS} | ELSEWHERE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    whole, straight = Net(), None
    straight = OPTIMIZERS[name](whole.parameters())
    train(whole, straight, range(9))

    first = Net()
    optimizer = OPTIMIZERS[name](first.parameters())
    train(first, optimizer, range(4))
    saver = manager(tmp_path)
    saver.save(4, State(model=first, optimizer=optimizer))

    second = Net(seed=1)
    resumed = OPTIMIZERS[name](second.parameters())
    assert manager(tmp_path).restore(State(model=second, optimizer=resumed)) == 4
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    train(second, resumed, range(4, 9))
    assert bits(second.state_dict()) == bits(whole.state_dict())
    assert bits(resumed.state_dict()) == bits(straight.state_dict())


def test_flags_that_need_a_gpu_come_back(tmp_path: Path) -> None:
    """capturable and differentiable do not run on a CPU; the state and the flags are those of any other."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(2))
    optimizer.param_groups[0] |= {"capturable": True, "differentiable": True}
    manager(tmp_path).save(2, State(model=model, optimizer=optimizer))
    second = torch.optim.Adam(model.parameters())
    manager(tmp_path).restore(State(model=model, optimizer=second))
    assert bits(second.state_dict()) == bits(optimizer.state_dict())
    assert second.param_groups[0]["capturable"] is True


def test_an_added_group_is_refused(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.hidden.parameters())
    train(model, optimizer, range(1))
    manager(tmp_path).save(1, State(model=model, optimizer=optimizer))
    optimizer.add_param_group({"params": [*model.norm.parameters()]})
    with pytest.raises(DataError, match=r"missing from the checkpoint: optimizer: norm\.weight"):
        manager(tmp_path).restore(State(model=model, optimizer=optimizer))


def test_the_order_counts_for_lbfgs_only(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    train(model, optimizer, range(2))
    manager(tmp_path).save(1, State(model=model, optimizer=optimizer))
    turned = torch.optim.LBFGS([*model.parameters()][::-1], max_iter=2)
    with pytest.raises(DataError, match="an LBFGS, whose state depends on the order of the parameters"):
        manager(tmp_path).restore(State(model=model, optimizer=turned))


def test_names_given_to_the_optimizer_stay_its_own(tmp_path: Path) -> None:
    """torch keeps names beside the parameters of a group: they belong to their order, which may be another."""
    model = Net()
    named = [*model.named_parameters()]
    optimizer = torch.optim.Adam(named)
    train(model, optimizer, range(2))
    manager(tmp_path).save(2, State(model=model, optimizer=optimizer))
    second = torch.optim.Adam(named[::-1])
    manager(tmp_path).restore(State(model=model, optimizer=second))
    assert second.param_groups[0]["param_names"] == [name for name, _ in named][::-1]
    assert bits(second.state[model.hidden.weight]) == bits(optimizer.state[model.hidden.weight])


def test_names_of_parameters_do_not_depend_on_what_else_is_saved(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(2))
    average = torch.optim.swa_utils.AveragedModel(model)
    manager(tmp_path).save(2, State(model=model, optimizer=optimizer, average=average))
    other = Net(seed=1)
    second = torch.optim.Adam(other.parameters())
    manager(tmp_path).restore(State(model=other, optimizer=second), partial=Partial(unexpected="skip"))
    assert bits(second.state_dict()) == bits(optimizer.state_dict())

    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1, momentum=0.9)
    path = manager(tmp_path / "both").save(1, State(a=model, b=other, optimizer=both))
    with open_checkpoint(path) as checkpoint:
        record: Any = checkpoint.manifest.state["optimizer"]
    assert record["groups"][0]["params"][0] == "a.embedding.weight" and record["class"] == "SGD"


@pytest.mark.parametrize("used", [False, True], ids=["fresh optimizer", "used optimizer"])
def test_what_the_optimizer_held_before_does_not_matter(used: bool, tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(2))
    manager(tmp_path).save(2, State(model=model, optimizer=optimizer))
    other = Net(seed=1)
    second = torch.optim.Adam(other.parameters(), lr=7.0)
    if used:
        train(other, second, range(5))
    manager(tmp_path).restore(State(model=other, optimizer=second))
    assert bits(second.state_dict()) == bits(optimizer.state_dict())


@pytest.mark.parametrize("kind", ["adagrad", "sparseadam", "sgd with sparse momentum"])
def test_optimizers_of_sparse_gradients(kind: str, tmp_path: Path) -> None:
    def make(seed: int) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Embedding(50, 4, sparse=True)
        if kind == "adagrad":
            return model, torch.optim.Adagrad(model.parameters(), lr=0.1)
        if kind == "sparseadam":
            return model, torch.optim.SparseAdam(model.parameters(), lr=0.1)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def steps(model: torch.nn.Module, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            model(torch.tensor([number, number, 2 * number])).pow(2).sum().backward()
            optimizer.step()

    whole, straight = make(0)
    steps(whole, straight, range(8))
    first, optimizer = make(0)
    steps(first, optimizer, range(3))
    manager(tmp_path).save(3, State(model=first, optimizer=optimizer))
    second, resumed = make(1)
    manager(tmp_path).restore(State(model=second, optimizer=resumed))
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    steps(second, resumed, range(3, 8))
    assert bits(whole.state_dict()) == bits(second.state_dict())


def test_optimizer_state_goes_by_name_not_by_number(tmp_path: Path) -> None:
    model = Net()
    named = dict(model.named_parameters())
    optimizer = torch.optim.Adam(
        [{"params": list(named.values())[:2]}, {"params": list(named.values())[2:], "lr": 0.5}]
    )
    train(model, optimizer, range(3))
    manager(tmp_path).save(3, State(model=model, optimizer=optimizer))
    other = Net(seed=1)
    turned = dict(other.named_parameters())
    second = torch.optim.Adam(
        [{"params": list(turned.values())[2:][::-1], "lr": 0.1}, {"params": list(turned.values())[:2][::-1]}]
    )
    manager(tmp_path).restore(State(model=other, optimizer=second))
    assert [group["lr"] for group in second.param_groups] == [0.5, 0.001]
    for name, parameter in named.items():
        assert bits(second.state[turned[name]]) == bits(optimizer.state[parameter]), name


def test_state_of_another_dtype_than_its_parameter_stays_as_it_is(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        return parameter, torch.optim.SGD([parameter], lr=0.1, momentum=0.9)

    parameter, optimizer = make()
    optimizer.state[parameter]["momentum_buffer"] = torch.full((5,), 1 / 3)  # fp32 beside a bf16 parameter
    manager(tmp_path).save(1, State(optimizer=optimizer))
    again, second = make()
    manager(tmp_path).restore(State(optimizer=second))
    assert bits(second.state[again]) == bits(optimizer.state[parameter])


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        a, b = Net(seed), Net(seed + 1)
        return {
            "a": a,
            "b": b,
            "opt_a": torch.optim.Adam(a.parameters()),
            "opt_b": torch.optim.SGD(b.parameters(), 0.1, 0.9),
        }

    first, second = make(0), make(5)
    for model, optimizer in (("a", "opt_a"), ("b", "opt_b")):
        train(first[model], first[optimizer], range(2))
    manager(tmp_path).save(2, State(**first))
    manager(tmp_path).restore(State(**second))
    for name in first:
        assert bits(second[name].state_dict()) == bits(first[name].state_dict()), name


class Warmup:
    """A rule of learning rates that is an object: torch stores its attributes."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


lr = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o, n: lr.LambdaLR(o, [Warmup(n), lambda step: 0.9**step]),
    "MultiplicativeLR": lambda o, n: lr.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o, n: lr.StepLR(o, n, gamma=0.5),
    "MultiStepLR": lambda o, n: lr.MultiStepLR(o, [2, 2, n]),
    "ConstantLR": lambda o, n: lr.ConstantLR(o, 0.5, n),
    "LinearLR": lambda o, n: lr.LinearLR(o, 0.1, 1.0, n),
    "ExponentialLR": lambda o, n: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, n: lr.PolynomialLR(o, n, 2.0),
    "CosineAnnealingLR": lambda o, n: lr.CosineAnnealingLR(o, n, 0.01),
    "CosineAnnealingWarmRestarts": lambda o, n: lr.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o, n: lr.CyclicLR(o, 0.1, 0.5, step_size_up=n, mode="exp_range", gamma=0.9),
    "CyclicLR, own function": lambda o, n: lr.CyclicLR(o, 0.1, 0.5, n, scale_fn=lambda x: 0.5**x),
    "OneCycleLR": lambda o, n: lr.OneCycleLR(o, 0.5, total_steps=2 * n),
    "ReduceLROnPlateau": lambda o, n: lr.ReduceLROnPlateau(o, patience=1, cooldown=1, factor=0.5),
    "SequentialLR": lambda o, n: lr.SequentialLR(
        o, [lr.LinearLR(o, 0.1, 1.0, 3), lr.CosineAnnealingLR(o, n), lr.LambdaLR(o, Warmup(n))], [3, 6]
    ),
    "ChainedScheduler": lambda o, n: lr.ChainedScheduler([lr.StepLR(o, 3), lr.ExponentialLR(o, 0.9)], o),
    "SWALR": lambda o, n: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=n),
}


def test_all_schedulers_of_torch_are_tested() -> None:
    found = {
        name
        for name, kind in vars(lr).items()
        if isinstance(kind, type) and issubclass(kind, lr.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert found | {"SWALR"} == {name.partition(",")[0] for name in SCHEDULERS}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about its SequentialLR
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_go_on_as_if_they_had_never_stopped(name: str, tmp_path: Path) -> None:
    def make(length: int) -> dict[str, Any]:
        model = Net()
        groups = [{"params": model.hidden.parameters()}, {"params": model.norm.parameters(), "lr": 0.2}]
        optimizer = torch.optim.SGD(groups, lr=0.4, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS[name](optimizer, length)}

    def steps(state: dict[str, Any], numbers: range) -> list[Any]:
        rates = []
        for number in numbers:
            train(state["model"], state["optimizer"], range(number, number + 1))
            arguments = (1.0,) if isinstance(state["scheduler"], lr.ReduceLROnPlateau) else ()
            state["scheduler"].step(*arguments)
            rates.append([group["lr"] for group in state["optimizer"].param_groups])
        return rates

    whole, first = make(5), make(5)
    rates = steps(whole, range(10))
    assert len({tuple(rate) for rate in rates}) > 1 and rates[:4] == steps(first, range(4))
    manager(tmp_path).save(4, State(**first))
    second = make(8)  # another setting than what was saved
    manager(tmp_path).restore(State(**second))
    assert steps(second, range(4, 10)) == rates[4:]
    assert bits(second["model"].state_dict()) == bits(whole["model"].state_dict())
    assert repr(second["scheduler"].state_dict()) == repr(whole["scheduler"].state_dict())


class Loader:
    """Like a data loader that can say where it is: nested state with numbers, text and arrays."""

    def __init__(self) -> None:
        self.position = {"epoch": 0, "batch": 0, "order": np.arange(5)}

    def __iter__(self) -> Any:
        while self.position["batch"] < 5:
            self.position["batch"] += 1
            yield int(self.position["order"][self.position["batch"] - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"position": dict(self.position), "workers": (1, "fork"), None: b"raw"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["workers"] == (1, "fork") and state[None] == b"raw"
        self.position = state["position"]


def test_scalers_averages_loaders_and_other_holders_of_state(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        model = Net(seed)
        return {
            "model": model,
            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2),
            "average": torch.optim.swa_utils.AveragedModel(
                model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
            ),
            "ema": {name: tensor.detach().clone() for name, tensor in model.named_parameters()},
            "loader": Loader(),
        }

    first, second = make(0), make(1)
    optimizer = torch.optim.SGD(first["model"].parameters(), lr=0.1)
    for number in range(3):
        loss = first["model"](torch.tensor([number, 1, 2])).square().mean()
        first["scaler"].scale(loss).backward()
        first["scaler"].step(optimizer)
        first["scaler"].update()
        first["average"].update_parameters(first["model"])
    first["loader"].position["order"] = np.array([3, 1, 4, 0, 2])
    ahead = iter(first["loader"])
    assert [next(ahead), next(ahead)] == [3, 1]
    manager(tmp_path).save(3, State(**first))
    assert [*ahead] == [4, 0, 2]
    manager(tmp_path).restore(State(**second))
    assert second["scaler"].state_dict() == first["scaler"].state_dict() and first["scaler"].get_scale() == 16.0
    assert bits(second["average"].state_dict()) == bits(first["average"].state_dict())
    assert second["average"].n_averaged == 3
    assert bits(second["ema"]) == bits(first["ema"])
    assert [*second["loader"]] == [4, 0, 2]


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_shape_and_stride(dtype: str, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (40 * ITEMSIZE[dtype],), dtype=torch.uint8)
    base = raw.view(kind).reshape(5, 8)
    tensors = {
        "whole": base,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "scalar": base[0, 0].clone(),
        "empty": base[:0],
        "none of them": base[:, :0],
    }
    if dtype.startswith("complex"):
        tensors["conjugate"] = base.conj()
    path = manager(tmp_path).save(1, State(tensors=tensors))
    like = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert like["transposed"].stride() == tensors["transposed"].stride() != (5, 1)
    manager(tmp_path).restore(State(tensors=like))
    assert bits(like) == bits(tensors)
    made: dict[str, torch.Tensor] = {}
    manager(tmp_path).restore(State(tensors=made))
    assert bits(made) == bits(tensors)
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.read("tensors/transposed")
        if dtype.startswith("float8"):
            assert found.tolist() == tensors["transposed"].view(torch.uint8).tolist()
        else:
            wide = {"bfloat16": torch.float32, "complex32": torch.complex64}.get(dtype, kind)
            np.testing.assert_array_equal(found, tensors["transposed"].to(wide).numpy())


def test_channels_last_models(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    manager(tmp_path).save(1, State(model=model))
    for other in (torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)):
        manager(tmp_path).restore(State(model=other))
        assert torch.equal(other.weight, model.weight)


def test_numpy_arrays(tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(12.0).reshape(3, 4),
        "swapped": np.arange(5, dtype=">i4"),
        "fortran": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
        "complex": np.array([1 + 2j], np.complex64),
        "bool": np.array([True, False]),
        "none": np.zeros((0, 3)),
        "none, as torch's": torch.from_numpy(np.zeros(0, np.float32)),
    }
    manager(tmp_path).save(1, State(arrays=arrays))
    found: dict[str, Any] = {name: np.zeros_like(array) for name, array in arrays.items()}
    found["none, as torch's"] = torch.from_numpy(np.zeros(0, np.float32))
    manager(tmp_path).restore(State(arrays=found))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_second_names_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.register_parameter("a", torch.nn.Parameter(torch.zeros(2)))
    model.register_parameter("b" * (MAX_NAME + 1), model.a)
    with pytest.raises(SaveFailed, match="a name that is no path"):
        manager(tmp_path).save(1, State(model=model))
    assert not list(tmp_path.glob("step-*"))


def test_tied_weights_are_stored_once_and_fit_models_that_are_not_tied(tmp_path: Path) -> None:
    tied = Net()
    path = manager(tmp_path).save(1, State(model=tied))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.manifest.aliases == {"model/head.weight": "model/embedding.weight"}
        assert len(checkpoint.manifest.layout.leaves) == len(tied.state_dict()) - 1
        np.testing.assert_array_equal(checkpoint.read("model/head.weight"), checkpoint.read("model/embedding.weight"))
    loose = Net(seed=1)
    loose.head.weight = torch.nn.Parameter(torch.zeros(11, 6))
    manager(tmp_path).restore(State(model=loose))
    assert torch.equal(loose.head.weight, tied.head.weight) and torch.equal(loose.embedding.weight, tied.head.weight)
    again = Net(seed=1)
    manager(tmp_path).restore(State(model=again))
    assert again.head.weight is again.embedding.weight and torch.equal(again.head.weight, tied.head.weight)


def test_shared_memory_without_a_shared_object_is_found(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    path = manager(tmp_path).save(1, State(model=model))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.manifest.aliases == {"model/1.weight": "model/0.weight"}


def test_compiled_models_have_the_same_names(tmp_path: Path) -> None:
    model = Net()
    manager(tmp_path).save(1, State(model=torch.compile(model)))
    other = Net(seed=1)
    manager(tmp_path).restore(State(model=other))
    assert bits(other.state_dict()) == bits(model.state_dict())


def test_buffers_that_do_not_persist_are_left_out_and_extra_state_is_not(tmp_path: Path) -> None:
    class Counting(torch.nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.count = {"n": count, "t": torch.full((2,), float(count))}

        def get_extra_state(self) -> Any:
            return self.count

        def set_extra_state(self, state: Any) -> None:
            self.count = state

    def make(count: int) -> torch.nn.Module:
        model = Net()
        model.add_module("counting", Counting(count))
        return model

    path = manager(tmp_path).save(1, State(model=make(5)))
    with open_checkpoint(path) as checkpoint:
        assert "model/scratch" not in checkpoint.names()
    model = make(0)
    manager(tmp_path).restore(State(model=model))
    assert bits(model.counting.count) == bits({"n": 5, "t": torch.tensor([5.0, 5.0])})
    with pytest.raises(DataError, match="extra state of counting"):
        manager(tmp_path).restore(State(model=Net()))


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(max_size=20),
        st.sampled_from([np.float64(0.1), np.int32(-3), torch.tensor(2.5), torch.tensor(7), torch.tensor(True)]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.dictionaries(st.one_of(st.integers(), st.none(), st.tuples(st.integers(), st.text())), inner, max_size=3),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return bool(bits(a) == bits(b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(values)
@settings(max_examples=200, deadline=None)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    leaves: dict[str, Any] = {}
    assert same(complete(decode(encode(value, "x", leaves), None)), value) and not leaves


def test_a_dict_is_restored_in_place_with_tensors_in_it(tmp_path: Path) -> None:
    extra = {"epoch": 3, "best": float("inf"), "rng": torch.get_rng_state(), "list": [np.arange(3), (1, "a")], 5: None}
    manager(tmp_path).save(1, State(extra=extra))
    target: dict[Any, Any] = {"epoch": 0, "gone": 1}
    alias = target
    manager(tmp_path).restore(State(extra=target))
    assert alias is target and list(target) == list(extra)
    assert target["epoch"] == 3 and target["best"] == float("inf") and 5 in target
    assert torch.equal(target["rng"], extra["rng"]) and target["list"][0].tolist() == [0, 1, 2]
    assert State(extra=target).extra is target


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": object()}, "extra/a is a builtins.object, which a checkpoint cannot hold"),
        ({"a": {1, 2}}, "extra/a is a builtins.set"),
        ({"f": lambda: 1}, "extra/f is a builtins.function"),
        ({"a": 1j}, "extra/a is a builtins.complex"),
        ({"n": 1 << 5000}, "extra/n is an integer of more than"),
        ({object(): 1}, "dict with the key"),
        ({"t": torch.zeros(3, device="meta")}, "extra/t has no data"),
        ({"t": np.array(["text"])}, "extra/t has the dtype str"),
        ({"t": np.array([None])}, "extra/t has the dtype object"),
    ],
)
def test_what_cannot_be_stored_is_named(value: Any, words: str, tmp_path: Path) -> None:
    from harness.checkpoint import SaveFailed

    with pytest.raises(SaveFailed, match=words):
        manager(tmp_path).save(1, State(extra=value))
    assert list(tmp_path.iterdir()) == []


def test_endless_values_are_refused(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(DataError, match="nested deeper"):
        encode(endless, "x", {})


@pytest.mark.parametrize(
    "value",
    [
        {"$call": "os.system"},
        {"$tensor": ["torch", "model/missing"]},
        {"$tensor": "x"},
        {"$tensor": []},
        {"$tuple": 5},
        {"$tuple": [], "more": 1},
        {"$float": "1e9"},
        {"$float": []},
        {"$bytes": "%%"},
        {"$bytes": 3},
        {"$scalar": ["torch", "Tensor", 1]},
        {"$scalar": ["torch", "float32", [1]]},
        {"$scalar": ["torch", "float32"]},
        {"$scalar": ["numpy", "int8", "x"]},
        {"$dict": [[{"$dict": []}, 1]]},
        {"$dict": [1]},
        {"$counter": [["a", "b"]]},
        {"$sparse": {"shape": [2]}},
    ],
)
def test_hostile_values_are_refused(value: Any) -> None:
    def no_tensors(name: str, kind: str) -> Any:
        raise DataError("there is no such tensor")

    with pytest.raises(DataError):
        decode(value, no_tensors)


def test_all_that_does_not_fit_is_said_at_once_and_nothing_changes(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(1))
    saver = manager(tmp_path)
    saver.save(1, State(model=model, optimizer=optimizer, extra={}))

    other = Net(seed=3)
    other.hidden = torch.nn.Linear(6, 7)
    other.head.bias = torch.nn.Parameter(torch.zeros(11, dtype=torch.float64))
    before = bits(other.state_dict())
    with pytest.raises(DataError) as caught:
        saver.restore(State(model=other, ema={"a": torch.zeros(1)}))
    message = str(caught.value)
    for words in (
        "only in the checkpoint: optimizer (an optimizer)",
        "only in the checkpoint: extra",
        "missing from the checkpoint: ema",
        "missing from the checkpoint: model/hidden.bias",
        "model/hidden.weight is float32[7, 6] here and float32[6, 6] in the checkpoint",
        "model/head.bias is float64[11] here and float32[11] in the checkpoint",
    ):
        assert words in message
    assert bits(other.state_dict()) == before

    another = torch.optim.Adam([*list(model.parameters())[1:]])
    with pytest.raises(DataError, match=r"only in the checkpoint: optimizer: embedding\.weight"):
        saver.restore(State(model=model, optimizer=another, extra={}))
    plain = Net(seed=9)
    assert saver.restore(State(model=plain), partial=Partial(only="model/*")) == 1
    assert bits(plain.state_dict()) == bits(model.state_dict())


def test_a_state_takes_only_what_it_can_hold() -> None:
    with pytest.raises(DataError, match=r"State\(thing=...\) is a int"):
        State(thing=3)
    with pytest.raises(DataError, match="cannot be called"):
        State(entries={})
    assert State(model=None).entries == {}
    with pytest.raises(AttributeError):
        _ = State().model
    with pytest.raises(DataError, match="no shape yet"):
        from harness.checkpoint.state import take

        take(State(model=torch.nn.LazyLinear(3)))


@pytest.mark.mpi
@needs_mpirun
@pytest.mark.parametrize("count", [1, 2])
def test_horovods_optimizer_is_the_one_in_it(count: int, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("ranks_optimizers.py"))
    done = ranks(count, [script, str(tmp_path)])
    assert f"{len(OPTIMIZERS) - 2} optimizers on {count} ranks" in done.stdout, done.stdout + done.stderr


def test_optional_entries_may_be_on_one_side_only(tmp_path: Path) -> None:
    """What only one form of training has."""
    saver = manager(tmp_path)
    model, buffer = torch.nn.Linear(2, 2), {"w": torch.ones(3)}
    saver.save(1, State(model=model, momentum=buffer))
    with pytest.raises(DataError, match=r"only in the checkpoint: momentum"):
        saver.restore(State(model=model, optional=["other"]))
    assert saver.restore(State(model=model, optional=["momentum"])) == 1
    assert saver.report.unexpected == ["momentum"]
    with pytest.raises(DataError, match=r"missing from the checkpoint: other"):
        saver.restore(State(model=model, other={"v": torch.zeros(1)}, optional=["momentum"]))
    kept = {"v": torch.zeros(1)}
    assert saver.restore(State(model=model, other=kept, momentum={}, optional=["momentum", "other"])) == 1
    assert saver.report.missing == ["other"] and kept["v"].item() == 0
    saver.close()
