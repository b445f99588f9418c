"""Imports of what others write, and of what nobody should write: read as it is meant, or refused in a sentence."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Net, bits, manager
from support import ROOT

from harness.checkpoint import State, latest, open_checkpoint
from harness.checkpoint.convert import import_checkpoint
from harness.checkpoint.lease import InUse
from harness.checkpoint.schema import unescape
from harness.errors import DataError, HarnessError, InputMissing, UsageError


def loaded(path: Path, place: Path, **options: Any) -> dict[str, Any]:
    """The tensors that an import gives, by name."""
    done = import_checkpoint(path, place, entry="t", kind="tensors", **options)
    tensors: dict[str, Any] = {}
    manager(place).restore(State(t=tensors))
    with open_checkpoint(done.path) as checkpoint:
        assert checkpoint.verify() == []
        for alias, name in checkpoint.manifest.aliases.items():
            tensors[unescape(alias.removeprefix("t/"))] = tensors[unescape(name.removeprefix("t/"))]
    return tensors


def refused(path: Path, place: Path, words: str, **options: Any) -> HarnessError:
    """An import fails with a sentence that has these words, quickly, and leaves no checkpoint."""
    with pytest.raises((DataError, InputMissing, UsageError), match=words) as caught:
        import_checkpoint(path, place, **options)
    assert latest(place) is None
    assert len(str(caught.value)) < 1200, "what a hostile file says is not repeated at length"
    return caught.value


# safetensors


def header(path: Path, text: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    if isinstance(text, dict):
        text = json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), span: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


HOSTILE: list[tuple[Any, bytes, int | None, str]] = [
    (b"", b"", None, "header .* cannot be understood"),
    (b"{}", b"", 1 << 63, "its header would have 9223372036854775808 bytes"),
    (b"{}", b"", 200_000_000, "its header would have 200000000 bytes"),
    (b"[]", b"", None, "is no JSON object"),
    (b"\xff\xfe", b"", None, "cannot be understood"),
    (b"[" * 100_000, b"", None, "cannot be understood"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"", None, "cannot be understood"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"1234", None, "a name appears twice"),
    (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234", None, "NaN is not JSON"),
    (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', b"1234", None, "has a shape that is none"),
    ({"a": entry(shape=[int("9" * 400)])}, b"1234", None, "an impossible size"),
    ({"a": entry(shape=[1 << 40, 1 << 40, 0], span=(0, 0))}, b"", None, "an impossible size"),
    ({"a": entry(shape=[1] * 40)}, b"1234", None, "40 dimensions"),
    ({"a": entry(shape=[-1])}, b"1234", None, "a shape that is none"),
    ({"a": entry(shape=[True])}, b"1234", None, "a shape that is none"),
    ({"a": entry(shape="x")}, b"1234", None, "a shape that is none"),
    ({"a": entry(dtype="F4")}, b"1234", None, "the dtype F4, which is not known here"),
    ({"a": entry(dtype=["F32"])}, b"1234", None, "which is not known here"),
    ({"a": entry(span=[0])}, b"1234", None, "no place in the file"),
    ({"a": entry(span=[0.0, 4.0])}, b"1234", None, "no place in the file"),
    ({"a": entry(span=[4, 0])}, b"1234", None, "has 4 bytes, but"),
    ({"a": entry(span=[0, 8])}, b"12345678", None, "has 4 bytes, but"),
    ({"a": entry(span=[-4, 0])}, b"1234", None, "there is a gap before 'a'"),
    ({"a": entry(span=[1 << 62, (1 << 62) + 4])}, b"1234", None, "there is a gap before 'a'"),
    ({"a": entry(), "b": entry()}, b"1234", None, "before 'b', or it overlaps"),
    ({"a": entry(), "b": entry(span=[8, 12])}, b"123456789012", None, "there is a gap before 'b'"),
    ({"a": entry()}, b"123", None, "its header says .*\n.*it may have been cut"),
    ({"a": entry()}, b"12345", None, "its header says"),
    ({"a": {"dtype": "F32"}}, b"1234", None, "not described as it should be"),
    ({"a": 7}, b"1234", None, "not described as it should be"),
    ({"x" * 5000: entry()}, b"1234", None, "has a name that is no path"),
    ({"\ud800": entry()}, b"1234", None, "not Unicode text|cannot be understood"),
    ({"a": entry("BOOL", [4])}, b"\0\1\2\1", None, "bytes that are neither 0 nor 1"),
    ({"__metadata__": {"format": "pt"}}, b"", None, "there are no tensors in it"),
]


@pytest.mark.parametrize(("text", "data", "length", "words"), HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_hostile_safetensors(text: Any, data: bytes, length: int | None, words: str, tmp_path: Path) -> None:
    refused(header(tmp_path / "x.safetensors", text, data, length), tmp_path / "d", words)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_safetensors_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any change of one byte, any cut: a tensor of the file's own bytes, or a sentence."""
    from harness.checkpoint.convert.safetensors import read

    place = Path(f"/dev/shm/harness-import-{os.getpid()}.safetensors")
    whole = bytearray(safetensors.torch.save({"a": torch.arange(3.0), "b": torch.zeros(2, 2, dtype=torch.int8)}))
    if data.draw(st.booleans()):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    else:
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    place.write_bytes(whole)
    try:
        with read(place, lambda name: True) as source:
            for tensor in source.tensors:
                assert len(tensor.read(0, tensor.nbytes)) == tensor.nbytes <= len(whole)
    except DataError:
        pass
    finally:
        place.unlink()


def sharded(place: Path, names: tuple[str, str] = ("model-1.safetensors", "model-2.safetensors")) -> Path:
    place.mkdir()
    parts = [{"a.weight": torch.arange(6.0).reshape(2, 3)}, {"b": torch.tensor([True, False]), "c": torch.ones(4)}]
    for name, tensors in zip(("model-1.safetensors", "model-2.safetensors"), parts, strict=True):
        safetensors.torch.save_file(tensors, place / name)
    listed = {key: name for name, tensors in zip(names, parts, strict=True) for key in tensors}
    path = place / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 42}, "weight_map": listed}))
    return path


def test_a_set_in_shards_is_one_model(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    expected = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False]), "c": torch.ones(4)}
    assert bits(loaded(path, tmp_path / "d")) == bits(expected)
    assert bits(loaded(tmp_path / "m", tmp_path / "e", only=["[bc]"])) == bits({k: expected[k] for k in "bc"})


def test_hostile_sets(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    safetensors.torch.save_file({"b": torch.tensor([True, False]), "c": torch.ones(4)}, secret)
    for number, name in enumerate(["../secret.safetensors", str(secret), "..", "", ".", "a/b", "x\0y"]):
        path = sharded(tmp_path / f"m{number}", ("model-1.safetensors", name))
        refused(path, tmp_path / "d", "which is no file beside it")
    path = sharded(tmp_path / "link")
    (path.parent / "model-2.safetensors").unlink()
    refused(path, tmp_path / "d", "there is no .*model-2.safetensors")
    (path.parent / "model-2.safetensors").symlink_to(secret)
    refused(path, tmp_path / "d", "is a link, which may lead anywhere\n.*cp -rL")
    (path.parent / "model-2.safetensors").unlink()
    os.mkfifo(path.parent / "model-2.safetensors")
    refused(path, tmp_path / "d", "is not a file")
    path = sharded(tmp_path / "other")
    safetensors.torch.save_file({"c": torch.ones(4)}, path.parent / "model-2.safetensors")
    refused(path, tmp_path / "d", "'b' is in no file")
    safetensors.torch.save_file(
        {"b": torch.ones(1), "c": torch.ones(4), "e": torch.ones(1)}, path.parent / "model-2.safetensors"
    )
    refused(path, tmp_path / "d", "'e' is not in the index")
    safetensors.torch.save_file({"a.weight": torch.ones(1), "b": torch.ones(1)}, path.parent / "model-2.safetensors")
    refused(path, tmp_path / "d", "two of its files hold 'a.weight'")
    for text in (
        "{",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "[]",
        '{"weight_map": {"a":"b","a":"c"}}',
    ):
        path.write_text(text)
        refused(path, tmp_path / "d", "cannot be understood|no weight_map|no JSON object")
    refused(tmp_path, tmp_path / "d", "there is no model.safetensors in")


# npz


def test_npz_of_others(tmp_path: Path) -> None:
    turned = np.asfortranarray(np.arange(2 * 3 * 5, dtype=">i4").reshape(2, 3, 5))
    arrays: dict[str, Any] = {
        "turned": turned,
        "big": np.arange(7, dtype=">f8"),
        "complex": np.array([1 + 2j], ">c16"),
        "scalar": np.float16(2.5),
        "empty": np.zeros((0, 3), np.uint64),
        "flag": np.array([True, False]),
        "deep/name": np.zeros(100_000),
    }
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    for name in ("plain", "packed"):
        found = loaded(tmp_path / f"{name}.npz", tmp_path / name)
        assert found.keys() == arrays.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[key].numpy(), array)
            assert found[key].numpy().dtype == np.asarray(array).dtype.newbyteorder("=")


def test_compressed_arrays_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.checkpoint.convert.writing.PIECE", 4096)
    arrays = {name: np.random.default_rng(3).integers(0, 9, 9_000, np.int16) for name in "abc"}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    found = loaded(tmp_path / "x.npz", tmp_path / "d")
    assert all(np.array_equal(found[name].numpy(), arrays[name]) for name in arrays)


def npy(text: str, data: bytes = b"") -> bytes:
    body = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body + data


def archived(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(f"{name}.npy", data)
    return path


class Boom:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/harness-was-here",))


def test_hostile_npz(tmp_path: Path) -> None:
    place = tmp_path / "d"
    np.savez(tmp_path / "o.npz", a=np.array([Boom()], dtype=object), b=np.ones(3))
    assert "pickles, are never read" in str(refused(tmp_path / "o.npz", place, "'a.npy' is an array of object"))
    assert bits(loaded(tmp_path / "o.npz", tmp_path / "ok", only=["b"])) == bits(
        {"b": torch.ones(3, dtype=torch.float64)}
    )
    good = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"
    for name, data, words in [
        ("short", npy(good), "its header says"),
        ("long", npy(good, b"12345"), "its header says"),
        ("bomb", npy(good.replace("(1,)", f"({1 << 40},)"), b"1234"), "its header says"),
        ("vast", npy(good.replace("(1,)", f"({1 << 40}, {1 << 40})"), b"1234"), "an impossible size"),
        ("many", npy(good.replace("(1,)", f"{(1,) * 50}"), b"1234"), "50 dimensions"),
        ("minus", npy(good.replace("(1,)", "(-1,)"), b"1234"), "a shape that is none"),
        ("text", npy(good.replace("<f4", "<U4"), b"1" * 16), "is an array of <U4, not of numbers"),
        ("half", npy(good.replace("<f4", "<f16"), b"1" * 16), "is an array of float128, not of numbers"),
        ("rows", npy(good.replace("'<f4'", "[('a', '<f4')]"), b"1234"), "not of numbers"),
        ("code", npy("{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (1,)}"), "no array"),
        ("deep", npy("(" * 5000), "no array that can be read"),
        ("none", b"", "no array that can be read"),
        ("bools", npy(good.replace("<f4", "|b1"), b"\2"), "neither 0 nor 1"),
    ]:
        refused(archived(tmp_path / "x.npz", **{name: data}), place, words)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("readme.txt", "hello")
    refused(tmp_path / "x.npz", place, "'readme.txt' is not an array")
    (tmp_path / "x.npz").write_bytes(b"PK not at all")
    refused(tmp_path / "x.npz", place, "is no ZIP file")
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a.npy", npy(good, b"1234"))
    refused(tmp_path / "x.npz", place, "compressed in an unusual way")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        warnings.simplefilter("ignore")
        file.writestr("a.npy", npy(good, b"1234"))
        file.writestr("a.npy", npy(good, b"1234"))
    refused(tmp_path / "x.npz", place, "two entries have the same name")
    assert not Path("/tmp/harness-was-here").exists()


def patched(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """Change the central directory entry of the last file in an archive: (all bytes, where the entry is)."""
    data = bytearray(path.read_bytes())
    change(data, data.rindex(b"PK\1\2"))
    path.write_bytes(data)
    return path


def test_archives_that_lie(tmp_path: Path) -> None:
    """Sizes, places and checksums of the directory are compared with the file; overlapping entries are bombs."""

    def fresh(packed: bool = False) -> Path:
        (np.savez_compressed if packed else np.savez)(tmp_path / "x.npz", a=np.ones(1000), b=np.ones(1000))
        return tmp_path / "x.npz"

    def set_at(offset: int, value: int) -> Callable[[bytearray, int], None]:
        return lambda data, at: struct.pack_into("<I", data, at + offset, value)

    place = tmp_path / "d"
    refused(patched(fresh(), set_at(42, 0)), place, "overlaps with another entry")  # header offset: that of `a`
    refused(patched(fresh(), set_at(24, 1 << 30)), place, "two different sizes")
    refused(patched(fresh(True), set_at(24, 1 << 30)), place, "'b.npy' is shorter than it says|its header says")
    refused(patched(fresh(True), set_at(20, 1 << 30)), place, "overlaps|is cut|no ZIP file")
    refused(patched(fresh(), set_at(16, 1)), place, "does not match its checksum")
    refused(patched(fresh(True), set_at(16, 1)), place, "cannot be read: Bad CRC")
    refused(patched(fresh(), set_at(42, 1)), place, "no entry where 'b.npy' should be|overlaps")
    path = fresh()
    path.write_bytes(path.read_bytes()[:-5000])
    refused(path, place, "is no ZIP file")
    path = fresh()
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    refused(path, place, "does not match its checksum")


def test_a_bomb_costs_neither_memory_nor_disk(tmp_path: Path) -> None:
    """A megabyte that is a gigabyte, but says a kilobyte: reading ends where the header says that it ends."""
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (256,), }"
    archived(tmp_path / "x.npz", a=npy(text, b"\0" * (64 << 20)))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    refused(tmp_path / "x.npz", tmp_path / "d", "its header says")


# torch


def test_torch_files_of_others(tmp_path: Path) -> None:
    flat = torch.arange(60.0)
    tensors = OrderedDict(
        turned=torch.arange(60, dtype=torch.int16).reshape(3, 4, 5).permute(2, 0, 1),
        view=flat[10:22].view(3, 4),
        other=flat[22:30],
        steps=flat[::7],
        conj=torch.view_as_complex(torch.arange(12.0).view(6, 2)).conj(),
        parameter=torch.nn.Parameter(torch.ones(3)),
        scalar=torch.tensor(3, dtype=torch.uint8),
        empty=torch.zeros(0, 5),
        tied=flat[10:22].view(3, 4),
        bf16=torch.ones(3, dtype=torch.bfloat16),
        wide=torch.arange(9).to(torch.uint16),
    )
    torch.save(tensors, tmp_path / "x.pt")
    assert bits(loaded(tmp_path / "x.pt", tmp_path / "d")) == bits({k: v.detach() for k, v in tensors.items()})
    with open_checkpoint(tmp_path / "d" / "step-00000000") as checkpoint:
        assert checkpoint.manifest.aliases == {"t/tied": "t/view"}


def test_tensors_that_are_not_mapped_are_read_through_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not tell where a mapping lies."""
    from harness.checkpoint.convert import pytorch

    monkeypatch.setattr(pytorch._Places, "offset", lambda self, address: None)
    tensors = {"a": torch.arange(60.0).reshape(3, 4, 5), "b": torch.ones(3, dtype=torch.bool), "c": torch.tensor(1j)}
    torch.save(tensors, tmp_path / "x.pt")
    monkeypatch.setattr("harness.checkpoint.convert.writing.PIECE", 4096)
    assert bits(loaded(tmp_path / "x.pt", tmp_path / "d")) == bits(tensors)


def test_one_of_several_dicts(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    content = {
        "model": {f"module.{k}": v for k, v in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
    }
    torch.save({"all": content, "args": {"lr": 0.1}}, tmp_path / "x.ckpt")
    error = refused(tmp_path / "x.ckpt", tmp_path / "d", "holds several things")
    assert error.hint == "choose one with --key: all, args"
    error = refused(tmp_path / "x.ckpt", tmp_path / "d", "has no 'all/modle'", key="all/modle")
    assert error.hint == "choose one with --key: model, optimizer"
    refused(tmp_path / "x.ckpt", tmp_path / "d", "holds several things", key="all")
    import_checkpoint(tmp_path / "x.ckpt", tmp_path / "d", key="all/model", strip="module.", step=7)
    other = Net(seed=4)
    assert manager(tmp_path / "d").restore(State(model=other)) == 7
    assert bits(other.state_dict()) == bits(model.state_dict())
    refused(tmp_path / "x.ckpt", tmp_path / "e", "--key is for files of torch", key="a", from_="npz")


def test_values_that_are_no_tensors_are_left_out_and_told(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "epoch": 3, "options": {"lr": [0.1, "x"]}}, tmp_path / "x.pt")
    done = import_checkpoint(tmp_path / "x.pt", tmp_path / "d")
    assert done.tensors == 1 and done.notes == ("left out, as it is no tensor: epoch, options",)


def test_hostile_torch_files(tmp_path: Path) -> None:
    place, path = tmp_path / "d", tmp_path / "x.pt"
    torch.save({"a": torch.ones(2), "b": Boom()}, path)
    error = refused(path, place, "holds more than tensors and plain values, and is not unpickled")
    assert error.hint == "save the state_dict alone: torch.save(model.state_dict(), ...)"
    torch.save({"a": torch.ones(2), "b": bytearray(3)}, path)
    refused(path, place, "it refers to '__builtin__ bytearray'")
    torch.save({"a": torch.ones(2), "b": Boom()}, path, pickle_protocol=4)
    refused(path, place, "it refers to 'objects'")
    torch.save(Net(), path)
    refused(path, place, "holds more than tensors and plain values")
    torch.save(torch.ones(3), path)
    refused(path, place, "holds no dict of tensors")
    torch.save({1: torch.ones(3)}, path)
    refused(path, place, "holds no dict of tensors")
    torch.save([torch.ones(3)], path)
    refused(path, place, "holds no dict of tensors")
    torch.save({"a": 1}, path)
    refused(path, place, "holds several things")
    torch.save({"a": torch.ones(1).expand(1 << 40)}, path)
    refused(path, place, "'a' repeats its elements")
    large = torch.ones(10_000)
    torch.save({f"t{i}": large[i:] for i in range(9)}, path)
    refused(path, place, "they overlap")
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    refused(path, place, "is a torch.sparse_coo tensor")
    torch.save({"a": torch.ones(2, device="meta")}, path)
    refused(path, place, "on meta, which cannot be imported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, path)
    refused(path, place, "which cannot be imported|holds more than tensors")
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "save it again" in str(refused(path, place, "is no ZIP file").hint)
    path.write_bytes(pickle.dumps({"a": Boom()}))
    refused(path, place, "is no ZIP file")
    torch.save({"a": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[:4000])
    refused(path, place, "is no ZIP file")
    assert not Path("/tmp/harness-was-here").exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """The archive with entries changed, or left out."""
    with zipfile.ZipFile(path) as file:
        entries = [(name, file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in entries:
            if (new := change(name, data)) is not None:
                file.writestr(name, new)
    return path


def test_torch_archives_that_lie(tmp_path: Path) -> None:
    place, path = tmp_path / "d", tmp_path / "x.pt"

    def fresh() -> Path:
        torch.save({"a": torch.arange(1000.0)}, path)
        return path

    refused(rewritten(fresh(), lambda name, data: data, zipfile.ZIP_DEFLATED), place, "compressed, as torch never")
    refused(
        rewritten(fresh(), lambda name, data: None if "data.pkl" in name else data), place, "is not what torch.save"
    )
    refused(
        rewritten(fresh(), lambda name, data: data if "data/0" not in name else data[:400]),
        place,
        "cannot be read|is not where",
    )
    refused(rewritten(fresh(), lambda name, data: None if "data/0" in name else data), place, "cannot be read by torch")
    refused(rewritten(fresh(), lambda n, d: b"big" if "byteorder" in n else d), place, "on a big-endian machine")
    more = struct.pack("<H", 1000), struct.pack("<H", 60_000)
    refused(
        rewritten(fresh(), lambda n, d: d.replace(*more) if "data.pkl" in n else d), place, "cannot be read|not where"
    )
    module = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(module, path)
    refused(path, place, "is not what torch.save")


# HDF5


def test_hdf5_of_others(tmp_path: Path) -> None:
    expected: dict[str, Any] = {}
    with h5py.File(tmp_path / "x.h5", "w") as file:
        random = np.random.default_rng(1).integers(0, 100, (70, 90)).astype("<f4")
        file.create_dataset("layer/packed", data=random, compression="gzip", shuffle=True, chunks=(16, 32))
        file.create_dataset("layer/big", data=np.arange(12, dtype=">i2").reshape(3, 4))
        file.create_dataset("flag", data=np.array([True, False]))
        file.create_dataset("scalar", data=np.float64(2.5))
        file.create_dataset("c", data=np.array([1 + 2j], np.complex64))
        file.create_dataset("growing", data=np.arange(5), maxshape=(None,))
        file.create_dataset("empty", shape=(0, 4), dtype="u1")
        file["same"] = file["flag"]
        file["soft"] = h5py.SoftLink("/layer/big")
        file["layer/up"] = h5py.SoftLink("packed")
        file["text"] = "hello"
        for name in (
            "layer/packed",
            "layer/big",
            "flag",
            "scalar",
            "c",
            "growing",
            "empty",
            "same",
            "soft",
            "layer/up",
        ):
            expected[name] = np.asarray(file[name][()])
    refused(tmp_path / "x.h5", tmp_path / "d", "text is a dataset of object, not of numbers\n.*--only")
    found = loaded(tmp_path / "x.h5", tmp_path / "d", only=[*expected])
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), array, err_msg=name)


def test_chunks_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.checkpoint.convert.writing.PIECE", 4096)
    values = np.random.default_rng(2).random((37, 11, 13))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("a", data=values, chunks=(5, 4, 3), compression="lzf")
    np.testing.assert_array_equal(loaded(tmp_path / "x.h5", tmp_path / "d")["a"].numpy(), values)


def test_hostile_hdf5(tmp_path: Path) -> None:
    place, path, secret = tmp_path / "d", tmp_path / "x.h5", tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["s"] = np.ones(4)
    (tmp_path / "raw").write_bytes(b"12345678" * 4)

    def external_link(file: Any) -> None:
        file["a"] = h5py.ExternalLink(str(secret), "/s")

    def soft_through(file: Any) -> None:
        file["out"] = h5py.ExternalLink(str(secret), "/")
        file["a"] = h5py.SoftLink("/out/s")

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((4,), "<f8")
        layout[:] = h5py.VirtualSource(str(secret), "s", (4,))
        file.create_virtual_dataset("a", layout)

    def external_data(file: Any) -> None:
        file.create_dataset("a", (4,), "<f8", external=[(str(tmp_path / "raw"), 0, 32)])

    def sparse(file: Any) -> None:
        file.create_dataset("a", (1 << 40,), "<f8", chunks=(1024,))

    def late(file: Any) -> None:
        file.create_dataset("a", (1 << 40,), "<f8")

    def huge_chunk(file: Any) -> None:
        file.create_dataset("a", (1 << 29,), "u1", chunks=(1 << 29,), compression="gzip")[0] = 1

    def circle(file: Any) -> None:
        file.create_group("g")["up"] = file["/"]

    def twice(file: Any) -> None:
        file.create_group("g")["a"] = np.ones(2)
        file["h"] = file["g"]

    def references(file: Any) -> None:
        file["a"] = np.ones(2)
        file.create_dataset("r", data=np.array([file["a"].ref], dtype=h5py.ref_dtype))

    def null(file: Any) -> None:
        file["a"] = h5py.Empty("f4")

    def deep(file: Any) -> None:
        file["/".join("x" * 100)] = np.ones(1)

    def compound(file: Any) -> None:
        file["a"] = np.zeros(2, [("x", "<f4"), ("y", "<i4")])

    for make, words in [
        (external_link, "a is a link into another file"),
        (virtual, "has its data in other files"),
        (external_data, "has its data in other files"),
        (sparse, "of which only 0 are in the file"),
        (late, "of which only 0 are in the file"),
        (huge_chunk, "is stored in pieces of more than|are in the file"),
        (circle, "is linked twice, or too deep"),
        (twice, "is linked twice, or too deep"),
        (references, "not of numbers"),
        (null, "has no elements and no shape"),
        (deep, "is linked twice, or too deep"),
        (compound, "not of numbers"),
    ]:
        with h5py.File(path, "w") as file:
            make(file)
        refused(path, place, words)
    with h5py.File(path, "w") as file:
        soft_through(file)
    refused(path, place, "a is a link to out/s, which is not followed", only=["a"])
    with h5py.File(path, "w") as file:
        file["a"] = h5py.SoftLink("/b")
        file["b"] = h5py.SoftLink("/a")
    refused(path, place, "is a link to .*, which is not followed")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 600)
    refused(path, place, "is no HDF5 file that can be read")


# Any


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt", "h5"])
def test_files_that_are_none(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    with pytest.raises(InputMissing, match="there is no"):
        import_checkpoint(path, tmp_path / "d")
    for content in (b"", b"\0", b"hello, world" * 100, os.urandom(4096)):
        path.write_bytes(content)
        refused(path, tmp_path / "d", str(path))
    path.unlink()
    os.mkfifo(path)
    refused(path, tmp_path / "d", "is not a file")
    path.unlink()
    path.mkdir()
    refused(path, tmp_path / "d", "there is no model.safetensors in")


def test_wrong_requests(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a.b": torch.ones(2), "a": torch.ones(2), "x": torch.ones(1)}, path)
    refused(path, tmp_path / "d", "no tensor is called q", only=["q"])
    refused(path, tmp_path / "d", "cannot become a 'banana'", kind="banana")
    refused(path, tmp_path / "d", "the step is -1", step=-1)
    refused(path, tmp_path / "d", "there is no format 'zip'", from_="zip")
    refused(path, tmp_path / "d", "there is no dtype 'fp64'", dtype="fp64")
    refused(path, tmp_path / "d", "_ckpt, which is reserved", entry="_ckpt")
    done = import_checkpoint(path, tmp_path / "d", step=5)
    assert done.path.name == "step-00000005" and not done.notes
    again = import_checkpoint(path, tmp_path / "d", step=5)
    assert again.path.name == "step-00000005-2" and not again.notes
    older = import_checkpoint(path, tmp_path / "d", step=2)
    assert older.notes == ("it is not the newest: a restore takes step-00000005-2",)


def test_a_directory_that_a_job_saves_into_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    program = (
        "import sys, time; from harness.checkpoint.lease import Lease; lease = Lease.acquire(sys.argv[1]);"
        "print('held', flush=True); time.sleep(60)"
    )
    place = tmp_path / "d"
    holder = subprocess.Popen([sys.executable, "-c", program, str(place)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InUse):
            import_checkpoint(path, place)
        assert latest(place) is None
    finally:
        holder.kill()
        holder.wait()
    import_checkpoint(path, place)
