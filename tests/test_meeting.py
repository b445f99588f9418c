"""Ranks of an elastic run meet: Horovod's own driver starts processes that only meet, late, never, or once more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from harness.errors import Unavailable
from harness.meeting import meet

WORKER = """
import os, sys, time
from pathlib import Path
from harness.meeting import meet

def told(what):
    host, rank, size = (os.environ[f"HOROVOD_{name}"] for name in ("HOSTNAME", "RANK", "SIZE"))
    with open("told", "a") as file:
        file.write(f"{what} {host} {rank}/{size}\\n")

plan = dict(word.split("=") for word in sys.argv[1:])
how = plan.get(os.environ["HOROVOD_HOSTNAME"]) or plan.get("rank" + os.environ["HOROVOD_RANK"], "")
if how == "dies":
    os._exit(137)
time.sleep(float(how or 0))
meet()
told("first")
while not Path("anew").exists():
    time.sleep(0.02)
if how == "0.1":
    os._exit(1)
meet(anew=True)
told("second")
while not Path("end").exists():
    time.sleep(0.02)
"""


class Hosts:
    """Those that there are now."""

    names = "abc"
    driver: Any = None

    def find_available_hosts_and_slots(self) -> dict[str, int]:
        return dict.fromkeys(self.names, 1)

    def has_seen(self, host: str) -> bool:
        return host in self.driver._host_manager.current_hosts.available_hosts


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """Start workers on the hosts a, b and c; the plan says of some that they come late, die, or die later (0.1)."""
    from horovod.runner.elastic.driver import ElasticDriver
    from horovod.runner.elastic.rendezvous import create_rendezvous_handler
    from horovod.runner.http.http_server import RendezvousServer

    started: list[tuple[Any, Any]] = []
    stop = threading.Event()

    def start(**plan: str) -> Hosts:
        hosts, rendezvous = Hosts(), RendezvousServer()
        hosts.driver = driver = ElasticDriver(rendezvous, hosts, 1, 8, timeout=60)
        driver.wait_for_available_slots(3)
        port = rendezvous.start(create_rendezvous_handler(driver))
        started.append((driver, rendezvous))

        def worker(slot: Any, events: Any) -> tuple[int, float]:
            names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
            env = {f"HOROVOD_{name.upper()}": str(getattr(slot, name)) for name in names}
            env |= {"HOROVOD_HOSTNAME": slot.hostname, "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1"}
            env |= {"HOROVOD_GLOO_RENDEZVOUS_PORT": str(port), "PYTHONPATH": str(ROOT), "http_proxy": "http://nowhere"}
            words = [f"{host}={how}" for host, how in plan.items()]
            process = subprocess.Popen([sys.executable, "-c", WORKER, *words], cwd=tmp_path, env=os.environ | env)
            while process.poll() is None:
                if stop.wait(0.02):
                    process.kill()
            return process.returncode, time.time()

        driver.start(3, worker)
        return hosts

    yield start
    (tmp_path / "end").touch()
    stop.set()
    for driver, _ in started:
        driver.stop()
        driver.get_results()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def told(folder: Path, what: str) -> list[str]:
    path = folder / "told"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(line.split(" ", 1)[1] for line in lines if line.startswith(what))


@pytest.mark.parametrize("late", ["rank0", "rank2"])
def test_all_come_one_of_them_late(world: Any, tmp_path: Path, late: str) -> None:
    """Later than the others have patience."""
    world(**{late: "4"})
    until(lambda: len(told(tmp_path, "first")) == 3)
    assert [line.split()[0] for line in told(tmp_path, "first")] == ["a", "b", "c"]
    assert sorted(line.split()[1] for line in told(tmp_path, "first")) == ["0/3", "1/3", "2/3"]


@pytest.mark.parametrize("dead", ["rank0", "rank2"])
def test_one_dies_before_it_has_come(world: Any, tmp_path: Path, dead: str) -> None:
    began = time.monotonic()
    world(**{dead: "dies"})
    until(lambda: len(told(tmp_path, "first")) == 2)
    assert sorted(line.split()[1] for line in told(tmp_path, "first")) == ["0/2", "1/2"]
    assert time.monotonic() - began < 60, "the others do not wait for it"


def test_one_is_lost_and_newcomers_come_of_which_one_dies(world: Any, tmp_path: Path) -> None:
    hosts = world(b="0.1", d="dies")
    until(lambda: len(told(tmp_path, "first")) == 3)
    hosts.names = "abcde"
    until(lambda: hosts.has_seen("d") and hosts.has_seen("e"))
    (tmp_path / "anew").touch()
    until(lambda: len(told(tmp_path, "second")) >= 2 and len(told(tmp_path, "first")) == 4)
    assert [line.split()[0] for line in told(tmp_path, "second") if line[0] in "ac"] == ["a", "c"]
    assert {line.split("/")[1] for line in told(tmp_path, "second") if line[0] in "ac"} == {"3"}


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "SIZE": "2",
        "GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "GLOO_RENDEZVOUS_PORT": "1",
    }.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    with pytest.raises(Unavailable, match=r"horovodrun does not answer at 127.0.0.1:1 \(ConnectionRefusedError"):
        meet()
