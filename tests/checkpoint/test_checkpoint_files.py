"""The files: what other programs see in them, and what happens to those that are damaged, forged or from the future."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from samples import Net, bits, manager, train

from harness.checkpoint import Damaged, State, latest, open_checkpoint
from harness.checkpoint.file import build_head
from harness.checkpoint.layout import USER_BLOCK
from harness.checkpoint.manifest import MAX_TEXT, parse, render
from harness.checkpoint.schema import ITEMSIZE
from harness.checkpoint.store import check, read_text
from harness.errors import DataError, HarnessError, InputMissing, UsageError

GOLDEN = Path(__file__).parent / "golden"


def golden_state() -> dict[str, Any]:
    """What `golden/step-00000007` holds. Written once by version 1; it must load for ever: never write it again."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 8 + number)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25, betas=(0.5, 0.75))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {
        dtype: (torch.arange(4 * ITEMSIZE[dtype]) % (2 if dtype == "bool" else 64))
        .to(torch.uint8)
        .view(getattr(torch, dtype))
        for dtype in ITEMSIZE
    }
    tensors |= {"big": torch.arange(20_000, dtype=torch.int32), "empty": torch.zeros(0, 3), "single": torch.tensor(2.5)}
    tensors |= {"grüße/ name": torch.tensor([1.0]), "..": torch.tensor([2.0])}
    extra = {
        "epoch": 3,
        "best": float("-inf"),
        "nan": float("nan"),
        "text": 'ü\n"',
        "tuple": (1, [2.5, None, True]),
        "numbers": {1: "a", (2, "b"): "c"},
        "bytes": b"\0\xff",
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "scalar": np.float32(0.1),
    }
    return {"model": model, "optimizer": optimizer, "tensors": tensors, "extra": extra}


def blank_golden_state() -> dict[str, Any]:
    state = golden_state()
    state["model"] = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state["optimizer"] = torch.optim.Adam(state["model"].parameters())
    state["tensors"] = {name: torch.zeros_like(tensor) for name, tensor in state["tensors"].items()}
    state["extra"] = {}
    return state


def saved(directory: Path, steps: range = range(1, 2), **options: Any) -> Net:
    """A model trained and saved at each of the steps."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    writer = manager(directory, **options)
    for step in steps:
        train(model, optimizer, range(step, step + 1))
        writer.save(step, State(model=model, optimizer=optimizer))
    return model


def restored(directory: Path) -> tuple[int | None, dict[str, Any], list[str]]:
    """(step, bits of the model, what was logged) of a restore into a fresh model."""
    model = Net(seed=9)
    reader = manager(directory)
    step = reader.restore(State(model=model, optimizer=torch.optim.Adam(model.parameters())))
    return step, bits(model.state_dict()), reader.lines  # type: ignore[attr-defined]


def test_the_golden_file_of_version_1_loads(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "c")
    expected, found = golden_state(), blank_golden_state()
    assert manager(tmp_path / "c").restore(State(**found)) == 7
    assert bits(found["model"].state_dict()) == bits(expected["model"].state_dict())
    assert bits(found["optimizer"].state_dict()) == bits(expected["optimizer"].state_dict())
    assert bits(found["tensors"]) == bits(expected["tensors"])
    extra, wanted = found["extra"], expected["extra"]
    assert list(extra) == list(wanted) and extra.pop("nan") != wanted.pop("nan")
    np.testing.assert_array_equal(extra.pop("array"), wanted.pop("array"))
    assert extra == wanted and type(extra["scalar"]) is np.float32
    with open_checkpoint(GOLDEN / "step-00000007") as checkpoint:
        assert checkpoint.manifest.metrics == {"val/loss": 0.5}
        assert checkpoint.verify() == []


def test_the_golden_file_reads_without_torch_mpi_or_hdf5() -> None:
    program = f"""
import sys
from harness.checkpoint import latest, open_checkpoint
path = latest({str(GOLDEN)!r})
with open_checkpoint(path) as checkpoint:
    assert checkpoint.read("tensors/big", rows=slice(3, 6)).tolist() == [3, 4, 5]
    assert checkpoint.read("model/0.weight").shape == (2, 3)
    assert checkpoint.read("/tensors/bfloat16").dtype == "float32"
print(sorted({{"torch", "h5py", "mpi4py", "horovod", "pydantic"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_plain_h5py_reads_every_tensor_by_name() -> None:
    expected = golden_state()["tensors"]
    with h5py.File(GOLDEN / "step-00000007" / "data.h5", "r") as file:
        for dtype in ITEMSIZE:
            found = file["tensors"][dtype]
            if dtype.startswith("float8"):
                assert found.attrs["dtype"] == dtype.encode()
                assert found[:].tolist() == expected[dtype].view(torch.uint8).tolist()
            else:
                values = found["r"] + 1j * found["i"] if dtype == "complex32" else found[:]
                wide = {"bfloat16": torch.float32, "complex32": torch.complex64}.get(dtype, expected[dtype].dtype)
                np.testing.assert_array_equal(values, expected[dtype].to(wide).numpy(), err_msg=dtype)
        assert file["tensors/bool"].dtype == bool and file["tensors/complex64"].dtype == np.complex64
        assert file["tensors/empty"].shape == (0, 3) and file["tensors/single"][()] == 2.5
        assert file["tensors/big"][-1] == 19_999
        assert file["tensors/grüße%2F name"][0] == 1 and file["tensors/%2E%2E"][0] == 2
        assert sorted(file["optimizer/0.weight"]) == ["exp_avg", "exp_avg_sq"]
        for dataset in (file["model/0.weight"], file["tensors/big"]):
            assert dataset.chunks is None and dataset.id.get_offset() is not None


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="there is no h5dump on PATH")
def test_h5dump_and_h5ls_print_it() -> None:
    path = str(GOLDEN / "step-00000007" / "data.h5")

    def run(*arguments: str) -> str:
        done = subprocess.run([*arguments, path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = run("h5ls", "-r")
    assert "/model/0.weight" in listed and "Dataset {2, 3}" in listed
    with open_checkpoint(Path(path).parent) as checkpoint:
        numbers = checkpoint.read("tensors/bfloat16")
    dumped = run("h5dump", "-d", "/tensors/bfloat16")
    assert "16-bit little-endian floating-point" in dumped
    printed = dumped.split("(0):")[1].split("}")[0].split(",")
    np.testing.assert_allclose([float(text) for text in printed], numbers, rtol=1e-4)


def test_a_tied_weight_has_both_names_in_hdf5(tmp_path: Path) -> None:
    saved(tmp_path)
    with h5py.File(tmp_path / "step-00000001" / "data.h5", "r") as file:
        assert file["model/head.weight"].id.get_offset() == file["model/embedding.weight"].id.get_offset()


def test_the_same_state_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uuid

    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=1))
    saved(tmp_path / "a")
    saved(tmp_path / "b")
    path = "step-00000001/data.h5"
    assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_a_later_save_has_the_same_metadata(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 4))
    manifest = check(tmp_path / "step-00000003")
    found = (tmp_path / "step-00000003" / "data.h5").read_bytes()[USER_BLOCK : manifest.layout.head]
    assert found == build_head(manifest.layout, manifest.aliases)


def test_a_file_comes_into_being_and_is_read_without_hdf5(tmp_path: Path) -> None:
    script = f"""if True:
        import sys
        sys.modules["h5py"] = None
        import numpy as np
        from harness.checkpoint import Manager, Single, State, open_checkpoint
        values = {{"a": np.arange(6.0), "b": np.ones(3, np.int8)}}
        path = Manager({str(tmp_path)!r}, Single()).save(1, State(values=values), wait=True)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.read("values/a").sum() == 15
        """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with h5py.File(tmp_path / "step-00000001" / "data.h5") as file:
        assert file["values/a"][...].tolist() == [0, 1, 2, 3, 4, 5]


def test_many_second_names_have_room_at_the_first_save(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(3, 1, bias=False) for _ in range(1000)]
    for layer in layers:
        layer.weight = layers[0].weight
    path = manager(tmp_path).save(1, State(model=torch.nn.Sequential(*layers)), wait=True)
    assert len(check(path).aliases) == 999


def test_rows_and_names(tmp_path: Path) -> None:
    table = torch.arange(100_000, dtype=torch.int64).reshape(10_000, 10)
    path = manager(tmp_path).save(
        1, State(tensors={"table": table, "one": torch.tensor(1.0), "none": torch.zeros(0, 4)})
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.names() == ["tensors/none", "tensors/one", "tensors/table"]
        assert checkpoint.metadata("tensors/table").shape == (10_000, 10)
        whole = checkpoint.read("tensors/table")
        for rows in (slice(0, 16), slice(5, None), slice(-3, None), slice(700, 9_000), slice(3, 3), slice(9, 2)):
            np.testing.assert_array_equal(checkpoint.read("tensors/table", rows), whole[rows])
        assert checkpoint.read("tensors/none").shape == (0, 4)
        assert checkpoint.read("tensors/none", slice(0, 1)).shape == (0, 4)
        assert checkpoint.read("tensors/one") == 1.0
        with pytest.raises(UsageError):
            checkpoint.read("tensors/one", slice(0, 1))
        with pytest.raises(UsageError):
            checkpoint.read("tensors/table", slice(0, 10, 2))
        with pytest.raises(InputMissing, match="holds no 'tensors/x'"):
            checkpoint.read("tensors/x")
    with pytest.raises(InputMissing, match="is no checkpoint"):
        open_checkpoint(tmp_path)


# Damage

DAMAGE: dict[str, Callable[[Path], None]] = {}


def damage(function: Callable[[Path], None]) -> Callable[[Path], None]:
    DAMAGE[function.__name__] = function
    return function


@damage
def truncated_by_a_byte(path: Path) -> None:
    os.truncate(path / "data.h5", (path / "data.h5").stat().st_size - 1)


@damage
def longer_by_a_byte(path: Path) -> None:
    os.truncate(path / "data.h5", (path / "data.h5").stat().st_size + 1)


@damage
def emptied(path: Path) -> None:
    os.truncate(path / "data.h5", 0)


@damage
def without_data(path: Path) -> None:
    (path / "data.h5").unlink()


@damage
def zeroed_block(path: Path) -> None:
    manifest = check(path)
    with open(path / "data.h5", "r+b") as file:
        file.seek(manifest.layout.data_start)
        file.write(bytes(512))


@damage
def zeroed_superblock(path: Path) -> None:
    with open(path / "data.h5", "r+b") as file:
        file.seek(USER_BLOCK)
        file.write(bytes(64))


@damage
def shortened_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", (path / "manifest.json").stat().st_size // 2)


@damage
def empty_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 0)


@damage
def huge_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", MAX_TEXT + 1)


@damage
def data_of_another_checkpoint(path: Path) -> None:
    shutil.copy(path.parent / "step-00000002" / "data.h5", path / "data.h5")


@damage
def a_link_instead_of_data(path: Path) -> None:
    (path / "data.h5").rename(path / "other.h5")
    (path / "data.h5").symlink_to("other.h5")


@damage
def a_folder_instead_of_data(path: Path) -> None:
    (path / "data.h5").unlink()
    (path / "data.h5").mkdir()


@damage
def a_manifest_that_is_no_text(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff\xfe")


@damage
def a_pipe_instead_of_data(path: Path) -> None:
    """Opening one waits for a writer."""
    (path / "data.h5").unlink()
    os.mkfifo(path / "data.h5")


@damage
def swapped_blocks(path: Path) -> None:
    manifest = check(path)
    start, size = manifest.layout.data_start, 512
    with open(path / "data.h5", "r+b") as file:
        file.seek(start)
        first, second = file.read(size), file.read(size)
        file.seek(start)
        file.write(second + first)


@damage
def the_name_of_another_step(path: Path) -> None:
    """A copy of an older checkpoint under a newer name."""
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-00000001", path)


@damage
def a_link_instead_of_a_manifest(path: Path) -> None:
    (path / "manifest.json").rename(path / "other.json")
    (path / "manifest.json").symlink_to("other.json")


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_damage_is_found_and_the_one_before_is_used(name: str, tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    second = restored(tmp_path)[1]
    saved(tmp_path, range(3, 4))
    path = tmp_path / "step-00000003"
    DAMAGE[name](path)
    with pytest.raises(HarnessError), open_checkpoint(path) as checkpoint:
        assert checkpoint.verify(), "somebody notices"
        raise Damaged("by verify")
    step, found, lines = restored(tmp_path)
    assert (step, found) == (2, second)
    assert any("step-00000003 is passed over" in line for line in lines)
    assert path.exists(), "nothing is deleted"


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    first = bits_at(tmp_path, 1)
    path = tmp_path / "step-00000002"
    manifest = check(path)
    layout = manifest.layout
    generator = np.random.default_rng(0)
    places = {*generator.integers(0, layout.data_end, 40).tolist(), 0, USER_BLOCK, layout.head, layout.data_start}
    places |= {layout.data_end - 1, layout.head + 8 * layout.blocks - 1}
    table_padding = range(layout.head + 8 * layout.blocks, layout.data_start)
    good = (path / "data.h5").read_bytes()
    for place in sorted(places):
        if place in table_padding:
            continue  # zeros that mean nothing
        data = bytearray(good)
        data[place] ^= 1 << int(generator.integers(8))
        (path / "data.h5").write_bytes(data)
        step, found, _ = restored(tmp_path)
        assert (step, found) == (1, first), f"a flip at byte {place}"
        (path / "damaged.json").unlink()
    (path / "data.h5").write_bytes(good)
    assert restored(tmp_path)[0] == 2


def bits_at(directory: Path, step: int) -> dict[str, Any]:
    only = directory / f"only-{step}"
    shutil.copytree(directory / f"step-{step:08d}", only / f"step-{step:08d}")
    return restored(only)[1]


def test_damaged_tensors_are_named_and_the_checkpoint_is_marked(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((5000,), float(i)) for i in range(6)}
    path = manager(tmp_path).save(1, State(tensors=tensors))
    manifest = check(path)
    index = next(i for i, leaf in enumerate(manifest.layout.leaves) if leaf.name == "tensors/t3")
    with open(path / "data.h5", "r+b") as file:
        file.seek(int(manifest.layout.starts[index]) + 10_000)
        file.write(b"x")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify() == ["tensors/t3"]
        with pytest.raises(Damaged, match="tensors/t3 is damaged"):
            checkpoint.read("tensors/t3")
        assert checkpoint.read("tensors/t5")[0] == 5
    reader = manager(tmp_path)
    with pytest.raises(DataError, match="none of the 1 checkpoints"):
        reader.restore(State(tensors=tensors))
    assert "damaged: tensors/t3" in reader.lines[0]  # type: ignore[attr-defined]
    assert "tensors/t3" in json.loads((path / "damaged.json").read_text())["message"]
    assert latest(tmp_path) is None
    with pytest.raises(DataError, match="none of the 1 checkpoints"):  # nor does the next start begin anew by itself
        manager(tmp_path).restore(State(tensors=tensors))


def test_data_and_digests_that_were_changed_together_are_found(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    first = bits_at(tmp_path, 1)
    path = tmp_path / "step-00000002"
    manifest = check(path)
    layout = manifest.layout
    with open(path / "data.h5", "r+b") as file:
        file.seek(layout.data_start)
        block = bytearray(file.read(layout.block_range(0)[1] - layout.data_start))
        block[0] ^= 1
        file.seek(layout.data_start)
        file.write(block)
        file.seek(layout.head)
        file.write(xxhash.xxh3_64_intdigest(block).to_bytes(8, "little"))
    assert restored(tmp_path)[:2] == (1, first)


def test_two_bad_ones_and_the_third_is_used(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 4), keep=None)
    first = bits_at(tmp_path, 1)
    zeroed_block(tmp_path / "step-00000003")
    shortened_manifest(tmp_path / "step-00000002")
    assert restored(tmp_path)[:2] == (1, first)


# Manifests from elsewhere


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and make its checksum right again."""
    value = json.loads((path / "manifest.json").read_text())
    del value["checksum"]
    text = change(value) or json.dumps(value)
    rest = text[1:] + "\n"
    checksum = xxhash.xxh3_128_hexdigest(rest.encode())
    (path / "manifest.json").write_text(f'{{"checksum":"{checksum}",\n{rest}')


def put(*where: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for key in where[:-1]:
            target = target[key]
        target[where[-1]] = value

    return change


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": put("format", value="other"),
    "version 0": put("version", value=0),
    "a version that is text": put("version", value="1"),
    "an unknown field": put("extra", value=1),
    "a missing field": lambda manifest: manifest.pop("step") and None,
    "a path for the file": put("file", "name", value="../../../../etc/passwd"),
    "an absolute path": put("file", "name", value="/etc/passwd"),
    "a leaf called ..": put("leaves", 0, "name", value="../x"),
    "a huge shape": put("leaves", 0, "shape", value=[1 << 62, 1 << 62]),
    "a negative shape": put("leaves", 0, "shape", value=[-1]),
    "a shape of floats": put("leaves", 0, "shape", value=[1.5]),
    "a shape of booleans": put("leaves", 0, "shape", value=[True]),
    "an offset outside": put("leaves", 0, "offset", value=1 << 50),
    "a negative offset": put("leaves", 0, "offset", value=-4096),
    "an offset in the metadata": put("leaves", 0, "offset", value=4096),
    "an unknown dtype": put("leaves", 0, "dtype", value="object"),
    "an unknown placement": put("leaves", 0, "placement", value="elsewhere"),
    "a name twice": lambda manifest: put("leaves", 0, "name", value=manifest["leaves"][1]["name"])(manifest),
    "another name": put("leaves", 0, "name", value="model/else"),
    "leaves that are no list": put("leaves", value={}),
    "a leaf that is no object": put("leaves", 0, value=3),
    "a huge file": put("file", "data_end", value=1 << 59),
    "a file before its data": put("file", "data_end", value=0),
    "tiny blocks": put("file", "block", value=1),
    "odd blocks": put("file", "block", value=5000),
    "huge blocks": put("file", "block", value=1 << 40),
    "an alias for nothing": put("aliases", value={"model/x": "model/nothing"}),
    "an alias over a leaf": lambda manifest: put(
        "aliases", value=dict.fromkeys([manifest["leaves"][0]["name"]], manifest["leaves"][1]["name"])
    )(manifest),
    "an alias called ..": lambda manifest: put("aliases", value={"../x": manifest["leaves"][1]["name"]})(manifest),
    "a step that is text": put("step", value="1"),
    "a negative step": put("step", value=-1),
    "a uuid with a path": put("uuid", value="../" * 10 + "ab"),
    "deep JSON": lambda manifest: json.dumps(manifest)[:-1] + ',"info":' + "[" * 200_000 + "]" * 200_000 + "}",
    "NaN": lambda manifest: json.dumps({**manifest, "created": float("nan")}),
    "a key twice": lambda manifest: json.dumps(manifest)[:-1] + ',"step":2}',
    "an integer of 100,000 digits": lambda manifest: json.dumps(manifest).replace(
        '"step": 2', '"step": ' + "9" * 100_000
    ),
    "no object": lambda manifest: "[1]",
    "an optimizer without groups": put("state", "optimizer", value={"kind": "optimizer"}),
    "an entry of an unknown kind": put("state", "optimizer", value={"kind": "pickle", "value": "..."}),
    "an entry that is a list": put("state", "optimizer", value=[]),
    "state of a parameter that is not there": put("state", "optimizer", "state", "nobody", value={}),
    "a state that refers to nothing": put(
        "state", "optimizer", "state", "norm.bias", value={"a": {"$tensor": ["torch", "optimizer/x"]}}
    ),
    "a state that calls": put("state", "optimizer", "state", "norm.bias", value={"a": {"$call": "os.system"}}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_manifests_end_in_a_sentence(name: str, tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    first = bits_at(tmp_path, 1)
    forge(tmp_path / "step-00000002", FORGERIES[name])
    try:
        step, found, _ = restored(tmp_path)
    except DataError as error:
        assert "step-00000002" in str(error)  # refused as a whole: what is stored does not make sense for this program
    else:
        assert (step, found) == (1, first)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["data.h5", "manifest.json"])
def test_pipes_keep_nobody_waiting(name: str, tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    first = bits_at(tmp_path, 1)
    path = tmp_path / "step-00000002"
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(HarnessError):
        open_checkpoint(path)
    assert restored(tmp_path)[:2] == (1, first)


@pytest.mark.parametrize("depth", [100, 900, 5_000])
def test_deep_values_end_in_a_sentence(depth: int, tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    first = bits_at(tmp_path, 1)

    def deep(manifest: dict[str, Any]) -> str:
        manifest["state"]["optimizer"]["groups"] = "HERE"
        inner = "[" * depth + "1" + "]" * depth
        return json.dumps(manifest).replace('"HERE"', inner)

    forge(tmp_path / "step-00000002", deep)
    try:
        step, found, _ = restored(tmp_path)
    except DataError as error:
        assert "step-00000002" in str(error)
    else:
        assert (step, found) == (1, first)


def test_forging_changes_nothing_by_itself(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    forge(tmp_path / "step-00000002", lambda manifest: None)
    assert restored(tmp_path)[0] == 2


def test_links_in_the_hdf5_file_lead_nowhere(tmp_path: Path) -> None:
    """Whatever HDF5 objects somebody plants: they change the metadata, which is noticed, and no reader follows them."""
    saved(tmp_path, range(1, 3))
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["secret"] = np.arange(5)
    first = bits_at(tmp_path, 1)
    path = tmp_path / "step-00000002"
    size = (path / "data.h5").stat().st_size
    with h5py.File(path / "data.h5", "r+") as file:
        del file["model/norm.bias"]
        file["model/norm.bias"] = h5py.ExternalLink(str(outside), "secret")
        del file["model/norm.weight"]
        file["model/norm.weight"] = h5py.SoftLink("/model/hidden.weight")
        virtual = h5py.VirtualLayout((5,), "i8")
        virtual[:] = h5py.VirtualSource(str(outside), "secret", (5,))
        file.create_virtual_dataset("model/virtual", virtual)
    os.truncate(path / "data.h5", size)
    with pytest.raises(Damaged):
        open_checkpoint(path)
    assert restored(tmp_path)[:2] == (1, first)


def test_a_newer_version_is_refused_and_nothing_older_is_used_instead(tmp_path: Path) -> None:
    saved(tmp_path, range(1, 3))
    forge(tmp_path / "step-00000002", put("version", value=2))
    for attempt in (
        lambda: restored(tmp_path),
        lambda: latest(tmp_path),
        lambda: open_checkpoint(tmp_path / "step-00000002"),
    ):
        with pytest.raises(DataError, match="format version 2; this program reads up to 1"):
            attempt()


def test_a_manifest_is_the_same_after_parsing(tmp_path: Path) -> None:
    saved(tmp_path)
    text = read_text(tmp_path / "step-00000001")
    manifest = check(tmp_path / "step-00000001", text)
    assert render(parse(text)) == text
    assert json.loads(text)["schema"] and manifest.step == 1
