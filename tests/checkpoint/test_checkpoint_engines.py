"""Engines: the same bytes in the same places, however they are moved, and one error whatever fails, wherever.

Several ranks at once are in `ranks_checkpoint.py`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import fcntl_flags, patched

from harness.checkpoint import Single, commit
from harness.checkpoint.digest import block_digests
from harness.checkpoint.engines import Engine, choose
from harness.checkpoint.engines import mpio as mpio_module
from harness.checkpoint.engines.direct import Direct
from harness.checkpoint.engines.filesystem import filesystem
from harness.checkpoint.engines.mpio import Mpio, unavailable
from harness.checkpoint.engines.output import Output
from harness.checkpoint.file import build_head
from harness.checkpoint.layout import PAGE, lay_out
from harness.checkpoint.plan import make_plan
from harness.checkpoint.schema import Leaf
from harness.checkpoint.staging import Image, Staging
from harness.checkpoint.tensors import Buffer
from harness.errors import InternalError, Unavailable

parallel = pytest.mark.skipif(unavailable(Single()) is not None, reason="there is no MPI")

LEAVES = [
    Leaf("model/large", "float32", (257, 1031)),
    Leaf("model/cube", "complex128", (13, 17, 19)),
    Leaf("model/half", "bfloat16", (33_333,)),
    Leaf("model/scalar", "float64", ()),
    Leaf("model/empty", "int8", (0, 3)),
    Leaf("model/flags", "bool", (4099,)),
    *(Leaf(f"small/{i}", "int16", (i,)) for i in range(40)),
]


class Sample:
    """A layout with random bytes for its leaves, the images of one rank, and what the file has to be afterwards."""

    def __init__(self, block: int | None = None, rank: int = 0, size: int = 1, leaves: list[Leaf] = LEAVES) -> None:
        self.layout = lay_out(leaves, block=block)
        generator = np.random.default_rng(7)
        self.whole = np.zeros(self.layout.data_end, np.uint8)
        self.buffers = []
        for leaf, start, end in zip(self.layout.leaves, self.layout.starts, self.layout.ends, strict=True):
            data = generator.integers(0, 2 if leaf.dtype == "bool" else 255, leaf.nbytes, np.uint8)
            self.whole[start:end] = data
            self.buffers.append(Buffer(data))
        self.plan = make_plan(self.layout, rank=rank, size=size)
        self.staging = Staging()
        self.images = self.staging.prepare(self.layout, self.plan)
        self.staging.fill(self.buffers)
        table = block_digests(self.whole[self.layout.data_start :], self.layout.block)
        self.digests = {block: table[block] for first, last in self.plan.runs for block in range(first, last)}

    def cut(self, blocks: int) -> list[Image]:
        """The same images in smaller ones of so many blocks."""
        step = blocks * self.layout.block
        return [
            Image(image.block + at // self.layout.block, image.offset + at, image.data[at : at + step])
            for image in self.images
            for at in range(0, len(image.data), step)
        ]

    def file(self, directory: Path) -> Path:
        """A new file to write to."""
        path = directory / commit.DATA
        path.unlink(missing_ok=True)
        commit.begin(directory, self.layout)
        commit.put_head(directory, self.layout, build_head(self.layout, {}))
        return path

    def check(self, path: Path, digests: dict[int, int]) -> None:
        """This rank's blocks are in the file, and nothing else is."""
        assert digests == self.digests
        found = np.fromfile(path, np.uint8)
        assert len(found) == self.layout.data_end
        expected = np.zeros_like(self.whole)
        for first, last in self.plan.runs:
            lo, hi = self.layout.block_range(first)[0], self.layout.block_range(last - 1)[1]
            expected[lo:hi] = self.whole[lo:hi]
        start = self.layout.data_start
        assert np.array_equal(found[start:], expected[start:])


@contextmanager
def nothing_left() -> Iterator[None]:
    """The data file is open nowhere afterwards, and no thread runs that did not before."""
    threads = threading.active_count()
    yield
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            assert not os.readlink(f"/proc/self/fd/{number}").endswith("data.h5")
    assert threading.active_count() == threads


# direct


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("io", ["buffered", "odirect", "auto"])
def test_direct_writes_its_blocks_and_no_others(io: Any, threads: int, tmp_path: Path) -> None:
    for block, rank, size in ((4096, 0, 1), (65536, 1, 3), (None, 2, 3)):
        sample = Sample(block, rank, size)
        path = sample.file(tmp_path)
        with nothing_left():
            digests = Direct(io=io, threads=threads).write(path, sample.layout, sample.cut(3), Single())
        sample.check(path, digests)
    assert sample.layout.data_end % PAGE, "the end of the file is not aligned"


def test_direct_takes_no_images_at_all_and_any_iterable(tmp_path: Path) -> None:
    sample = Sample(4096)
    path = sample.file(tmp_path)
    assert Direct().write(path, sample.layout, [], Single()) == {}
    sample.check(path, Direct(threads=3).write(path, sample.layout, iter(sample.cut(2)), Single()))


def test_large_parts_go_around_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, flag, *rest: flags.append(flag) or original(path, flag, *rest))  # type: ignore[func-returns-value]
    sample = Sample(4096)
    path = sample.file(tmp_path)
    for io, size, around in (("auto", 1 << 30, True), ("auto", 1 << 20, False), ("buffered", 1 << 30, False)):
        flags.clear()
        with Output(path, io, size):  # type: ignore[arg-type]
            assert any(flag & os.O_DIRECT for flag in flags) == around


def test_memory_that_does_not_begin_at_a_page_goes_through_the_cache(tmp_path: Path) -> None:
    sample = Sample(4096)
    memory = np.empty(len(sample.whole) + 1, np.uint8)[1:]
    memory[:] = sample.whole
    start = sample.layout.data_start
    path = sample.file(tmp_path)
    image = Image(0, start, memory[start:])
    sample.check(path, Direct(io="odirect").write(path, sample.layout, [image], Single()))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_refuses_to_go_around_the_cache(threads: int, number: int, tmp_path: Path) -> None:
    sample = Sample(4096)

    def refuse(call: int, original: Any, path: Any, flags: int, *rest: Any) -> Any:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number), str(path))
        return original(path, flags, *rest)

    path = sample.file(tmp_path)
    with nothing_left(), patched("open", refuse):
        digests = Direct(io="odirect", threads=threads).write(path, sample.layout, sample.cut(3), Single())
    sample.check(path, digests)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_refusal_at_any_write_is_made_up_for(threads: int, tmp_path: Path) -> None:
    """EINVAL of writes that are aligned: some file systems say it only then."""
    sample = Sample(16384)
    images = sample.cut(7)
    for at in range(len(images)):

        def refuse(call: int, original: Any, descriptor: int, *rest: Any, at: int = at) -> Any:
            flags = fcntl_flags(descriptor)
            if call >= at and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return original(descriptor, *rest)

        path = sample.file(tmp_path)
        with nothing_left(), patched("pwrite", refuse):
            digests = Direct(io="odirect", threads=threads).write(path, sample.layout, images, Single())
        sample.check(path, digests)


@pytest.mark.parametrize("io", ["buffered", "odirect"])
@pytest.mark.parametrize("most", [1, 511, 4096, 5000, 70_000])
def test_short_writes_are_continued(io: Any, most: int, tmp_path: Path) -> None:
    sample = Sample(4096, leaves=[Leaf("a", "uint8", (19_001,))] if most < 512 else LEAVES)

    def short(call: int, original: Any, descriptor: int, data: Any, offset: int) -> int:
        aligned = fcntl_flags(descriptor) & os.O_DIRECT
        # Around the cache the kernel, too, stops where it likes; what is asked for stays aligned here.
        if aligned and len(data) > PAGE:
            return int(original(descriptor, data[:PAGE], offset))
        return int(original(descriptor, data if aligned else data[:most], offset))

    path = sample.file(tmp_path)
    with patched("pwrite", short):
        digests = Direct(io=io, threads=2).write(path, sample.layout, sample.cut(4), Single())
    sample.check(path, digests)


def test_a_short_write_that_ends_anywhere_is_continued_through_the_cache(tmp_path: Path) -> None:
    sample = Sample(4096)

    def odd(call: int, original: Any, descriptor: int, data: Any, offset: int) -> int:
        written = int(original(descriptor, data, offset))
        return written - 300 if fcntl_flags(descriptor) & os.O_DIRECT else written

    path = sample.file(tmp_path)
    with patched("pwrite", odd):
        digests = Direct(io="odirect", threads=2).write(path, sample.layout, sample.cut(4), Single())
    sample.check(path, digests)


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    sample = Sample(4096)
    for io in ("buffered", "odirect"):
        path = sample.file(tmp_path)
        with patched("pwrite", lambda *args: 0), pytest.raises(OSError, match="nothing could be written"):
            Direct(io=io).write(path, sample.layout, sample.images, Single())  # type: ignore[arg-type]


def test_signals_during_writes_do_no_harm(tmp_path: Path) -> None:
    sample = Sample(1 << 20, leaves=[Leaf("a", "uint8", ((24 << 20) + 5,))])
    path = sample.file(tmp_path)
    came = [0]

    def handler(number: int, frame: object) -> None:
        came[0] += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for io in ("buffered", "odirect"):
            engine = Direct(io=io, threads=2)  # type: ignore[arg-type]
            sample.check(path, engine.write(path, sample.layout, sample.cut(1), Single()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came[0] > 5


@pytest.mark.parametrize("io", ["buffered", "odirect"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_in_any_thread_at_any_call(io: Any, threads: int, number: int, tmp_path: Path) -> None:
    sample = Sample(16384)
    images = sample.cut(9)
    path = sample.file(tmp_path)
    engine = Direct(io=io, threads=threads)
    with patched("pwrite", lambda call, original, *rest: original(*rest)) as calls:
        engine.write(path, sample.layout, images, Single())
    assert calls[0] >= len(images) >= 9
    threads_seen = set()
    for at in range(calls[0]):

        def fail(call: int, original: Any, *rest: Any, at: int = at) -> Any:
            if call == at:
                threads_seen.add(threading.current_thread().name)
                raise OSError(number, os.strerror(number))
            return original(*rest)

        path = sample.file(tmp_path)
        with (
            nothing_left(),
            patched("pwrite", fail) as made,
            pytest.raises(OSError, match=os.strerror(number)) as caught,
        ):
            engine.write(path, sample.layout, images, Single())
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
        assert made[0] <= at + 2 * threads, "the other threads end soon"
        sample.check(path, engine.write(path, sample.layout, images, Single()))
    assert threads_seen


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_all_threads_fail_and_one_error_is_raised(victim: int, tmp_path: Path) -> None:
    """They fail at the same time; the first one counts, the others are not lost threads."""
    sample = Sample(16384)
    path, together = sample.file(tmp_path), threading.Barrier(3)

    def fail(call: int, original: Any, *rest: Any) -> Any:
        together.wait(10)
        raise OSError(errno.EIO if call == victim else errno.ENOSPC, "it failed")

    with nothing_left(), patched("pwrite", fail), pytest.raises(OSError, match="it failed"):
        Direct(io="buffered", threads=3).write(path, sample.layout, sample.cut(9), Single())


@pytest.mark.parametrize("name", ["open", "fdatasync", "close"])
@pytest.mark.parametrize("io", ["buffered", "odirect"])
def test_other_calls_that_fail(name: str, io: Any, tmp_path: Path) -> None:
    sample = Sample(4096)
    engine = Direct(io=io, threads=2)
    path = sample.file(tmp_path)
    with patched(name, lambda call, original, *rest: original(*rest)) as calls:
        engine.write(path, sample.layout, sample.cut(9), Single())
    assert calls[0] == (1 if io == "buffered" or name == "fdatasync" else 2)
    for at in range(calls[0]):

        def fail(call: int, original: Any, *rest: Any, at: int = at) -> Any:
            if call == at:
                if name == "close":
                    original(*rest)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*rest)

        with nothing_left(), patched(name, fail), pytest.raises(OSError, match="Input/output error") as caught:
            engine.write(path, sample.layout, sample.cut(9), Single())
        assert caught.value.filename == str(path)


def test_an_error_of_the_images_themselves(tmp_path: Path) -> None:
    sample = Sample(4096)

    def broken() -> Iterator[Image]:
        yield from sample.cut(9)[:4]
        raise ZeroDivisionError("a bug")

    with nothing_left(), pytest.raises(ZeroDivisionError, match="a bug"):
        Direct(threads=3).write(sample.file(tmp_path), sample.layout, broken(), Single())


def test_an_interrupt_waits_for_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file must not be closed while a thread writes: its number may be another file's by then."""
    sample = Sample(16384)
    original, main = threading.Thread.join, threading.main_thread()
    waited: list[str] = []

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if not waited and thread.name.startswith("checkpoint-writer"):
            waited.append(thread.name)
            raise KeyboardInterrupt
        original(thread, timeout)

    def slow(call: int, original: Any, *rest: Any) -> Any:
        if threading.current_thread() is not main:
            threading.Event().wait(0.3)
        return original(*rest)

    monkeypatch.setattr(threading.Thread, "join", join)
    path = sample.file(tmp_path)
    with nothing_left(), patched("pwrite", slow), pytest.raises(KeyboardInterrupt):
        Direct(io="buffered", threads=2).write(path, sample.layout, sample.cut(9), Single())
    assert waited


def test_a_system_that_gives_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    sample = Sample(4096)
    path = sample.file(tmp_path)
    sample.check(path, Direct(threads=4).write(path, sample.layout, sample.cut(9), Single()))


def test_several_threads_do_write(tmp_path: Path) -> None:
    sample = Sample(4096)
    names, meet = set(), threading.Barrier(3)

    def together(call: int, original: Any, *rest: Any) -> Any:
        names.add(threading.current_thread().name)
        if call < 3:
            meet.wait(10)  # breaks where one thread makes all calls
        return original(*rest)

    path = sample.file(tmp_path)
    with patched("pwrite", together):
        sample.check(path, Direct(io="buffered", threads=3).write(path, sample.layout, sample.cut(9), Single()))
    assert len(names) == 3


def test_direct_does_not_follow_links(tmp_path: Path) -> None:
    sample = Sample(4096)
    path = sample.file(tmp_path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="Too many levels") as caught:
        Direct().write(tmp_path / "link", sample.layout, sample.images, Single())
    assert caught.value.errno == errno.ELOOP


# mpio


@parallel
@pytest.mark.parametrize("collective", [False, True])
def test_mpio_writes_the_same_file(collective: bool, tmp_path: Path) -> None:
    for rank, size in ((0, 1), (1, 3)):
        sample = Sample(65536, rank, size)
        path = sample.file(tmp_path)
        before = path.read_bytes()[: sample.layout.head]
        with nothing_left():
            digests = Mpio(print, collective=collective).write(path, sample.layout, sample.cut(5), Single())
        sample.check(path, digests)
        assert path.read_bytes()[: sample.layout.head] == before


@parallel
@pytest.mark.parametrize("collective", [False, True])
@pytest.mark.parametrize("place_of_failure", ["_move", "block_digests"])
def test_an_error_in_mpio_is_raised_and_the_file_closed(
    collective: bool, place_of_failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sample(65536)
    calls = [0]
    original = getattr(mpio_module, place_of_failure)

    def fail(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **options)

    engine = Mpio(print, collective=collective)
    path = sample.file(tmp_path)
    with monkeypatch.context() as patch, nothing_left():
        patch.setattr(mpio_module, place_of_failure, fail)
        with pytest.raises(OSError, match="No space left"):
            engine.write(path, sample.layout, sample.cut(5), Single())
    path = sample.file(tmp_path)
    sample.check(path, engine.write(path, sample.layout, sample.cut(5), Single()))


@parallel
def test_mpio_stays_on_the_main_thread(tmp_path: Path) -> None:
    sample, engine = Sample(4096), Mpio(print)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            engine.write(tmp_path / "x", sample.layout, sample.images, Single())
        except InternalError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "outside the main thread" in str(errors[0])
    assert not engine.background and Direct().background


# Choosing


def test_auto_says_why(tmp_path: Path) -> None:
    lines: list[str] = []
    engine: Engine = choose("auto", Single(), lines.append, directory=tmp_path)
    assert engine.name == "direct" and engine.background and not lines
    assert engine.reason.startswith("direct: ranks write whole blocks of their own on ")
    assert str(filesystem(tmp_path)) in engine.reason and "not mpio: " in engine.reason
    assert choose("direct", Single(), lines.append).reason == "direct: it was asked for"


@parallel
def test_mpio_by_name() -> None:
    for name in ("mpio", "mpio-collective"):
        engine = choose(name, Single(), lambda line: None)  # type: ignore[arg-type]
        assert engine.name == name and engine.reason == f"{name}: it was asked for"


@parallel
@pytest.mark.parametrize(("setting", "warned"), [(None, True), ("romio321", False)])
def test_open_mpis_own_io_is_warned_of(setting: str | None, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    monkeypatch.setattr(MPI, "Get_library_version", lambda: "Open MPI v4.1.4, package: Debian")
    monkeypatch.delenv("OMPI_MCA_io", raising=False)
    if setting:
        monkeypatch.setenv("OMPI_MCA_io", setting)
    lines: list[str] = []
    choose("mpio", Single(), lines.append)
    assert bool(lines) == warned and ("romio321" in "".join(lines)) == warned


class Pair(Single):
    """Two ranks without MPI."""

    size = 2


def test_what_mpio_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="mpio cannot be used: there is no MPI between these ranks"):
        choose("mpio", Pair(), print)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert str(unavailable(Single())).startswith("mpi4py cannot be imported")
    assert "not mpio: mpi4py cannot be imported" in choose("auto", Single(), print).reason


@parallel
@pytest.mark.parametrize(("kind", "number"), [("ERR_NO_SPACE", errno.ENOSPC), ("ERR_IO", errno.EIO)])
def test_an_error_of_mpi_is_one_of_the_file(
    kind: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpi4py import MPI

    def fail(*args: Any, **options: Any) -> None:
        raise MPI.Exception(getattr(MPI, kind))

    monkeypatch.setattr(mpio_module, "_move", fail)
    sample = Sample(65536)
    path = sample.file(tmp_path)
    with nothing_left(), pytest.raises(OSError, match=os.strerror(number)) as caught:
        Mpio(print).write(path, sample.layout, sample.images, Single())
    assert (caught.value.errno, caught.value.filename) == (number, str(path))


def test_threads_of_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    MPI = pytest.importorskip("mpi4py.MPI")
    pair = Pair()
    pair.mpi = MPI.COMM_SELF
    monkeypatch.setitem(sys.modules, "horovod.torch", sys)
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
    assert "MPI_THREAD_MULTIPLE" in str(unavailable(pair))
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_MULTIPLE)
    assert unavailable(pair) is None


TABLE = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
22 21 0:30 / /scratch rw - lustre 10.0.0.1@tcp:/x rw
23 22 0:31 / /scratch/my\\040disk rw master:2 shared:3 - cifs //server/x rw
24 21 0:32 / /mnt rw - nfs4 server:/a rw
25 24 0:33 / /mnt rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/a", "ext4"),
        ("/scratch", "lustre"),
        ("/scratch/run/not/there/yet", "lustre"),
        ("/scratchy", "ext4"),
        ("/scratch/my disk/run", "cifs"),
        ("/mnt/x", "tmpfs"),
    ],
)
def test_file_systems_by_their_mount(path: str, kind: str, tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    assert filesystem(Path(path), str(table)) == kind
    assert filesystem(Path(path), str(tmp_path / "gone")) is None
    table.write_text("nonsense\n")
    assert filesystem(Path(path), str(table)) is None


def test_file_systems_that_are_not_for_this_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import harness.checkpoint.engines.filesystem as module

    lines: list[str] = []
    monkeypatch.setattr(module, "filesystem", lambda path: "fuse.s3fs")
    choose("auto", Single(), lines.append, directory=tmp_path)
    assert not lines, "one rank may"
    choose("auto", Pair(), lines.append, directory=tmp_path)
    assert "is on fuse.s3fs, which is not made for" in lines[0]


def test_digests_are_of_blocks(tmp_path: Path) -> None:
    """Whatever the images are cut into, and the last block shorter."""
    sample = Sample(4096)
    for blocks in (1, 2, 64):
        path = sample.file(tmp_path)
        assert Direct().write(path, sample.layout, sample.cut(blocks), Single()) == sample.digests
    assert len(sample.digests) == sample.layout.blocks
