"""File systems by their mount, and what is left on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.check import storage
from launch.filesystem import FileSystem, describe, existing, find_mount

MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
server:/home /home nfs4 rw 0 0
10.0.0.1@o2ib:/fs /scratch lustre rw,flock 0 0
tmpfs /scratch/ram tmpfs rw 0 0
/dev/sdb1 /mnt/my\\040disk xfs rw 0 0
broken line
overlay /late overlay rw 0 0
tmpfs /late tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "mount"),
    [
        ("/", "ext4", "/"),
        ("/homework", "ext4", "/"),
        ("/home", "nfs4", "/home"),
        ("/home/me/runs", "nfs4", "/home"),
        ("/scratch/me", "lustre", "/scratch"),
        ("/scratch/ram/x", "tmpfs", "/scratch/ram"),
        ("/mnt/my disk/x", "xfs", "/mnt/my disk"),
        ("/late", "tmpfs", "/late"),
    ],
)
def test_longest_mount_counts(path: str, kind: str, mount: str) -> None:
    assert find_mount(path, MOUNTS) == (kind, mount)


def test_no_mounts() -> None:
    assert find_mount("/x", "") == ("unknown", "/")


def test_a_folder_that_will_be_made(tmp_path: Path) -> None:
    found = describe(tmp_path / "not" / "yet")
    assert found.writable
    assert found.free > 0
    assert existing(tmp_path / "not" / "yet") == tmp_path
    assert describe(Path("/proc")).kind == "proc"


@pytest.mark.parametrize(
    ("kind", "free", "inodes", "writable", "states"),
    [
        ("ext4", 10**11, 10**6, True, ["ok", "ok"]),
        ("lustre", 10**14, None, True, ["ok", "ok"]),
        ("nfs4", 10**11, 10**6, True, ["warn", "ok"]),
        ("tmpfs", 10**11, 10**6, True, ["warn", "ok"]),
        ("ext4", 10**8, 10**6, True, ["ok", "warn"]),
        ("ext4", 10**11, 10, True, ["ok", "warn"]),
        ("ext4", 10**11, 10**6, False, ["FAIL", "ok"]),
    ],
)
def test_findings(kind: str, free: int, inodes: int | None, writable: bool, states: list[str]) -> None:
    found = list(storage(Path("runs/x"), FileSystem(kind, "/m", free, inodes, writable)))
    assert [finding.state for finding in found] == states
    assert all(finding.fix for finding in found if finding.state != "ok")
