"""Hosts: every way they are written, hostile texts, allocations of batch systems, putting ranks on them."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError, InputMissing, Unavailable, UsageError
from launch import hosts
from launch.hosts import Allocation, find, place
from launch.nodelist import (
    MAX_HOSTS,
    Host,
    expand_allocation,
    expand_counts,
    expand_nodelist,
    parse_hostfile,
    parse_hosts,
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[01-04,7],x", ["n01", "n02", "n03", "n04", "n7", "x"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("gpu[1,3]-ib", ["gpu1-ib", "gpu3-ib"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("a.b-c_d,e", ["a.b-c_d", "e"]),
        ("n[5]", ["n5"]),
    ],
)
def test_nodelist(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


@pytest.mark.parametrize(
    "text",
    [
        "",
        "n[",
        "n]",
        "n[]",
        "n[1-]",
        "n[3-1]",
        "n[a-b]",
        ",",
        "a,,b",
        "n[1-3",
        "n[[1]]",
        "-x",
        "--oversubscribe",
        "a b",
        "n;ls",
        "n\n",
    ],
)
def test_nodelist_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        expand_nodelist(text)


@pytest.mark.parametrize(
    "bomb",
    [
        "n[1-999999999]",
        "n[0-99999]a[0-99999]",
        "a[1-1000]b[1-1000]c[1-1000]d[1-1000]e[1-1000]",
        ",".join(["n[1-60000]", "m[1-60000]"]),
        "n[" + ",".join(["1-90000"] * 10) + "]",
        "n[1-9999999999]",
        "x" * 5_000_000,
    ],
)
def test_nodelist_bombs_end_at_once(bomb: str) -> None:
    with pytest.raises(ValueError, match=r"more than|too long|no list of"):
        expand_nodelist(bomb)


@given(
    st.lists(
        st.tuples(st.sampled_from(["n", "gpu", "r1-c"]), st.integers(0, 500), st.integers(0, 30), st.integers(1, 6)),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None)
def test_nodelist_round_trip(parts: list[tuple[str, int, int, int]]) -> None:
    texts, names = [], []
    for prefix, first, more, width in parts:
        texts.append(f"{prefix}[{first:0{width}d}-{first + more}]")
        names += [f"{prefix}{number:0{width}d}" for number in range(first, first + more + 1)]
    assert expand_nodelist(",".join(texts)) == names


@given(st.text(alphabet="nx01[]-,()2 ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_expands_or_is_refused(text: str) -> None:
    for expand in (expand_nodelist, expand_counts):
        try:
            result = expand(text)
        except ValueError:
            continue
        assert 0 < len(result) <= MAX_HOSTS


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50)), min_size=1, max_size=8))
def test_counts_round_trip(pairs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in pairs)
    assert expand_counts(text) == [count for count, times in pairs for _ in range(times)]


@pytest.mark.parametrize("text", ["", "x", "2(3)", "2(x)", "2(x3", "-1", "2,", "1(x999999),1(x999999)"])
def test_counts_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"counts"):
        expand_counts(text)


def test_allocation_of_unequal_nodes() -> None:
    assert expand_allocation("n[1-3]", "4(x2),2") == (Host("n1", 4), Host("n2", 4), Host("n3", 2))
    with pytest.raises(ValueError, match="3 hosts"):
        expand_allocation("n[1-3]", "4(x2)")


def test_hosts_option() -> None:
    assert parse_hosts("a:2,b:3") == (Host("a", 2), Host("b", 3))
    assert parse_hosts("a, b:2") == (Host("a", 1), Host("b", 2))
    assert parse_hosts("a:1,a:2") == (Host("a", 3),)


@pytest.mark.parametrize(
    "text", ["", " ", "a:", "a:0", "a:-1", "a:x", ":2", "a:2,", "-np:2", "--x:1", "a:1:2", "a/b:1", "a:99999999"]
)
def test_hosts_option_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_hosts(text)


def test_hostfile_forms() -> None:
    text = "# nodes\n\na slots=2\nb:3  # half a node\nc\nd slots=1 max_slots=4\n"
    assert parse_hostfile(text) == (Host("a", 2), Host("b", 3), Host("c", 1), Host("d", 1))


@pytest.mark.parametrize(
    ("text", "match"), [("a slots=x\n", "line 1"), ("a\nb two\n", "line 2"), ("# none\n", "no host")]
)
def test_hostfile_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_hostfile(text)


def test_hostfile_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"none\.txt"):
        find(None, str(tmp_path / "none.txt"), {})
    bad = tmp_path / "hosts.txt"
    bad.write_text("a slots=two\n")
    with pytest.raises(ConfigError, match=r"hosts.txt: line 1: 'two'"):
        find(None, str(bad), {})
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        find(None, str(bad), {})


def test_given_hosts_come_before_an_allocation() -> None:
    found = find("x:2", None, {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "9"})
    assert (found.kind, found.hosts) == ("given", (Host("x", 2),))


def test_slurm() -> None:
    environ = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n[01-02]",
        "SLURM_TASKS_PER_NODE": "4,2",
        "SLURM_NTASKS": "6",
    }
    found = find(None, None, environ)
    assert (found.kind, found.hosts, found.slots) == ("slurm", (Host("n01", 4), Host("n02", 2)), 6)
    assert found.source == "the Slurm job 12"
    gpus = environ | {"SLURM_GPUS_ON_NODE": "4"}
    assert find(None, None, gpus).hosts == found.hosts, "tasks were asked for"
    del gpus["SLURM_NTASKS"]
    assert find(None, None, gpus).hosts == (Host("n01", 4), Host("n02", 4))


def test_slurm_nonsense_is_a_sentence() -> None:
    with pytest.raises(Unavailable, match="batch system"):
        find(None, None, {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-999999999]"})


def test_pbs_and_lsf(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("a\na\nb\n")
    expected = (Host("a", 2), Host("b", 1))
    assert find(None, None, {"PBS_NODEFILE": str(nodes), "PBS_JOBID": "7.x"}).hosts == expected
    assert find(None, None, {"LSB_DJOB_HOSTFILE": str(nodes)}).hosts == expected
    assert find(None, None, {"LSB_MCPU_HOSTS": "a 2 b 1", "LSB_JOBID": "3"}).hosts == expected
    for environ in ({"PBS_NODEFILE": str(tmp_path / "no")}, {"LSB_MCPU_HOSTS": "a 2 b"}, {"LSB_MCPU_HOSTS": "a x"}):
        with pytest.raises(Unavailable):
            find(None, None, environ)


def _nvidia_smi(folder: Path, body: str) -> dict[str, str]:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_gpus_of_this_machine(tmp_path: Path) -> None:
    environ = _nvidia_smi(tmp_path, "echo 'GPU 0: NVIDIA H200 (UUID: x)'; echo 'GPU 1: NVIDIA H200 (UUID: y)'")
    found = find(None, None, environ)
    assert (found.kind, found.gpus, found.slots) == ("local", 2, 2)
    assert find(None, None, environ | {"CUDA_VISIBLE_DEVICES": "1"}).gpus == 1
    assert find(None, None, environ | {"CUDA_VISIBLE_DEVICES": ""}).gpus == 0
    assert find(None, None, environ | {"CUDA_VISIBLE_DEVICES": "-1"}).gpus == 0
    assert "share 2 GPUs" in str(place(found, 3).note)


def test_a_broken_driver_is_no_gpu(tmp_path: Path) -> None:
    assert find(None, None, _nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")).gpus == 0


def test_cores_follow_the_affinity_mask() -> None:
    every = os.sched_getaffinity(0)
    assert 1 <= hosts.count_cores() <= len(every)
    try:
        os.sched_setaffinity(0, {min(every)})
        assert hosts.count_cores() == 1
    finally:
        os.sched_setaffinity(0, every)


def test_more_ranks_than_slots_names_both() -> None:
    given_hosts = Allocation("given", "-H a:2,b:1", parse_hosts("a:2,b:1"))
    with pytest.raises(UsageError, match=r"5 ranks are more than the 3 slots of -H a:2,b:1"):
        place(given_hosts, 5)
    job = Allocation("slurm", "the Slurm job 12", parse_hosts("n1:2"))
    with pytest.raises(Unavailable, match=r"3 ranks .* 2 slots of the Slurm job 12"):
        place(job, 3)


def test_this_machine_may_be_oversubscribed_within_bounds() -> None:
    local = Allocation("local", "this machine", (Host("localhost", 2),), cores=2)
    assert place(local, 2) == hosts.Placement((Host("localhost", 2),))
    four = place(local, 4)
    assert four.oversubscribed
    assert four.note == "4 ranks share 2 cores: expect slow steps"
    with pytest.raises(Unavailable, match=r"17 ranks .* 2 cores: at most 16"):
        place(local, 17)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 48))
def test_ranks_fill_hosts_in_order(slots: list[int], ranks: int) -> None:
    allocation = Allocation("given", "x", tuple(Host(f"h{index}", count) for index, count in enumerate(slots)))
    if ranks > sum(slots):
        with pytest.raises(UsageError):
            place(allocation, ranks)
        return
    placed = place(allocation, ranks).hosts
    assert sum(host.slots for host in placed) == ranks
    assert [host.name for host in placed] == [f"h{index}" for index in range(len(placed))]
    assert all(host.slots == slots[index] for index, host in enumerate(placed[:-1]))
    assert 0 < placed[-1].slots <= slots[len(placed) - 1]


def test_local_names() -> None:
    assert hosts.is_local("localhost")
    assert hosts.is_local(os.uname().nodename)
    assert not hosts.is_local("n01.example")
    assert sys.platform == "linux"
