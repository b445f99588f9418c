"""One job per checkpoints directory: who gets the lease, when it passes on, and that of several exactly one gets it."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness.checkpoint import leasefile
from harness.checkpoint.lease import SKEW, InUse, Lease, live_holder
from harness.checkpoint.leasefile import Holder
from harness.errors import Exit, StorageError

HOLD = """
import sys
from harness.checkpoint.lease import Lease
lease = Lease.acquire(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""
ELSEWHERE = Holder(uuid="a" * 32, host="node7", pid=4711, place="another machine", job="88", started=1.7e9)


@contextmanager
def holding(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def pretend(directory: Path, holder: Holder = ELSEWHERE, *, age: float = 0, number: int = 1) -> Path:
    """The lease file of a holder on another machine, `age` seconds after its last heartbeat."""
    place = directory / "lease"
    place.mkdir(exist_ok=True)
    leasefile.write(place, number, holder)
    touch(leasefile.path_of(place, number), age)
    return leasefile.path_of(place, number)


def touch(path: Path, age: float) -> None:
    at = time.time() - age
    os.utime(path, (at, at), follow_symlinks=False)


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory / "lease"))


def released(directory: Path) -> bool:
    seen = leasefile.newest(directory / "lease")
    return seen is not None and seen.holder.released


def test_taken_given_back_and_taken_again(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet" / "there"
    for number in (1, 2, 3):
        lease = Lease.acquire(directory)
        assert lease.still_mine() and files(directory) == [f"{number:08d}.json"]
        assert lease.holder.pid == os.getpid()
        holder = live_holder(directory)
        assert holder is not None and holder.pid == os.getpid()
        lease.release()
        lease.release()
        assert not lease.still_mine() and live_holder(directory) is None and released(directory)


def test_one_process_shares_it_until_the_last_one_gives_it_back(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    first, second = Lease.acquire(tmp_path), Lease.acquire(tmp_path / "link")
    first.release()
    assert not first.still_mine() and second.still_mine() and live_holder(tmp_path) is not None
    del second
    gc.collect()
    assert live_holder(tmp_path) is None, "one that is forgotten is given back"
    assert threading.active_count() < 20


def test_a_living_job_keeps_it_and_a_killed_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.checkpoint.lease.GRACE", 0.3)
    with holding(tmp_path) as other:
        began = time.monotonic()
        with pytest.raises(InUse, match=rf"{tmp_path} is in use by process {other.pid} on .*, since 20") as caught:
            Lease.acquire(tmp_path)
        assert caught.value.code == Exit.UNAVAILABLE and "end that job first" in str(caught.value.hint)
        assert 0.3 < time.monotonic() - began < 10, "a process that lives is waited for only a moment"
        other.send_signal(signal.SIGSTOP)
        for path in (tmp_path / "lease").iterdir():
            touch(path, 10 * SKEW)
        with pytest.raises(InUse):
            Lease.acquire(tmp_path, wait=0)
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the table of processes
        began = time.monotonic()
        lease = Lease.acquire(tmp_path)
        assert time.monotonic() - began < 5
        assert lease.still_mine() and lease.holder.pid == os.getpid()
        lease.release()


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with holding(tmp_path) as other:
        assert other.stdin
        threading.Timer(0.5, other.stdin.close).start()
        Lease.acquire(tmp_path).release()
        assert other.wait(10) == 0


def test_a_program_that_ends_gives_it_back(tmp_path: Path) -> None:
    with holding(tmp_path) as other:
        other.communicate("", timeout=60)
        assert other.returncode == 0 and released(tmp_path)


def test_a_forked_child_gives_nothing_back(tmp_path: Path) -> None:
    program = f"""
import os, gc
from harness.checkpoint.lease import Lease, live_holder
lease = Lease.acquire({str(tmp_path)!r})
if (child := os.fork()) == 0:
    lease.release(); del lease; gc.collect()
    os._exit(0)
os.waitpid(child, 0)
assert lease.still_mine() and live_holder({str(tmp_path)!r}).pid == os.getpid()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_holder_elsewhere_that_is_silent_is_waited_for_once_told(tmp_path: Path) -> None:
    pretend(tmp_path)
    lines: list[str] = []
    began = time.monotonic()
    lease = Lease.acquire(tmp_path, log=lines.append, beat=0.1, expiry=0.6)
    assert 0.5 < time.monotonic() - began < 3 and lease.still_mine()
    assert len(lines) == 2 and "is held by process 4711 on node7, job 88, since " in lines[0]
    assert "took over the checkpoints of process 4711 on node7" in lines[1]
    lease.release()


def test_a_holder_elsewhere_that_lives_keeps_it(tmp_path: Path) -> None:
    path = pretend(tmp_path)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        began = time.monotonic()
        with pytest.raises(InUse, match="process 4711 on node7") as caught:
            Lease.acquire(tmp_path, beat=0.1, expiry=30)
        assert time.monotonic() - began < 10 and str(tmp_path / "lease") in str(caught.value.hint)
    finally:
        end.set()
        thread.join()


def test_nobody_waits_who_does_not_want_to(tmp_path: Path) -> None:
    pretend(tmp_path)
    began = time.monotonic()
    with pytest.raises(InUse):
        Lease.acquire(tmp_path, wait=0)
    with pytest.raises(InUse):
        Lease.acquire(tmp_path, wait=0.3)
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("clock", [-1e7, 0.0, 1e7])
def test_the_nodes_clock_does_not_matter(tmp_path: Path, clock: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    pretend(tmp_path)
    (tmp_path / "old").mkdir()
    pretend(tmp_path / "old", age=SKEW + 61)
    (tmp_path / "ahead").mkdir()
    pretend(tmp_path / "ahead", age=-1e6)  # its file system's time stamps come from a clock that is ahead
    monkeypatch.setattr(time, "time", lambda: now + clock)
    with pytest.raises(InUse):
        Lease.acquire(tmp_path, wait=0)
    assert live_holder(tmp_path) is not None and live_holder(tmp_path / "old") is None
    began = time.monotonic()
    Lease.acquire(tmp_path / "old").release()
    assert time.monotonic() - began < 5, "long expired: at once"
    Lease.acquire(tmp_path / "ahead", beat=0.05, expiry=0.3).release()
    assert time.monotonic() - began < 10


def test_it_is_kept_alive(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path, beat=0.05)
    path = tmp_path / "lease" / "00000001.json"
    touch(path, 100)
    deadline = time.monotonic() + 10
    while time.time() - path.stat().st_mtime > 50:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.release()
    touch(path, 100)
    time.sleep(0.2)
    assert time.time() - path.stat().st_mtime > 50, "and no longer than it is held"


def test_losing_it_shows(tmp_path: Path) -> None:
    lease = Lease.acquire(tmp_path)
    pretend(tmp_path, number=2)
    assert not lease.still_mine()
    lease.release()
    seen = leasefile.newest(tmp_path / "lease")
    assert seen is not None and seen.number == 2 and seen.holder == ELSEWHERE, "the new holder is left alone"
    again = tmp_path / "again"
    lease = Lease.acquire(again)
    os.unlink(again / "lease" / "00000001.json")
    assert not lease.still_mine()
    os.rmdir(again / "lease")
    assert not lease.still_mine()
    lease.release()
    assert not (again / "lease").exists()


RACE = """
import multiprocessing, os, sys, time
from pathlib import Path
from harness.checkpoint.lease import InUse, Lease
sys.path.insert(0, sys.argv[1])
from test_lease import ELSEWHERE, pretend

def contend(directory, barrier, tried, results):
    barrier.wait()
    try:
        lease = Lease.acquire(directory, wait=0)
        results.put(lease.still_mine())
    except InUse:
        results.put(None)
    tried.wait()

count = 5
fork = multiprocessing.get_context("fork")
for number in range(int(sys.argv[3])):
    directory = Path(sys.argv[2]) / str(number)
    directory.mkdir()
    if number % 3:
        pretend(directory, age=1000, number=number)
    if number % 3 == 2:
        (directory / "lease" / "00000001.json").write_text("{}")
    barrier, tried, results = fork.Barrier(count), fork.Barrier(count), fork.Queue()
    children = [fork.Process(target=contend, args=(directory, barrier, tried, results)) for _ in range(count)]
    for child in children: child.start()
    found = [results.get(timeout=90) for _ in children]
    for child in children: child.join(30)
    assert found.count(True) == 1 and found.count(None) == count - 1, (number, found)
"""


def test_of_several_that_take_it_over_exactly_one_does(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", RACE, here, str(tmp_path), "24"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


KILLED = """
import fcntl, multiprocessing, os, random, sys, time
from harness.checkpoint.lease import InUse, Lease

def work(directory, seed, end, told):
    dice = random.Random(seed)
    while time.monotonic() < end:
        try:
            lease = Lease.acquire(directory, wait=0)
        except InUse:
            time.sleep(0.001)
            continue
        critical = os.open(directory + "/critical", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(critical, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's own word
            told.put("held" if lease.still_mine() else "lost")
        except OSError:
            told.put("two at a time")
        time.sleep(0.003 * dice.random())
        if dice.random() < 0.2:
            os.kill(os.getpid(), 9)
        os.close(critical)
        lease.release()

fork = multiprocessing.get_context("fork")
told, seed, running, end, seen = fork.SimpleQueue(), 0, [], time.monotonic() + float(sys.argv[2]), []
while running or time.monotonic() < end:
    running = [child for child in running if child.is_alive()]
    while len(running) < 4 and time.monotonic() < end:
        seed += 1
        running.append(fork.Process(target=work, args=(sys.argv[1], seed, end, told)))
        running[-1].start()
    while not told.empty():
        seen.append(told.get())
    time.sleep(0.005)
assert set(seen) == {"held"} and len(seen) > 20 and seed > 6, (seed, {word: seen.count(word) for word in seen})
"""


def test_never_two_at_a_time_whoever_is_killed_when(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "3"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_slow_contender_that_saw_an_old_list_withdraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its file, others took the lease over, gave it back, and the files before it went."""
    from harness.checkpoint import lease as module

    pretend(tmp_path, age=1000, number=1)
    look = leasefile.newest
    looks: list[Any] = []

    def slow(place: Path) -> Any:
        looks.append(look(place))
        if len(looks) == 1:
            os.unlink(leasefile.path_of(place, 1))
            pretend(tmp_path, number=3)
        return looks[-1]

    monkeypatch.setattr(module.leasefile, "newest", slow)
    with pytest.raises(InUse):
        Lease.acquire(tmp_path, wait=0)
    assert files(tmp_path) == ["00000003.json"]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


CONTENT: dict[str, bytes | Callable[[Path], None]] = {
    "empty": b"",
    "noise": b"\xff\x00\xfe" * 100,
    "list": b"[1, 2]",
    "deep": b"[" * 4000,
    "number": b"1" * 4000,
    "more": json.dumps({**asdict(ELSEWHERE), "evil": 1}).encode(),
    "types": json.dumps({**asdict(ELSEWHERE), "pid": "1", "place": None}).encode(),
    "negative": json.dumps({**asdict(ELSEWHERE), "pid": -1}).encode(),
    "time": b'{"uuid": "a", "pid": 1, "started": Infinity}',
    "terminal": json.dumps({**asdict(ELSEWHERE), "host": "\x1b[31mred"}).encode(),
    "huge": b"{" + b" " * (1 << 20) + b"}",
    "directory": lambda path: path.mkdir(),
    "pipe": _fifo,
    "link": _link,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", sorted(CONTENT))
def test_whatever_lies_there_is_a_holder_that_cannot_be_told(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lease" / "00000003.json"
    path.parent.mkdir()
    content = CONTENT[name]
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InUse, match="a program that cannot be told"):
        Lease.acquire(tmp_path, wait=0)
    touch(path, 1000)
    lease = Lease.acquire(tmp_path, wait=0)
    assert lease.still_mine() and "00000004.json" in files(tmp_path)
    lease.release()


def test_other_files_there_do_no_harm(tmp_path: Path) -> None:
    place = tmp_path / "lease"
    place.mkdir()
    for name in ("99.json", "0000000000099.json", "9" * 300, "x.json", "notes", "0123.tmp"):
        (place / name[:200]).write_text("{}")
    with_numbers = Lease.acquire(tmp_path, wait=0)
    assert with_numbers.holder == Holder(**json.loads((place / "00000001.json").read_text()))
    assert not list(place.glob("*.tmp")) and (place / "notes").exists()
    with_numbers.release()
    (place / f"{10**15 - 1}.json").write_text("{}")
    touch(place / f"{10**15 - 1}.json", 1000)
    with pytest.raises(StorageError, match="numbers that no lease has"):
        Lease.acquire(tmp_path, wait=0)


def test_a_place_that_cannot_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lease").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="is a link"):
        Lease.acquire(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "lease").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot be taken or read: "):
        Lease.acquire(tmp_path / "b")

    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        pretend(tmp_path)
        patch.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match="Permission denied") as caught:
            Lease.acquire(tmp_path)
        assert caught.value.code == Exit.IO
        holder = live_holder(tmp_path)
        assert holder is not None and not holder.uuid, "somebody who may not read it sees that it is there"
    touch(tmp_path / "lease" / "00000001.json", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert live_holder(tmp_path) is None


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    lease = Lease.acquire(tmp_path)
    assert lease.still_mine() and files(tmp_path) == ["00000001.json"]
    assert not leasefile.write(tmp_path / "lease", 1, ELSEWHERE), "and it excludes others all the same"
    lease.release()


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    place, birth = leasefile.process()
    if not place:
        pytest.skip("this system does not tell when a process began")
    pretend(tmp_path, Holder(uuid="b", host="here", pid=os.getpid(), place=place, birth=birth + "1"))
    Lease.acquire(tmp_path, wait=0).release()
    hidden = tmp_path / "c"
    hidden.mkdir()
    pretend(hidden, Holder(uuid="b", host="here", pid=os.getpid(), place=f"{place} of a container", birth=birth))
    with pytest.raises(InUse):
        Lease.acquire(hidden, wait=0)


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
objects = st.dictionaries(st.sampled_from(list(asdict(Holder()))), values)


@given(st.binary(max_size=300) | objects.map(lambda value: json.dumps(value).encode()))
def test_parsing_never_fails_and_never_yields_odd_values(data: bytes) -> None:
    holder = leasefile.parse(data)
    assert 0 <= holder.pid < 1 << 31 and str(holder).isprintable() and type(holder.released) is bool


def test_a_holder_is_the_same_after_parsing() -> None:
    assert leasefile.parse(json.dumps(asdict(ELSEWHERE)).encode()) == ELSEWHERE
