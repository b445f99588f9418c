"""The format of checkpoints, version 1, and its commit record `manifest.json`, which is strictly parsed.

**Files.** A checkpoint is a directory `step-<8 digits or more>[-<n>]` (the n-th save of this step) with `data.h5` and
`manifest.json`. It exists once it has this name and a manifest; `<name>.tmp-<uuid>` is none yet. `damaged.json` or
`aside.json` in it take it out of use. All numbers are little-endian.

**manifest.json** is UTF-8. Its first line is `{"checksum":"<32 hex digits>",`: the XXH3-128 of all bytes after that
line. The whole is one JSON object without duplicate keys, NaN or Infinity:

    format, version    "harness-checkpoint", 1. A reader refuses versions that it does not know.
    uuid, step         also in data.h5, which ties the two files together
    created, world     seconds since 1970; ranks that wrote it (any number may read it)
    schema             SHA-256 of the tensors' names, dtypes, shapes and placements (`schema.schema_hash`)
    file               {name: "data.h5", head, data_start, data_end, block, head_digest, digests_digest}
    leaves             [{name, dtype, shape, placement, offset}, ...] in file order: the tensors
    aliases            {second name: name}: one tensor with two names is stored once
    state              JSON by entry of the state: what is not a tensor (below)
    metrics, info      what was given at the save; the engine, and free JSON

**data.h5** is an ordinary HDF5 file with a user block; every tensor is a contiguous dataset under its name. The bytes:

    0            user block, 4096 bytes: one line of JSON {format, version, uuid, step}, then zeros
    4096         HDF5 superblock and metadata, up to `head`; `head_digest` is their XXH3-128
    head         uint64 per block: the block's XXH3-64 (seed 0); `digests_digest` is the XXH3-128 of them all
    data_start   the tensors in blocks of `block` bytes, the last one shorter, zeros between tensors
    data_end     end of the file

**A tensor** has prod(shape) elements in row-major order at `offset`. dtypes: `schema.ITEMSIZE`; a bool is a byte 0 or
1, a complex its real, then its imaginary part, bfloat16 the upper half of a float32 (in HDF5 a float type of its own),
float8 bytes (HDF5: uint8 with an attribute `dtype`). Names are paths; a component is escaped as in URLs where it has
`%`, `/` or NUL, is `.` or `..` (`schema.escape`). The shape is that of the whole tensor, however ranks had divided it;
`placement` (replicated, rank0, sharded, per_rank) says how it was saved, and changes nothing for a reader, but that
row r of a per_rank tensor is rank r's.

**state** has an object by entry, with `kind`: module (tensors `<entry>/<parameter or buffer>`), optimizer (tensors
`<entry>/<parameter>/<key>`; `groups`: [{params: names, options}], `state`: what is no tensor, by parameter name),
tensors (`<entry>/<key>`), tree and holder (`value`), per_rank (`value`: [[keys, kind], ...] of the tensors
`<entry>/<key>/<key>`; of the kinds int, float and bool each row is a number). Values that JSON has not are objects with
one key: `$tensor`: [torch or numpy, name], `$scalar`: [kind, dtype, number], `$tuple`, `$dict` (pairs), `$float`
("nan", "inf", "-inf"), `$bytes` (base64), `$counter`, `$sparse` (`tree`).

A version is read for ever.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from harness.checkpoint.comm import Json
from harness.checkpoint.layout import PAGE, Layout
from harness.checkpoint.schema import MAX_BYTES, MAX_LEAVES, Leaf, check_schema, schema_hash
from harness.checkpoint.strictjson import parse_json
from harness.errors import DataError

FORMAT = "harness-checkpoint"
VERSION = 1
MAX_TEXT = 256 << 20
_MAX_BLOCK = 1 << 30
_FIELDS = {"format", "version", "uuid", "step", "created", "world", "schema", "file", "leaves", "aliases", "state"}
_FIELDS |= {"metrics", "info"}
_LEAF = {"name": str, "dtype": str, "shape": list, "placement": str, "offset": int}


@dataclass(frozen=True)
class Manifest:
    """One committed checkpoint. `table` is the root of the block digests, `head` the digest of the HDF5 metadata."""

    uuid: str
    step: int
    created: float
    world: int
    layout: Layout
    table: str
    head: str
    aliases: dict[str, str] = field(default_factory=dict)
    state: dict[str, Json] = field(default_factory=dict)
    metrics: dict[str, Json] = field(default_factory=dict)
    info: dict[str, Json] = field(default_factory=dict)


def render(manifest: Manifest) -> str:
    """The text of `manifest.json`."""
    layout = manifest.layout
    first = _compact(
        {
            "format": FORMAT,
            "version": VERSION,
            "uuid": manifest.uuid,
            "step": manifest.step,
            "created": manifest.created,
            "world": manifest.world,
            "schema": _hash(layout, tuple(manifest.aliases.items())),
            "file": {
                "name": "data.h5",
                "head": layout.head,
                "data_start": layout.data_start,
                "data_end": layout.data_end,
                "block": layout.block,
                "head_digest": manifest.head,
                "digests_digest": manifest.table,
            },
        }
    )
    last = _compact(
        {"aliases": manifest.aliases, "state": manifest.state, "metrics": manifest.metrics, "info": manifest.info}
    )
    rest = f'{first[1:-1]},"leaves":{_leaves(layout)},{last[1:]}\n'
    return f'{{"checksum":"{xxhash.xxh3_128_hexdigest(rest.encode())}",\n{rest}'


def prepare(layout: Layout, aliases: dict[str, str]) -> None:
    """Make what `render` needs of the tensors now, where there is time for it."""
    _leaves(layout)
    _hash(layout, tuple(aliases.items()))


# The next save is most often one of the same tensors: at 22,500 of them these two are 80 % of the time.
@functools.lru_cache(maxsize=2)
def _leaves(layout: Layout) -> str:
    return _compact(
        [
            {"name": leaf.name, "dtype": leaf.dtype, "shape": leaf.shape, "placement": leaf.placement, "offset": at}
            for leaf, at in zip(layout.leaves, layout.starts.tolist(), strict=True)
        ]
    )


@functools.lru_cache(maxsize=2)
def _hash(layout: Layout, aliases: tuple[tuple[str, str], ...]) -> str:
    return schema_hash(layout.leaves, dict(aliases))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parse(text: str) -> Manifest:
    """The manifest behind a text. Raises DataError with what is wrong with it. Costs follow the text's length."""
    if len(text) > MAX_TEXT:
        raise DataError(f"it has {len(text)} characters, more than {MAX_TEXT}")
    first, _, rest = text.partition("\n")
    found = re.fullmatch(r'\{"checksum":"([0-9a-f]{32})",', first)
    if found is None:
        raise DataError("it does not begin with a checksum")
    if xxhash.xxh3_128_hexdigest(rest.encode("utf-8", "surrogatepass")) != found[1]:
        raise DataError("it does not match its checksum")
    try:
        value = parse_json("{" + rest)
        return _manifest(value)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise DataError(f"it is not as it should be: {type(error).__name__}: {str(error)[:200]}") from error


def _manifest(value: dict[str, Any]) -> Manifest:
    if value.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    version = _integer(value.get("version"), 1, 1 << 31)
    if version > VERSION:
        raise NewerVersion(
            f"it is of format version {version}; this program reads up to {VERSION}", hint="use a newer program"
        )
    if set(value) != _FIELDS:
        raise ValueError(f"unknown or missing fields: {', '.join(sorted(set(value) ^ _FIELDS))[:200]}")
    for name in ("aliases", "state", "metrics", "info", "file"):
        if not isinstance(value[name], dict):
            raise ValueError(f"{name} is not an object")
    layout = _layout(value["file"], value["leaves"])
    aliases = _aliases(value["aliases"], layout)
    if any(leaf.placement == "per_rank" and leaf.shape[0] != value["world"] for leaf in layout.leaves):
        raise ValueError("a leaf that is per rank does not have a row for each rank")
    if value["schema"] != schema_hash(layout.leaves, aliases):
        raise ValueError("the schema's hash does not match its leaves")
    return Manifest(
        uuid=_hex(value["uuid"], 32),
        step=_integer(value["step"], 0, 1 << 62),
        created=float(value["created"]),
        world=_integer(value["world"], 1, 1 << 31),
        layout=layout,
        table=_hex(value["file"]["digests_digest"], 32),
        head=_hex(value["file"]["head_digest"], 32),
        aliases=aliases,
        state=value["state"],
        metrics=value["metrics"],
        info=value["info"],
    )


def _layout(file: dict[str, Any], listed: Any) -> Layout:
    if set(file) != {"name", "head", "data_start", "data_end", "block", "head_digest", "digests_digest"}:
        raise ValueError("the description of the file has unknown or missing fields")
    if file["name"] != "data.h5":
        raise ValueError("the file has another name")
    if not isinstance(listed, list) or len(listed) > MAX_LEAVES:
        raise ValueError("the leaves are not a list, or too many")
    block = _integer(file["block"], PAGE, _MAX_BLOCK)
    head = _integer(file["head"], 2 * PAGE, MAX_BYTES)
    data_start = _integer(file["data_start"], head, MAX_BYTES)
    data_end = _integer(file["data_end"], data_start, MAX_BYTES)
    names, dtypes, shapes, placements, offsets = _columns(listed)
    for number in (number for shape in shapes for number in shape if type(number) is not int):
        raise ValueError(f"{str(number)[:40]} is not a length")
    leaves = tuple(map(Leaf, names, dtypes, map(tuple, shapes), placements))
    check_schema(leaves)
    _integer(max(offsets, default=0), 0, MAX_BYTES)
    starts = np.array(offsets, np.int64)
    ends = starts + np.fromiter((leaf.nbytes for leaf in leaves), np.int64, len(leaves))
    bounds = np.concatenate([[data_start], ends])
    if np.any(starts < bounds[:-1]) or bounds[-1] > data_end:
        raise ValueError("leaves overlap or lie outside the file")
    layout = Layout(leaves, starts, ends, head, data_start, data_end, block)
    if layout.block & (layout.block - 1) or layout.blocks * 8 > data_start - head or (data_start - head) % 8:
        raise ValueError("the blocks do not fit their table of digests")
    return layout


def _columns(listed: list[Any]) -> list[list[Any]]:
    """Names, dtypes, shapes, placements and offsets of the leaves, of the right types: one thing of all at a time."""
    for index, item in enumerate(listed):
        if type(item) is not dict or item.keys() != _LEAF.keys():
            raise ValueError(f"leaf {index} is not described as it should be")
    columns = [[item[field] for item in listed] for field in _LEAF]
    for column, kind in zip(columns, _LEAF.values(), strict=True):
        for index in (index for index, value in enumerate(column) if type(value) is not kind):
            raise ValueError(f"leaf {index} is not described as it should be")
    return columns


def _aliases(value: dict[str, Any], layout: Layout) -> dict[str, str]:
    by_name = {leaf.name: leaf for leaf in layout.leaves}
    if any(not isinstance(target, str) or target not in by_name for target in value.values()):
        raise ValueError("an alias stands for no leaf")
    if value:
        check_schema(layout.leaves, value)
    return value


class NewerVersion(DataError):
    """The checkpoint was written by a newer program."""


def _integer(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]} is not an integer from {least} to {most}")
    return value


def _hex(value: Any, digits: int) -> str:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ValueError(f"{str(value)[:40]!r} is not a number of {digits} hex digits")
    return value
