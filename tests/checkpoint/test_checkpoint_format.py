"""The format page (`harness.checkpoint.manifest`) is enough: a reader that knows nothing but it, and no HDF5."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from samples import Net, manager

from harness.checkpoint import State

CODES = {"float32": "f", "float64": "d", "int64": "q", "int32": "i", "uint8": "B", "bool": "?", "float16": "e"}


class Reader:
    """Reads a checkpoint by the page alone: nothing of this project, HDF5 or numpy."""

    def __init__(self, directory: Path) -> None:
        self.data = (directory / "data.h5").read_bytes()
        first, _, rest = (directory / "manifest.json").read_bytes().partition(b"\n")
        assert first == b'{"checksum":"' + xxhash.xxh3_128_hexdigest(rest).encode() + b'",'
        self.manifest = json.loads(first + b"\n" + rest)
        assert (self.manifest["format"], self.manifest["version"]) == ("harness-checkpoint", 1)
        tie = json.loads(self.data[:4096].partition(b"\n")[0])
        assert tie == {key: self.manifest[key] for key in ("format", "version", "uuid", "step")}
        self.leaves = {leaf["name"]: leaf for leaf in self.manifest["leaves"]}

    def check(self) -> None:
        file = self.manifest["file"]
        assert len(self.data) == file["data_end"]
        assert xxhash.xxh3_128_hexdigest(self.data[4096 : file["head"]]) == file["head_digest"]
        blocks = -(-(file["data_end"] - file["data_start"]) // file["block"])
        table = self.data[file["head"] : file["head"] + 8 * blocks]
        assert xxhash.xxh3_128_hexdigest(table) == file["digests_digest"]
        for index, digest in enumerate(struct.unpack(f"<{blocks}Q", table)):
            begin = file["data_start"] + index * file["block"]
            assert xxhash.xxh3_64_intdigest(self.data[begin : min(begin + file["block"], file["data_end"])]) == digest

    def leaf(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.leaves[self.manifest["aliases"].get(name, name)]
        return found

    def tensor(self, name: str) -> list[Any]:
        leaf = self.leaf(name)
        count = math.prod(leaf["shape"])
        if leaf["dtype"] == "bfloat16":
            halves = struct.unpack_from(f"<{count}H", self.data, leaf["offset"])
            return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
        if leaf["dtype"] == "complex64":
            parts = struct.unpack_from(f"<{2 * count}f", self.data, leaf["offset"])
            return [complex(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return list(struct.unpack_from(f"<{count}{CODES[leaf['dtype']]}", self.data, leaf["offset"]))


def test_a_reader_by_the_page_alone(tmp_path: Path) -> None:
    model = Net(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25)
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    tensors = {
        "half": torch.randn(7).to(torch.bfloat16),
        "odd/name": torch.arange(5, dtype=torch.int32),
        "complex": torch.randn(3, 2, dtype=torch.complex64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "large": torch.randn(300, 400, dtype=torch.float64),
    }
    extra = {"epoch": 3, "pair": (1, None), "worst": float("inf"), "table": np.arange(6).reshape(2, 3)}
    state = State(model=model, optimizer=optimizer, tensors=tensors, extra=extra)
    path = manager(tmp_path).save(9, state, {"loss": 0.5})
    assert path is not None
    reader = Reader(path)
    reader.check()
    assert (
        reader.manifest["step"] == 9 and reader.manifest["world"] == 1 and reader.manifest["metrics"] == {"loss": 0.5}
    )
    for name, tensor in model.state_dict().items():
        if tensor.ndim or name in reader.leaves:
            assert reader.tensor(f"model/{name}") == tensor.flatten().tolist(), name
            assert reader.leaf(f"model/{name}")["shape"] == list(tensor.shape)
    moments = optimizer.state[model.hidden.weight]["exp_avg"]
    assert reader.manifest["aliases"], "the model has tied weights"
    assert reader.tensor("optimizer/hidden.weight/exp_avg") == moments.flatten().tolist()
    assert reader.manifest["state"]["optimizer"]["groups"][0]["options"]["lr"] == 0.25
    for key, escaped in (("half", "half"), ("odd/name", "odd%2Fname"), ("complex", "complex"), ("flags", "flags")):
        assert reader.tensor(f"tensors/{escaped}") == tensors[key].flatten().tolist()
    assert reader.tensor("tensors/large") == tensors["large"].flatten().tolist()
    assert reader.tensor("tensors/empty") == []
    value = reader.manifest["state"]["extra"]["value"]
    assert value["epoch"] == 3 and value["pair"] == {"$tuple": [1, None]} and value["worst"] == {"$float": "inf"}
    assert value["table"] == {"$tensor": ["numpy", "extra/table"]}
    assert reader.tensor("extra/table") == list(range(6))

    with h5py.File(path / "data.h5", "r") as file:  # and plain HDF5 sees the same
        assert file["tensors/large"][()].tobytes() == tensors["large"].numpy().tobytes()
        assert file["tensors/half"][()].tolist() == pytest.approx(tensors["half"].float().tolist())
        assert file["model/head.weight"].shape == tuple(model.head.weight.shape)
