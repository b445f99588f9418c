"""A checkpoint on its way into live objects: where its leaves go, and why it does not fit. The way out is `snapshot`.

    restore = prepare(state, manifest)          # `state.prepare`; changes nothing
    if not restore.problems:
        load(path, manifest, restore.sinks, comm)
        restore.finish()
        print(restore.report)

What can be known before a tensor is read is checked by `prepare`, so that a state that does not fit stays unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.casting import Cast, can_cast
from harness.checkpoint.manifest import Manifest
from harness.checkpoint.partial import EXACT, Partial
from harness.checkpoint.schema import ITEMSIZE, Leaf
from harness.checkpoint.shards import Region, Shape, check_local
from harness.checkpoint.tensors import Buffer, Part, dtype_of, is_tensor, new_tensor
from harness.errors import DataError, some


@dataclass
class Report:
    """What a restore did, by names here. As text it is one line.

    loaded: tensors, and entries that are restored as a whole; cast: those of them that were converted; infinite: those
    of them where a value had no room in the new dtype. missing: not in the checkpoint, kept as they were. skipped: of
    another shape there, kept as they were. untouched: not asked for, kept as they were. unexpected: only in the
    checkpoint, left out. notes: other things to know, as sentences.
    """

    loaded: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)
    infinite: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all of the checkpoint went into all of the state, unconverted."""
        return not (self.cast or self.missing or self.skipped or self.untouched or self.unexpected or self.notes)

    def __str__(self) -> str:
        parts = [f"restored {len(self.loaded)} tensors and entries"]
        for label, names in (
            ("converted", self.cast),
            ("warning: too large for their new dtype, now infinite", self.infinite),
            ("kept, not in the checkpoint", self.missing),
            ("kept, of another shape in the checkpoint", self.skipped),
            ("kept, not asked for", self.untouched),
            ("left out of the checkpoint", self.unexpected),
        ):
            if names:
                parts.append(f"{label}: {some(names, 4)}")
        return "; ".join([*parts, *self.notes])


@dataclass
class Restore:
    """Where a checkpoint's leaves go on `rank`, one of `size`: `sinks` by leaf name, then `finish`.

    `shards`: what is declared of parameters and buffers, by name. `problems`: why it does not fit.
    """

    partial: Partial = EXACT
    rank: int = 0
    size: int = 1
    shards: Mapping[str, Region] = field(default_factory=dict)
    sinks: dict[str, list[Any]] = field(default_factory=dict)
    steps: list[Callable[[], Callable[[], None]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    casts: list[Cast] = field(default_factory=list)
    """Of parts."""
    converted: dict[int, str] = field(default_factory=dict)
    """id(live tensor) -> the dtype that it is converted from."""

    def finish(self) -> None:
        """Hand over what is not a tensor, once all sinks are full.

        Every step first makes its values, and none is handed over before all could be made.
        """
        for hand_over in [make() for make in self.steps]:
            hand_over()
        casts = [sink for sinks in self.sinks.values() for sink in sinks if isinstance(sink, Cast)]
        self.report.infinite += [cast.name for cast in [*casts, *self.casts] if cast.infinite]

    def sink(self, name: str, array: Any, region: Region | None = None) -> None:
        """The leaf of this name, or a region of it, goes into this array, which has its dtype and shape."""
        self.sinks.setdefault(name, []).append(Part(array, region, name) if region else Buffer(array, name))

    def fill(self, name: str, array: Any, leaf: Leaf, region: Region | None = None) -> bool:
        """The leaf, or a region of it, goes into the live tensor that is called `name` here, if it fits. Whether so."""
        if region is not None:
            check_local(array, region, name)
        here = (dtype_of(array), tuple(array.shape) if region is None else region.shape)
        cast = self.partial.cast and here[0] != leaf.dtype and can_cast(leaf.dtype, here[0])
        if here[1] != leaf.shape or (here[0] != leaf.dtype and not cast):
            text = f"{here[0]}{list(here[1])} here and {leaf.dtype}{list(leaf.shape)} in the checkpoint"
            self.mismatched(name, f"{name} is {text}")
            return False
        if problem := unwritable(array):
            self.problems.append(f"{name} {problem}")
            return False
        if cast:
            self.report.cast.append(name)
            self.converted[id(array)] = leaf.dtype
            self._sink_cast(name, array, leaf, region)
        else:
            self.sink(leaf.name, array, region)
        self.report.loaded.append(name)
        return True

    def _sink_cast(self, name: str, array: Any, leaf: Leaf, region: Region | None) -> None:
        cast = Cast(array, leaf.dtype, name)
        if region is None:
            self.sinks.setdefault(leaf.name, []).append(cast)
            return
        # A part arrives in pieces of many places: it is collected first, then converted.
        stored = Buffer(new_tensor("numpy", "uint8", (ITEMSIZE[leaf.dtype] * region.elements,)), name)
        self.sinks.setdefault(leaf.name, []).append(Part.of(stored, region, leaf.dtype))
        self.casts.append(cast)

        def convert() -> Callable[[], None]:
            return lambda: cast.write(0, stored.read(0, stored.nbytes))

        self.steps.insert(0, convert)

    def missing(self, name: str, what: str = "") -> None:
        if self.partial.missing == "error":
            self.problems.append(f"missing from the checkpoint: {name}{what}")
        else:
            self.report.missing.append(name)

    def unexpected(self, name: str, what: str = "") -> None:
        if self.partial.unexpected == "error":
            self.problems.append(f"only in the checkpoint: {name}{what}")
        else:
            self.report.unexpected.append(name)

    def mismatched(self, name: str, why: str) -> None:
        if self.partial.mismatched == "error":
            self.problems.append(why)
        else:
            self.report.skipped.append(name)

    def compare(self, here: Collection[str], there: Set[str]) -> None:
        """What only one side has is missing or unexpected."""
        for name in here:
            if name not in there:
                self.missing(name)
        for name in sorted(there - set(here)):
            self.unexpected(name)


class Source:
    """What a checkpoint offers, by the names that things have here. Raises DataError where two get the same name."""

    def __init__(self, manifest: Manifest, partial: Partial, report: Report) -> None:
        self.leaves: dict[str, Leaf] = {leaf.name: leaf for leaf in manifest.layout.leaves}
        aliases = {name: self.leaves[target] for name, target in manifest.aliases.items()}
        names = _rename({**self.leaves, **aliases}, partial.renamed, report)
        entries = _rename(manifest.state, partial.renamed_entry, Report())
        self.tensors: dict[str, Leaf] = {here: leaf for here, (_, leaf) in names.items()}
        """Leaves and second names of leaves, by their names here."""
        self.entries: dict[str, tuple[str, Any]] = entries
        """(Name there, record) of entries, by their names here."""

    def below(self, root: str) -> dict[str, Leaf]:
        """The tensors of an entry, by their names here."""
        return {name: leaf for name, leaf in self.tensors.items() if name.startswith(root + "/")}


def _rename(found: Mapping[str, Any], rename: Callable[[str], str], report: Report) -> dict[str, tuple[str, Any]]:
    """(Name there, value) by name here. One that is renamed goes before one that has the name already."""
    made: dict[str, tuple[str, Any]] = {}
    plain = {}
    for name, value in found.items():
        here = rename(name)
        if here == name:
            plain[name] = value
        elif here in made:
            raise DataError(f"both {made[here][0]} and {name} would be called {here}")
        else:
            made[here] = (name, value)
    for name, value in plain.items():
        if name in made:
            report.unexpected.append(name)
        else:
            made[name] = (name, value)
    return made


def matched(wanted: Mapping[str, Any], stored: Mapping[str, Leaf], restore: Restore) -> Iterator[tuple[str, Any, Leaf]]:
    """(Name here, live tensor, leaf) of what both sides have and the restore wants; the rest is dealt with."""
    mine = {name: tensor for name, tensor in wanted.items() if restore.partial.wants(name)}
    restore.report.untouched += [name for name in wanted if name not in mine]
    restore.compare(mine, {name for name in stored if restore.partial.wants(name)})
    for name, tensor in mine.items():
        if name in stored:
            yield name, tensor, stored[name]


def maker(
    leaves: Mapping[str, Leaf],
    restore: Restore,
    device: Any = None,
    live: Mapping[str, Any] | None = None,
    part: tuple[Shape, Region] | None = None,
) -> Callable[[str, str], Any]:
    """Tensors for `decode`: the live one of the same key where it fits, else a new one.

    `part`: of leaves of the region's (global) shape only this region is wanted, in tensors of the local shape.
    """

    def make(name: str, kind: str) -> Any:
        leaf = leaves.get(name)
        if leaf is None or kind not in ("torch", "numpy"):
            raise DataError(f"the checkpoint refers to {name!r}, which it does not hold")
        tensor: Any = (live or {}).get(name.rpartition("/")[2])
        shape, region = part if part is not None and leaf.shape == part[1].shape else (leaf.shape, None)
        fits = is_tensor(tensor) and (dtype_of(tensor), tuple(tensor.shape)) == (leaf.dtype, shape)
        if not fits or unwritable(tensor):
            tensor = new_tensor(kind, leaf.dtype, shape, device)
        restore.sink(name, tensor, region)
        return tensor

    return make


def unwritable(array: Any) -> str | None:
    """Why nothing can be restored into this tensor, None where that is possible."""
    if hasattr(array, "flags"):
        return None if array.flags.writeable else "is read-only"
    if array.is_contiguous():
        return None
    if any(step == 0 and length > 1 for step, length in zip(array.stride(), array.shape, strict=True)):
        return "has elements that share memory (it was expanded)"
    return None
