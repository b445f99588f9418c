"""The HDF5 metadata that are made without HDF5: the library, and its tools, must find in them what was meant."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash
from h5py import h5t
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.checkpoint.convert.hdf5 import _hdf5_type
from harness.checkpoint.file import build_head
from harness.checkpoint.hdf5 import metadata, metadata_size
from harness.checkpoint.layout import lay_out
from harness.checkpoint.schema import ITEMSIZE, Leaf
from harness.errors import InternalError

SAMPLE = [
    *(Leaf(f"types/{dtype}", dtype, (2, 3)) for dtype in ITEMSIZE),
    Leaf("one", "float64", ()),
    Leaf("deep/er/and/deeper", "int8", (1,) * 32),
    Leaf("deep/none", "float32", (0, 7)),
    Leaf("names/größe 𝔸", "int16", (5,)),
]
LINKS = {"types/again": "types/float32", "new/group": "types/float32", "deep/two": "one"}


def make(path: Path, leaves: list[Leaf], links: dict[str, str], base: int = 0) -> list[int]:
    """A file whose data are bytes that count. Returns where the tensors begin."""
    size = metadata_size(leaves, links)
    starts = [*np.cumsum([base + size, *(leaf.nbytes for leaf in leaves)])]
    end = int(starts.pop())
    head = metadata(leaves, starts, links, base=base, end=end)
    assert len(head) == size
    data = (np.arange(end - base - size) % 251).astype(np.uint8)
    path.write_bytes(bytes(base) + head + data.tobytes())
    return starts


def check(path: Path, leaves: list[Leaf], links: dict[str, str], starts: list[int]) -> None:
    """The library finds these data sets, and nothing else."""
    everything = path.read_bytes()
    with h5py.File(path) as file:
        found = dict(walk(file))
        places = dict(zip((leaf.name for leaf in leaves), starts, strict=True))
        named = {leaf.name: leaf for leaf in leaves}
        assert found.keys() == named.keys() | links.keys()
        for name, dataset in found.items():
            leaf = named[links.get(name, name)]
            assert dataset.shape == leaf.shape and dataset.id.get_type().equal(_hdf5_type(h5t, leaf.dtype)), name
            assert (dataset.attrs.get("dtype") == leaf.dtype.encode()) == leaf.dtype.startswith("float8")
            assert h5py.h5o.get_info(dataset.id).rc == 1 + sum(target == leaf.name for target in links.values())
            if leaf.nbytes:
                start = places[leaf.name]
                assert dataset.id.get_offset() == start and dataset.id.get_storage_size() == leaf.nbytes
                if leaf.dtype not in ("bool", "bfloat16"):
                    assert dataset[...].tobytes() == everything[start : start + leaf.nbytes], name
            else:
                assert dataset.id.get_storage_size() == 0


def walk(group: Any, prefix: str = "") -> Any:
    """(Path, data set) under all names."""
    assert sorted(group) == list(group), "names are looked up and listed in their order"
    for name in group:
        if isinstance(group[name], h5py.Group):
            yield from walk(group[name], f"{prefix}{name}/")
        else:
            yield prefix + name, group[name]


@pytest.mark.parametrize("base", [0, 512, 4096])
def test_every_type_shape_and_link(base: int, tmp_path: Path) -> None:
    starts = make(tmp_path / "x.h5", SAMPLE, LINKS, base)
    check(tmp_path / "x.h5", SAMPLE, LINKS, starts)


# A table node has 8 links, a node of the tree 32 of those: 256 and 8,192 links are the most of one and of two levels.
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 255, 256, 257, 8192, 8193, 9000])
def test_groups_of_every_depth_of_their_trees(count: int, tmp_path: Path) -> None:
    leaves = [Leaf(f"t{number}", "int8", (1,)) for number in range(count)]
    check(tmp_path / "x.h5", leaves, {}, make(tmp_path / "x.h5", leaves, {}))


names = st.lists(st.text("ab.é/", min_size=1, max_size=4), min_size=1, max_size=3).map("/".join)


@given(
    st.dictionaries(
        names.filter(lambda name: not {"", ".", ".."} & set(name.split("/"))),
        st.tuples(st.sampled_from(sorted(ITEMSIZE)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=30,
    ),
    st.lists(st.tuples(st.integers(0, 100), names), max_size=5),
    st.sampled_from([0, 4096]),
)
@settings(max_examples=60, deadline=None)
def test_any_tree(tensors: dict[str, Any], second: list[tuple[int, str]], base: int) -> None:
    taken: set[str] = set()

    def free(name: str) -> bool:
        path = name.split("/")
        inner = {"/".join(path[:depth]) for depth in range(1, len(path))}
        if (
            {"", ".", ".."} & set(path)
            or name in taken
            or inner & taken
            or any(t.startswith(name + "/") for t in taken)
        ):
            return False
        taken.add(name)
        return True

    leaves = [Leaf(name, *kind) for name, kind in tensors.items() if free(name)]
    links = {name: leaves[number % len(leaves)].name for number, name in second if leaves and free(name)}
    path = Path(f"/dev/shm/harness-hdf5-{os.getpid()}.h5")
    try:
        check(path, leaves, links, make(path, leaves, links, base))
    finally:
        path.unlink(missing_ok=True)


def test_the_library_can_add_to_it_and_copy_it(tmp_path: Path) -> None:
    leaves = [Leaf(f"g/t{number:03d}", "int8", (3,)) for number in range(200)]
    path = tmp_path / "x.h5"
    make(path, leaves, {}, 4096)
    with h5py.File(path, "r+") as file:
        before = {name: dataset[...] for name, dataset in walk(file)}
        for number in range(0, 200, 7):
            file[f"g/t{number:03d}b"] = np.full(5, number)
            del file[f"g/t{number:03d}"]
        file["g"].attrs["note"] = "added"
    with h5py.File(path) as file, h5py.File(tmp_path / "copy.h5", "w") as copy:
        file.copy("g", copy)
        for found in (file, copy):
            assert len(found["g"]) == 200 and found["g"].attrs["note"] == "added"
            for number in range(200):
                name = f"g/t{number:03d}"
                if number % 7:
                    assert np.array_equal(found[name], before[name])
                else:
                    assert np.array_equal(found[name + "b"], np.full(5, number))


def test_the_tools_of_hdf5_read_it(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    make(path, SAMPLE, LINKS, 4096)
    for tool, words in (("h5dump", "H5T_ENUM"), ("h5ls", "/deep/er/and/deeper")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
        done = subprocess.run([tool, *(["-r"] if tool == "h5ls" else []), path], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr and words in done.stdout, done.stderr


def test_metadata_never_grow_into_what_follows() -> None:
    layout = lay_out([Leaf("a", "int8", (3,))])
    with pytest.raises(InternalError, match="have no room"):
        build_head(layout, {f"alias{number}": "a" for number in range(3000)})


def test_the_bytes_stay_what_they_are() -> None:
    """Golden: files of before and after a change of the program are the same."""
    starts = [*range(1 << 20, (1 << 20) + 4096 * len(SAMPLE), 4096)]
    made = metadata(SAMPLE, starts, LINKS, base=4096, end=1 << 24)
    assert xxhash.xxh3_64_hexdigest(made) == "7b6187f0cef36448"
