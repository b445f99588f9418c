"""Export and import: bit for bit, with the real libraries as judges, in bounded memory, whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Net, bits, manager
from support import ROOT

from harness.checkpoint import Damaged, State, latest, open_checkpoint
from harness.checkpoint.convert import FORMATS, export_checkpoint, format_of, import_checkpoint
from harness.checkpoint.convert.dtypes import _TABLES, as_dtype, convert
from harness.checkpoint.convert.names import choose, unescape
from harness.checkpoint.convert.tensor import Source, Tensor
from harness.checkpoint.convert.writing import write_checkpoint
from harness.checkpoint.schema import ITEMSIZE, escape
from harness.errors import DataError, InputMissing, UsageError

GOLDEN = Path(__file__).parent / "golden" / "step-00000007"
SUFFIX = {"safetensors": "safetensors", "npz": "npz", "torch": "pt", "hdf5": "h5"}
WIDE = {"bfloat16": torch.float32, "float8_e4m3fn": torch.float32, "float8_e5m2": torch.float32}

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:The given NumPy array is not writable")


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory for many small files, in memory."""
    place = Path(f"/dev/shm/harness-convert-{os.getpid()}")
    place.mkdir()
    yield place
    shutil.rmtree(place)


def checkpoint_of(directory: Path, **entries: Any) -> Path:
    writer = manager(directory)
    path = writer.save(1, State(**entries))
    writer.close()
    assert path is not None
    return path


def imported(directory: Path) -> dict[str, Any]:
    """What an import as a dict of tensors named `t` gives back."""
    tensors: dict[str, Any] = {}
    assert manager(directory).restore(State(t=tensors)) == 0
    return tensors


def made(dtype: str, shape: list[int], seed: int) -> torch.Tensor:
    """A tensor of any bits: NaNs with payloads, subnormals, whatever."""
    count = ITEMSIZE[dtype] * int(np.prod(shape, dtype=np.int64))
    data = torch.from_numpy(np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, count, np.uint8))
    return data.view(getattr(torch, dtype)).reshape(shape) if count else torch.zeros(shape, dtype=getattr(torch, dtype))


def read_by_its_library(kind: str, path: Path) -> dict[str, Any]:
    if kind == "safetensors":
        return safetensors.torch.load_file(path)
    if kind == "npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.tensor(file[name]) for name in file.files}
    if kind == "torch":
        mapped = torch.load(path, weights_only=True, mmap=True)
        assert bits(mapped) == bits(torch.load(path, weights_only=True))
        return dict(mapped)
    with h5py.File(path) as file:
        return {unescape(name): tensor for name, tensor in read_group(file, "")}


def read_group(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, item in group.items():
        if isinstance(item, h5py.Group):
            yield from read_group(item, f"{path}{name}/")
            continue
        values = item[()]
        if values.dtype.names:
            values = np.stack([values["r"], values["i"]], axis=-1).astype(np.float32).view(np.complex64)[..., 0]
        tensor = torch.tensor(np.asarray(values))
        marked = item.attrs.get("dtype", b"").decode()
        yield path + name, tensor.view(getattr(torch, marked)) if marked else tensor


def stored_as(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """What a library of the format is to give for a tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if (kind == "npz" and dtype in WIDE) or (kind == "hdf5" and dtype == "bfloat16"):
        return tensor.to(torch.float32)
    if kind in ("npz", "safetensors", "hdf5") and dtype == "complex32":
        return tensor.to(torch.complex64)
    return tensor


def same(found: dict[str, Any], expected: dict[str, Any], original: dict[str, Any]) -> None:
    """Equal by bits; of those whose dtype was changed a NaN is a NaN, whatever its payload."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.numel() and original[name].dtype == tensor.dtype:
            assert bits(found[name]) == bits(tensor), name
        else:
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            values, wanted = found[name].tolist(), tensor.tolist()
            np.testing.assert_array_equal(np.array(values), np.array(wanted), err_msg=name)


# Round trips

TENSORS = st.dictionaries(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=12),
    st.tuples(
        st.sampled_from(sorted(ITEMSIZE)),
        st.lists(st.sampled_from([0, 1, 2, 3, 7, 65, 130]), max_size=3),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("kind", sorted(FORMATS))
@given(tensors=TENSORS)
@settings(max_examples=25, deadline=None)
def test_what_is_exported_is_what_was_saved(kind: str, scratch: Path, tensors: dict[str, Any]) -> None:
    place = scratch / kind
    shutil.rmtree(place, ignore_errors=True)
    expected = {name: made(*form) for name, form in tensors.items()}
    if kind == "safetensors":
        expected = {name: tensor for name, tensor in expected.items() if tensor.dtype != torch.complex128}
        expected = expected or {"x": torch.zeros(1)}
    if kind == "npz":  # numpy.load takes the ending of an entry's name away
        expected = {name: tensor for name, tensor in expected.items() if not name.endswith(".npy")} or {
            "x": torch.ones(1)
        }
    source = checkpoint_of(place / "c", t=expected)
    out = place / f"x.{SUFFIX[kind]}"
    done = export_checkpoint(source, out, only=["t/*"])
    assert (done.path, done.tensors) == (out, len(expected))
    assert sorted(path.name for path in place.iterdir()) == sorted(["c", out.name])
    same(read_by_its_library(kind, out), {name: stored_as(kind, t) for name, t in expected.items()}, expected)

    import_checkpoint(out, place / "again", entry="t", kind="tensors")
    back = {name: stored_as(kind, t) if kind in ("npz", "safetensors") else t for name, t in expected.items()}
    same(imported(place / "again"), back, expected)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_the_result_loads_into_the_model(kind: str, tmp_path: Path) -> None:
    model = Net()
    source = checkpoint_of(tmp_path / "c", model=model, optimizer=torch.optim.Adam(model.parameters()))
    out = tmp_path / f"x.{SUFFIX[kind]}"
    notes = export_checkpoint(source, out).notes
    assert len(notes) == (kind in ("safetensors", "npz")), "the tied weight is stored twice, and that is told"
    other = Net(seed=5)
    other.load_state_dict(read_by_its_library(kind, out))
    assert bits(other.state_dict()) == bits(model.state_dict())

    import_checkpoint(out, tmp_path / "again", step=40)
    third = Net(seed=6)
    assert manager(tmp_path / "again").restore(State(model=third)) == 40
    assert bits(third.state_dict()) == bits(model.state_dict())
    third.head.weight.data.zero_()
    assert not third.embedding.weight.any(), "still tied"
    with open_checkpoint(tmp_path / "again" / "step-00000040") as checkpoint:
        assert checkpoint.verify() == [] and checkpoint.manifest.info == {"imported": out.name}
        assert len(checkpoint.manifest.aliases) == (kind in ("torch", "hdf5"))


def test_safetensors_are_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    known = sorted(set(ITEMSIZE) - {"complex32", "complex128"})
    tensors = {f"{word}/{dtype}": made(dtype, [3, 5], 1) for dtype in known for word in ("z", "a b", "grüße")}
    tensors |= {"big": torch.arange(50_000), "empty": torch.zeros(0, 4), "one": torch.tensor(1.5)}
    source = checkpoint_of(tmp_path / "c", t=tensors)
    export_checkpoint(source, tmp_path / "ours.safetensors", only=["t/*"])
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_archives_are_sound_and_aligned(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "c", t={"a": torch.arange(7), "ü": torch.ones(3), "c": torch.zeros(20_000)})
    for name in ("x.npz", "x.pt"):
        export_checkpoint(source, tmp_path / name, only=["t/*"])
        with zipfile.ZipFile(tmp_path / name) as file:
            assert file.testzip() is None
            assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}
            for entry in file.infolist():
                header = (tmp_path / name).read_bytes()[entry.header_offset :][:30]
                sizes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                assert (entry.header_offset + 30 + sizes) % 64 == 0


def test_torch_files_name_their_tensors_as_torch_does(tmp_path: Path) -> None:
    """Every dtype through the pickle that is written by hand, and large numbers in it, against torch's reading."""
    from harness.checkpoint.convert.pytorch import _pickle

    huge = Tensor("huge", "int8", (3, 1 << 33), lambda lo, hi: np.empty(0, np.uint8))
    listed = _pickle([huge], {})
    assert (1 << 33).to_bytes(9, "little") in listed and (3 << 33).to_bytes(9, "little") in listed
    tensors = {dtype: made(dtype, [2, 3], 4) for dtype in ITEMSIZE}
    export_checkpoint(checkpoint_of(tmp_path / "c", t=tensors), tmp_path / "x.pt", only=["t/*"])
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert bits(found) == bits(tensors) and all(tensor.is_contiguous() for tensor in found.values())


def test_names_and_choices(tmp_path: Path) -> None:
    tensors = {"a/b": torch.zeros(2), "..": torch.ones(1), "100%": torch.ones(2), "%41": torch.ones(3)}
    source = checkpoint_of(tmp_path / "c", t=tensors, u={"k": torch.ones(4)})
    for kind, suffix in SUFFIX.items():
        export_checkpoint(source, tmp_path / f"x.{suffix}", only=["t/*"])
        assert set(read_by_its_library(kind, tmp_path / f"x.{suffix}")) == set(tensors)
    out = tmp_path / "y.npz"

    def names(**options: Any) -> list[str]:
        export_checkpoint(source, out, force=True, **options)
        with np.load(out) as file:
            return sorted(file.files)

    assert names(only=["*"]) == ["t/%41", "t/..", "t/100%", "t/a/b", "u/k"]
    assert names(only=["u/*", "t/%2541"], strip="u/") == ["k", "t/%41"]
    assert names(only=["t/*b"], strip="") == ["t/a/b"]
    export_checkpoint(source, tmp_path / "y.h5", only=["u/*"], strip="u")
    with h5py.File(tmp_path / "y.h5") as plain:
        assert list(plain) == ["k"], "of a path, the slash before it is no part"
    with pytest.raises(InputMissing, match=r"no tensor is called model/\*\n  the names begin with: t, u"):
        export_checkpoint(source, tmp_path / "z.npz")
    with pytest.raises(DataError, match="nothing is left of the name 'u/k'"):
        export_checkpoint(source, tmp_path / "z.npz", only=["u/*"], strip="u/k")
    assert not (tmp_path / "z.npz").exists()


def test_two_tensors_of_one_name_are_refused() -> None:
    source = Source([Tensor(name, "bool", (), lambda lo, hi: np.zeros(1, np.uint8)) for name in ("a/x", "x")])
    with pytest.raises(DataError, match=r"'a/x' and 'x' would both be called 'x'"):
        choose(source, [], "a/")


def test_a_second_name_alone_is_a_tensor(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "c", model=Net())
    export_checkpoint(source, tmp_path / "x.pt", only=["model/head.*"])
    assert sorted(torch.load(tmp_path / "x.pt", weights_only=True)) == ["head.bias", "head.weight"]


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20))
def test_unescape_is_the_inverse_of_escape(text: str) -> None:
    assert unescape(escape(text)) == text


def test_extra_state_is_left_out_and_told(tmp_path: Path) -> None:
    class WithExtra(torch.nn.Linear):
        def get_extra_state(self) -> Any:
            return {"seen": torch.arange(5)}

        def set_extra_state(self, state: Any) -> None:
            pass

    source = checkpoint_of(tmp_path / "c", model=WithExtra(2, 2))
    done = export_checkpoint(source, tmp_path / "x.safetensors")
    assert done.tensors == 2 and "extra state of modules of model is left out" in done.notes[0]


def test_a_scaled_file_reads_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts of some bytes, tensors are cut everywhere: also where their sizes do not divide."""
    for module in ("tensor", "writing"):
        monkeypatch.setattr(f"harness.checkpoint.convert.{module}.PIECE", 48)
    tensors = {dtype: made(dtype, [3, 7, 5], 2) for dtype in set(ITEMSIZE) - {"complex128"}}
    source = checkpoint_of(tmp_path / "c", t=tensors)
    for kind, suffix in SUFFIX.items():
        export_checkpoint(source, tmp_path / f"x.{suffix}", only=["t/*"])
        import_checkpoint(tmp_path / f"x.{suffix}", tmp_path / kind, entry="t", kind="tensors")
        back = {n: t if kind in ("torch", "hdf5") else stored_as(kind, t) for n, t in tensors.items()}
        same(imported(tmp_path / kind), back, tensors)


# Dtypes


@pytest.mark.parametrize("source", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_conversions_are_those_of_torch(source: str, target: str) -> None:
    if ITEMSIZE[source] <= 2:
        data = np.arange(1 << 8 * ITEMSIZE[source], dtype=f"<u{ITEMSIZE[source]}").view(np.uint8)
    else:
        edges = np.array([0, -0.0, 1e-45, 1e-40, 65504, 65519, 65520, 3.3895e38, 3.4e38, np.inf, -np.inf, np.nan])
        random = np.random.default_rng(3).integers(0, 256, 80_000, np.uint8).view(source)
        ties = (np.arange(1 << 12, dtype="<u4") << 15).view("<f4").astype(source)
        with np.errstate(over="ignore"):
            data = np.concatenate([edges.astype(source), random, ties]).view(np.uint8)
    expected = torch.from_numpy(data).view(getattr(torch, source)).to(getattr(torch, target)).to(torch.float64)
    found, overflow = convert(data, source, target)
    values = torch.from_numpy(found).view(getattr(torch, target)).to(torch.float64)
    np.testing.assert_array_equal(values.numpy(), expected.numpy())
    before = torch.from_numpy(data).view(getattr(torch, source)).to(torch.float64)
    assert overflow == bool((before.isfinite() & expected.isinf()).any())


def test_float8_values_are_those_of_torch() -> None:
    for dtype, table in _TABLES.items():
        expected = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).to(torch.float32)
        np.testing.assert_array_equal(table, expected.numpy())


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_floats_are_converted_on_request(kind: str, tmp_path: Path) -> None:
    tensors = {
        dtype: made(dtype, [40], 7) for dtype in ("bfloat16", "float16", "float64", "int32", "bool", "complex64")
    }
    source = checkpoint_of(tmp_path / "c", t=tensors)
    out = tmp_path / f"x.{SUFFIX[kind]}"
    done = export_checkpoint(source, out, only=["t/*"], dtype="fp16")
    expected = {name: t.to(torch.float16) if t.is_floating_point() else t for name, t in tensors.items()}
    same(read_by_its_library(kind, out), expected, tensors)
    infinite = [
        name for name, t in tensors.items() if t.is_floating_point() and (expected[name].isinf() > t.isinf()).any()
    ]
    assert infinite and len([note for note in done.notes if "too large for float16" in note]) == len(infinite)
    import_checkpoint(out, tmp_path / "again", entry="t", kind="tensors", dtype="fp32")
    back = {name: t.float() if t.is_floating_point() else t for name, t in expected.items()}
    same(imported(tmp_path / "again"), back, tensors)


def test_what_a_format_lacks_is_told_or_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.complex128)}
    source = checkpoint_of(tmp_path / "c", t=tensors)
    done = export_checkpoint(source, tmp_path / "x.npz", only=["t/*"])
    assert done.notes == ("npz has no bfloat16: 1 tensor is stored as float32, every value as it was",)
    with pytest.raises(DataError, match="safetensors has no complex128, which b is"):
        export_checkpoint(source, tmp_path / "x.safetensors", only=["t/*"])
    with pytest.raises(UsageError, match="there is no dtype 'int8'"):
        export_checkpoint(source, tmp_path / "x.pt", only=["t/*"], dtype="int8")
    assert as_dtype(Tensor("a", "float32", (), len), "float32", []).dtype == "float32"  # type: ignore[arg-type]


# The file that is written


def test_wrong_requests(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "c", model=Net())
    out = tmp_path / "x.pt"
    out.write_text("old")
    with pytest.raises(UsageError, match=r"x\.pt is there already\n  give --force"):
        export_checkpoint(source, out)
    assert out.read_text() == "old"
    export_checkpoint(source, out, force=True)
    assert torch.load(out, weights_only=True)
    for path, kind, error, words in [
        (tmp_path / "x.what", None, UsageError, "format of x.what is not clear"),
        (tmp_path / "x", "zip", UsageError, "there is no format 'zip'"),
        (tmp_path / "no" / "x.pt", None, InputMissing, "there is no directory"),
        (tmp_path, "torch", UsageError, "is a directory"),
        (source / "data.h5", None, UsageError, "lies in the checkpoint itself"),
        (tmp_path / "up.npz" / ".." / "x.pt", None, InputMissing, "there is no directory"),
        (Path("/dev/null"), "torch", UsageError, "is not a file"),
    ]:
        with pytest.raises(error, match=words):
            export_checkpoint(source, path, to=kind, force=True)
    with pytest.raises(InputMissing, match="is no checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "y.pt")
    assert format_of(Path("A.SafeTensors"), None) == "safetensors" and format_of(Path("x"), "npz") == "npz"


def test_a_checkpoint_cannot_be_overwritten_through_a_link(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "c", model=Net())
    (tmp_path / "x.h5").symlink_to(source / "data.h5")
    with pytest.raises(UsageError, match="lies in the checkpoint itself"):
        export_checkpoint(source, tmp_path / "x.h5", force=True)
    assert latest(tmp_path / "c") == source


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_damage_is_found_and_named(kind: str, tmp_path: Path) -> None:
    tensors = {"good": torch.ones(200_000), "bad": torch.zeros(200_000, dtype=torch.int16)}
    source = checkpoint_of(tmp_path / "c", t=tensors)
    with open_checkpoint(source) as checkpoint:
        layout = checkpoint.manifest.layout
        at = int(layout.starts[[leaf.name for leaf in layout.leaves].index("t/bad")])
    with open(source / "data.h5", "r+b") as file:
        file.seek(at + 200_000)
        file.write(b"\1")
    out = tmp_path / f"x.{SUFFIX[kind]}"
    out.write_text("old")
    with pytest.raises(Damaged, match="t/bad is damaged"):
        export_checkpoint(source, out, only=["t/*"], force=True)
    assert out.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == sorted(["c", out.name])
    export_checkpoint(source, out, only=["t/good"], force=True)
    assert bits(read_by_its_library(kind, out)) == bits({"good": tensors["good"]})


KILLED = """
import os, signal, sys
from harness.checkpoint.convert import export_checkpoint, import_checkpoint, tensor, writing

kind, source, out, at = sys.argv[1:]
tensor.PIECE = writing.PIECE = 4096
calls = 0
def kill(*_):
    global calls
    calls += 1
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
def before(call):
    def wrapped(*arguments, **options):
        kill()
        return call(*arguments, **options)
    return wrapped
for name in ("fsync", "rename", "pwrite", "ftruncate"):
    setattr(os, name, before(getattr(os, name)))
if kind == "import":
    import_checkpoint(source, out, step=2, progress=kill)
else:
    export_checkpoint(source, out, to=kind, force=True, progress=kill)
print(calls)
"""


def killed(kind: str, source: Path, out: Path, at: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(source), str(out), str(at)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_killed_anywhere_the_old_file_stays(kind: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    source = checkpoint_of(tmp_path / "c", model=model)
    out = tmp_path / "out"
    out.write_text("old")
    code, calls = killed(kind, source, out, 0)
    assert code == 0 and int(calls) >= 8
    new = bits(read_by_its_library(kind, out))
    for at in (1, 3, int(calls) - 2, int(calls) - 1, int(calls)):  # the last ones: sync, rename, sync
        out.write_text("old")
        code, _ = killed(kind, source, out, at)
        assert code == -signal.SIGKILL
        if out.read_bytes() != b"old":
            assert at == int(calls), "only after the rename"
            assert bits(read_by_its_library(kind, out)) == new


def test_an_import_that_is_killed_leaves_no_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    source = checkpoint_of(tmp_path / "c", model=model)
    export_checkpoint(source, tmp_path / "x.safetensors")
    code, calls = killed("import", tmp_path / "x.safetensors", tmp_path / "full", 0)
    assert code == 0
    for at in sorted({1, 4, 7, *range(int(calls) - 4, int(calls) + 1)}):
        place = tmp_path / f"d{at}"
        old = checkpoint_of(place, model=torch.nn.Linear(64, 64))
        killed("import", tmp_path / "x.safetensors", place, at)
        found = latest(place)
        assert found in (old, place / "step-00000002")
        with open_checkpoint(found) as checkpoint:  # type: ignore[arg-type]
            assert checkpoint.verify() == []


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint_of(tmp_path / "c", model=Net())

    class Stop(Exception):
        pass

    for kind, suffix in SUFFIX.items():
        for at in range(1, 9):
            calls = 0

            def progress(done: int, total: int, at: int = at) -> None:
                nonlocal calls
                calls += 1
                assert 0 < done <= total
                if calls == at:
                    raise Stop

            with pytest.raises(Stop):
                export_checkpoint(source, tmp_path / f"x.{suffix}", progress=progress)
            with pytest.raises(Stop):
                calls = 0
                import_checkpoint(_exported(source, tmp_path / "in", kind), tmp_path / "d", progress=progress)
        assert not list(tmp_path.glob("x*")) and not list((tmp_path / "d").glob("step-*"))


def _exported(source: Path, place: Path, kind: str) -> Path:
    place.mkdir(exist_ok=True)
    path = place / f"x.{SUFFIX[kind]}"
    if not path.exists():
        export_checkpoint(source, path)
    return path


# Memory

MEASURED = """
import sys
from pathlib import Path
import h5py, numpy, torch
from harness.checkpoint.convert import export_checkpoint, import_checkpoint
import harness.checkpoint.convert.pytorch, harness.checkpoint.convert.hdf5, harness.checkpoint.convert.npz

def memory(field):  # not getrusage: that begins with what the parent had
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) // 1024
source, out, again = map(Path, sys.argv[1:4])
options = {"dtype": sys.argv[4]} if len(sys.argv) > 4 else {}
torch.save({"a": torch.zeros(9)}, again.with_suffix(".pt"))
torch.load(again.with_suffix(".pt"), weights_only=True, mmap=True)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
before = memory("VmRSS")
export_checkpoint(source, out, force=True, **options)
import_checkpoint(out, again)
print(memory("VmHWM") - before)
"""
LARGE_MIB = 300


@pytest.fixture(scope="module")
def room(scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where 1 GiB can be written, quickly if possible."""
    return scratch if shutil.disk_usage(scratch).free > 4 << 30 else tmp_path_factory.mktemp("room")


@pytest.fixture(scope="module")
def large(room: Path) -> Path:
    """A checkpoint with a tensor larger than what may be in memory, made without having it in memory either."""
    pattern = np.arange(1 << 20, dtype="<u4")

    def read(lo: int, hi: int) -> Any:
        return np.resize(pattern + lo, (hi - lo) // 4).view(np.uint8)

    tensor = Tensor("model/big", "float32", (LARGE_MIB, 1 << 18), read)
    small = Tensor("model/small", "float32", (3,), lambda lo, hi: np.ones(3, "<f4").view(np.uint8)[lo:hi])
    return write_checkpoint(room / "large", 1, [tensor, small], {}, {"model": {"kind": "module"}}, {})


@pytest.mark.parametrize("kind", [*sorted(FORMATS), "npz as bf16"])
def test_memory_is_bounded_whatever_the_size(kind: str, large: Path, room: Path) -> None:
    kind, *options = kind.split(" as ")
    out, again = room / f"x.{SUFFIX[kind]}", room / "again"
    shutil.rmtree(again, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(large), str(out), str(again), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100, f"{done.stdout} MiB for a tensor of {LARGE_MIB} MiB"
    with open_checkpoint(large) as first, open_checkpoint(again / "step-00000000") as second:
        if not options:
            for lo in range(0, LARGE_MIB, 100):
                rows = slice(lo, lo + 1)
                assert np.array_equal(first.read("model/big", rows), second.read("model/big", rows))
        assert second.metadata("model/big").shape == (LARGE_MIB, 1 << 18)
    out.unlink()
