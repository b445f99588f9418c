"""The staging memory holds exactly this rank's part of the file, whatever was in it before."""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout_and_plan import trees

from harness.checkpoint import Single, State
from harness.checkpoint import gpu as gpu_module
from harness.checkpoint import staging as staging_module
from harness.checkpoint.engines.direct import Direct
from harness.checkpoint.layout import Layout, lay_out
from harness.checkpoint.plan import make_plan
from harness.checkpoint.schema import Leaf
from harness.checkpoint.staging import Image, Staging
from harness.checkpoint.state import take
from harness.checkpoint.tensors import Buffer
from harness.errors import InternalError


def random_bytes(layout: Layout, seed: int = 0) -> tuple[list[Buffer], np.ndarray]:
    """Buffers for the leaves, and the whole file after `layout.data_start`."""
    generator = np.random.default_rng(seed)
    whole = np.zeros(layout.data_end - layout.data_start, np.uint8)
    buffers = []
    for leaf, start in zip(layout.leaves, layout.starts - layout.data_start, strict=True):
        data = generator.integers(1, 255, leaf.nbytes, np.uint8)
        whole[start : start + leaf.nbytes] = data
        buffers.append(Buffer(data))
    return buffers, whole


def check(layout: Layout, images: list[Image], whole: np.ndarray, most: int) -> set[int]:
    """The images are their parts of the file. Returns the blocks they hold."""
    blocks: set[int] = set()
    for image in images:
        assert image.offset == layout.data_start + image.block * layout.block
        assert image.data.ctypes.data % mmap.PAGESIZE == 0 and 0 < len(image.data) <= max(most, layout.block)
        at = image.offset - layout.data_start
        assert np.array_equal(image.data, whole[at : at + len(image.data)])
        mine = range(image.block, image.block + -(-len(image.data) // layout.block))
        assert not blocks & set(mine)
        blocks |= set(mine)
    return blocks


@given(trees(), st.integers(1, 5), st.sampled_from([4096, 16384]), st.sampled_from([4096, 20_000, 1 << 30]), st.data())
@settings(max_examples=60, deadline=None)
def test_all_ranks_images_are_the_file(
    leaves: list[Leaf], size: int, block: int, most: int, data: st.DataObject
) -> None:
    layout = lay_out(leaves, block=block)
    buffers, whole = random_bytes(layout)
    shared = [i for i, leaf in enumerate(layout.leaves) if leaf.placement == "replicated"]
    unequal = data.draw(st.lists(st.sampled_from(shared), unique=True)) if shared else []
    staging = Staging()
    # What an earlier save left in the memory does not show.
    before = lay_out([Leaf("old", "uint8", (len(whole) + 50_000,))], block=block)
    staging.prepare(before, make_plan(before, rank=0, size=1))
    staging.fill([Buffer(np.full(len(whole) + 50_000, 255, np.uint8))])
    names, staging_module.IMAGE, staging_module.LARGE_IMAGE = (
        (staging_module.IMAGE, staging_module.LARGE_IMAGE),
        most,
        most,
    )
    try:
        seen: set[int] = set()
        for rank in range(size):
            plan = make_plan(layout, rank=rank, size=size, from_rank0=unequal)
            images = staging.prepare(layout, plan)
            chosen = set(data.draw(st.sets(st.integers(0, max(0, len(leaves) - 1)))))
            staging.fill(buffers, chosen)
            staging.fill(buffers, set(range(len(leaves))) - chosen)
            mine = check(layout, images, whole, most)
            assert len(mine) == plan.blocks and not mine & seen
            seen |= mine
        assert seen == set(range(layout.blocks))
    finally:
        staging_module.IMAGE, staging_module.LARGE_IMAGE = names


def test_all_leaves_at_once_and_from_another_thread() -> None:
    layout = lay_out([Leaf(f"t{i}", "float32", (i * 37,)) for i in range(60)], block=4096)
    buffers, whole = random_bytes(layout)
    staging = Staging()
    images = staging.prepare(layout, make_plan(layout, rank=1, size=2))
    thread = threading.Thread(target=staging.fill, args=(buffers,))
    thread.start()
    thread.join()
    check(layout, images, whole, 1 << 30)


def test_new_memory_is_waited_for_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.checkpoint.pages._TOUCHED", 4096)
    layout = lay_out([Leaf(f"t{i}", "uint8", (70_000,)) for i in range(40)], block=4096)
    buffers, whole = random_bytes(layout)
    staging = Staging()
    for threads in (True, False):
        if not threads:
            monkeypatch.setattr(threading.Thread, "start", refuse)
        images = staging.prepare(layout, make_plan(layout, rank=0, size=1))
        staging.view(layout.data_end - 4096, layout.data_end)[:] = 7
        assert (images[-1].data[-4096:] == 7).all(), "nobody touches it any more"
        staging.fill(buffers)
        check(layout, images, whole, 1 << 30)
        staging.close()


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_the_memory_is_kept_and_grows() -> None:
    staging = Staging()
    small, large = (lay_out([Leaf("t", "uint8", (n,))], block=4096) for n in (50_000, 500_000))
    plans = [make_plan(layout, rank=0, size=1) for layout in (small, large)]
    addresses = []
    for number in (0, 0, 1, 0, 1):
        layout = (small, large)[number]
        buffers, whole = random_bytes(layout, number)
        images = staging.prepare(layout, plans[number])
        staging.fill(buffers)
        check(layout, images, whole, 1 << 30)
        addresses.append(images[0].data.ctypes.data)
    assert addresses[0] == addresses[1] and addresses[2] == addresses[3] == addresses[4]
    staging.close()
    with pytest.raises(InternalError, match="before it was prepared"):
        staging.fill([])
    buffers, whole = random_bytes(small)
    images = staging.prepare(small, plans[0])
    staging.fill(buffers)
    check(small, images, whole, 1 << 30)


def test_large_parts_come_in_larger_images() -> None:
    layout = lay_out([Leaf("t", "uint8", (3 << 30,))])
    images = Staging().prepare(layout, make_plan(layout, rank=0, size=2))
    sizes = [len(image.data) for image in images]
    assert max(sizes) == staging_module.LARGE_IMAGE and sum(sizes) == 3 << 29
    images = Staging().prepare(layout, make_plan(layout, rank=0, size=48))
    assert max(len(image.data) for image in images) == staging_module.IMAGE


def test_bytes_that_come_from_elsewhere() -> None:
    layout = lay_out([Leaf("a", "uint8", (100_000,)), Leaf("b", "uint8", (100_000,), "rank0")], block=4096)
    plan = make_plan(layout, rank=0, size=2)
    assert len(plan.runs) == 1
    staging = Staging()
    with pytest.raises(InternalError, match="before it was prepared"):
        staging.put(0, np.zeros(1, np.uint8))
    images = staging.prepare(layout, plan)
    _, whole = random_bytes(layout)
    lo, hi = layout.block_range(plan.runs[0][0])[0], layout.block_range(plan.runs[0][1] - 1)[1]
    cuts = [lo, lo + 1, lo + 5000, hi - 7, hi]
    for begin, end in itertools.pairwise(cuts):
        staging.put(begin, whole[begin - layout.data_start : end - layout.data_start])
    check(layout, images, whole, 1 << 30)
    for begin, size in ((lo - 1, 1), (lo - 1, 2), (hi, 1), (hi - 1, 2), (0, 1)):
        with pytest.raises(InternalError, match="are not this rank's to write"):
            staging.put(begin, np.zeros(size, np.uint8))


def test_children_do_not_get_the_memory() -> None:
    """They could keep the pages that a write around the page cache, or a GPU, is using."""
    layout = lay_out([Leaf("t", "uint8", (1 << 20,))])
    staging = Staging()
    (image,) = staging.prepare(layout, make_plan(layout, rank=0, size=1))
    image.data[:] = 7
    address, inside = image.data.ctypes.data, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(number, 16) for number in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            assert "dc" in line.split(), line
            return
    raise AssertionError("the memory is not mapped")


def strided() -> dict[str, Any]:
    """Tensors that are not simply bytes in memory."""
    base = torch.arange(60_000, dtype=torch.float32).reshape(200, 300)
    array = np.arange(60_000, dtype=np.float32).reshape(200, 300)
    readonly = array[:50].copy()
    readonly.flags.writeable = False
    return {
        "plain": base.clone(),
        "transposed": base.t(),
        "every third": base[:, ::3],
        "conjugate": torch.complex(base, -base).conj(),
        "negative": torch.complex(base, -base).conj().imag,
        "half": base.to(torch.bfloat16),
        "expanded": torch.tensor([1.5]).expand(7000),
        "requires grad": torch.nn.Parameter(base.clone()),
        "numpy transposed": array.T,
        "big-endian": array.astype(">f4"),
        "readonly": readonly,
        "0-dimensional complex": torch.tensor([1 + 2j])[0:1],
        "empty": torch.empty(0, 3).t(),
    }


@pytest.mark.parametrize("size", [1, 3])
def test_tensors_of_any_memory_layout(size: int) -> None:
    snapshot = take(State(tensors=strided()))
    layout = lay_out(snapshot.leaves, block=4096)
    buffers = [snapshot.buffers[leaf.name] for leaf in layout.leaves]
    expected = np.zeros(layout.data_end - layout.data_start, np.uint8)
    for name, value in strided().items():
        if isinstance(value, torch.Tensor):
            flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            data = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8).numpy()
        else:
            data = np.frombuffer(value.astype(value.dtype.newbyteorder("<")).tobytes(), np.uint8)
        index = next(i for i, leaf in enumerate(layout.leaves) if leaf.name == f"tensors/{name}")
        at = int(layout.starts[index]) - layout.data_start
        assert len(data) == layout.leaves[index].nbytes, name
        expected[at : at + len(data)] = data
    staging = Staging()
    for rank in range(size):
        images = staging.prepare(layout, make_plan(layout, rank=rank, size=size))
        staging.fill(buffers)
        check(layout, images, expected, 1 << 30)
    assert all(buffer._copy is None for buffer in buffers), "copies are given back"


# GPUs. There is none here: a stand-in for torch.cuda says in which order it is called, tensors of the CPU stand in for
# those of a GPU.


class OnDevice(Buffer):
    """A tensor as on a GPU: no place in host memory, parts are tensors of torch."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]

    def part(self, lo: int, hi: int) -> Any:
        return torch.from_numpy(self.array)[lo:hi]


class Cuda:
    """Writes down what is asked of it."""

    def __init__(self, refuse: bool = False) -> None:
        self.log: list[str] = []
        self.refuse = refuse
        self.stack: list[str] = ["stream of the training"]

    def is_initialized(self) -> bool:
        return True

    def current_stream(self) -> Any:
        def record_event() -> str:
            self.log.append("event recorded")
            return "event"

        return SimpleNamespace(device=torch.device("cuda", 0), record_event=record_event)

    def Stream(self, device: Any) -> Any:
        self.log.append("stream made")
        return SimpleNamespace(
            wait_event=lambda event: self.log.append(f"wait for {event}"),
            synchronize=lambda: self.log.append("synchronize"),
        )

    def synchronize(self, device: Any) -> None:
        self.log.append("synchronize device")

    def stream(self, stream: Any) -> Any:
        cuda = self

        class Within:
            def __enter__(self) -> None:
                cuda.log.append("enter stream")

            def __exit__(self, *error: object) -> None:
                cuda.log.append("leave stream")

        return Within()

    def cudart(self) -> Any:
        def register(address: int, size: int, flags: int) -> int:
            self.log.append(f"lock {size}")
            return 1 if self.refuse else 0

        def unregister(address: int) -> int:
            self.log.append("unlock")
            return 0

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)


def with_gpu(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> None:
    real = gpu_module.copy_from_device

    def copy(parts: Any, target: Any) -> None:
        cuda.log.append("copy")
        real(parts, target)

    monkeypatch.setattr(gpu_module, "_cuda", lambda: cuda)
    monkeypatch.setattr(staging_module, "copy_from_device", copy)


def test_copies_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """After what the training has launched, on a stream of their own, into locked memory, complete at the end."""
    cuda = Cuda()
    with_gpu(monkeypatch, cuda)
    layout = lay_out([Leaf(f"t{i}", "uint8", (i * 3001,)) for i in range(1, 40)], block=4096)
    buffers, whole = random_bytes(layout)
    mixed = [OnDevice(buffer.array) if number % 3 else buffer for number, buffer in enumerate(buffers)]
    staging, plan = Staging(), make_plan(layout, rank=0, size=1)
    images = staging.prepare(layout, plan)
    staging.fill(mixed)
    check(layout, images, whole, 1 << 30)
    assert set(cuda.log) == {
        *("event recorded", f"lock {len(staging._memory)}", "stream made", "wait for event"),
        *("enter stream", "copy", "leave stream", "synchronize"),
    }
    assert cuda.log[0] == "event recorded" and cuda.log[-2:] == ["leave stream", "synchronize"]
    assert cuda.log.index("wait for event") < cuda.log.index("enter stream") < cuda.log.index("copy")
    assert cuda.log.count("copy") > 3

    cuda.log.clear()
    staging.prepare(layout, plan)
    staging.fill(mixed)
    assert "stream made" not in cuda.log and not [entry for entry in cuda.log if "lock" in entry], "all of it is kept"
    assert cuda.log[:3] == ["event recorded", "wait for event", "enter stream"]

    cuda.log.clear()
    larger = lay_out([Leaf("t", "uint8", (5 << 20,))])
    staging.prepare(larger, make_plan(larger, rank=0, size=1))
    assert cuda.log == ["event recorded", "unlock"], "memory that goes away is unlocked first"
    staging.fill([OnDevice(np.zeros(5 << 20, np.uint8))])
    assert f"lock {5 << 20}" in cuda.log
    cuda.log.clear()
    staging.close()
    assert cuda.log == ["unlock"]


def test_a_gpu_that_the_thread_does_not_train_on_and_memory_that_cannot_be_locked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(refuse=True)
    with_gpu(monkeypatch, cuda)
    layout = lay_out([Leaf("t", "uint8", (70_000,))], block=4096)
    buffers, whole = random_bytes(layout)
    other = OnDevice(buffers[0].array)
    monkeypatch.setattr(OnDevice, "device", torch.device("cuda", 1))
    staging = Staging()
    images = staging.prepare(layout, make_plan(layout, rank=0, size=1))
    staging.fill([other])
    check(layout, images, whole, 1 << 30)
    assert "synchronize device" in cuda.log and "wait for event" not in cuda.log
    staging.close()
    assert "unlock" not in cuda.log


def test_an_error_on_a_gpu_leaves_no_copy_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    with_gpu(monkeypatch, cuda)
    layout = lay_out([Leaf("t", "uint8", (70_000,))], block=4096)
    staging = Staging()
    staging.prepare(layout, make_plan(layout, rank=0, size=1))
    monkeypatch.setattr(OnDevice, "part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        staging.fill([OnDevice(np.zeros(70_000, np.uint8))])
    assert cuda.log[-2:] == ["leave stream", "synchronize"]


def test_without_a_gpu_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    assert gpu_module._cuda() is None


# Cost of many small tensors


def test_a_state_that_has_not_changed_its_shape_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import harness.checkpoint.snapshot as module

    tensors = {f"t{i}": torch.zeros(i % 7 + 1) for i in range(50)}
    state = State(tensors=tensors, extra={"a": 1})
    first = take(state)
    checked: list[int] = []
    original = module.check_schema
    counting = lambda leaves, links: (checked.append(len(leaves)), original(leaves, links))  # noqa: E731
    monkeypatch.setattr(module, "check_schema", counting)
    again = take(state, before=first.schema())
    assert not checked and again.schema() is first.schema()
    assert all(a is b for a, b in zip(first.leaves, again.leaves, strict=True))
    changes: list[Any] = [
        lambda: tensors.__setitem__("t3", torch.zeros(99)),
        lambda: tensors.__setitem__("t3", torch.zeros(99, dtype=torch.int32)),
        lambda: tensors.__setitem__("new", torch.zeros(1)),
        lambda: tensors.pop("t5"),
    ]
    hashes = {first.schema().hash}
    for number, change in enumerate(changes):
        change()
        changed = take(state, before=first.schema())
        assert len(checked) == number + 1
        assert [(leaf.name, leaf.dtype, leaf.shape) for leaf in changed.leaves] == [
            (f"tensors/{name}", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        ]
        hashes.add(changed.schema().hash)
    assert len(hashes) == len(changes) + 1


def test_garbage_collection_goes_on_as_it_was() -> None:
    import gc

    take(State(tensors={"a": torch.zeros(3)}))
    assert gc.isenabled()
    gc.disable()
    try:
        take(State(tensors={"a": torch.zeros(3)}))
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ZeroDivisionError):
        take(State(tensors={"a": torch.zeros(3)}, broken=Broken()))
    assert gc.isenabled()


class Broken:
    def state_dict(self) -> dict[str, Any]:
        return {"value": 1 / 0}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_staging_of_many_small_tensors_is_cheap() -> None:
    """30,000 tensors: about 0.2 s of processor time on an idle core of 2023; ten times as much fails here."""
    import time

    tensors = {f"block.{i % 1000}.part.{i // 1000}": torch.full((i % 37 + 1, 3), float(i)) for i in range(30_000)}
    state = State(tensors=tensors)
    snapshot = take(state)
    layout = lay_out(snapshot.leaves)
    plan = make_plan(layout, rank=0, size=1)
    staging = Staging()
    staging.prepare(layout, plan)
    began = time.thread_time()
    snapshot = take(state, before=snapshot.schema())
    staging.prepare(layout, plan)
    staging.fill([snapshot.buffers[leaf.name] for leaf in layout.leaves])
    assert time.thread_time() - began < 2
    at = {leaf.name: int(start) for leaf, start in zip(layout.leaves, layout.starts, strict=True)}
    for i in range(0, 30_000, 1711):
        name = f"block.{i % 1000}.part.{i // 1000}"
        place = at[f"tensors/{name}"]
        assert np.array_equal(staging.view(place, place + 4).view("<f4"), [float(i)]), name


def test_what_is_staged_is_written_unchanged_while_training_goes_on(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(100_000, dtype=torch.float32), "b": torch.ones(17)}
    snapshot = take(State(tensors=tensors))
    layout = lay_out(snapshot.leaves)
    staging = Staging()
    images = staging.prepare(layout, make_plan(layout, rank=0, size=1))
    staging.fill([snapshot.buffers[leaf.name] for leaf in layout.leaves])
    for tensor in tensors.values():
        tensor.zero_()
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, layout.data_end)
    Direct().write(path, layout, images, Single())
    found = np.fromfile(path, np.uint8)
    start = int(layout.starts[[leaf.name for leaf in layout.leaves].index("tensors/a")])
    assert np.array_equal(found[start : start + 400_000].view("<f4"), np.arange(100_000, dtype=np.float32))
