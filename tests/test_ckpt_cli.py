"""`harness ckpt`: what it prints, for people and for programs, and what it says about mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT

from harness.checkpoint import Manager, Single, State, keep_all
from harness.checkpoint.lease import Lease
from harness.checkpoint.manifest import VERSION
from harness.checkpoint.names import make_name
from harness.checkpoint.store import check
from harness.units import show_size
from launch import ckpt_show, cli

SAVED_AT = 1_800_000_000.0


def save(directory: Path, step: int, value: float = 0.0, metrics: dict[str, float] | None = None) -> Path:
    saver = Manager(directory, Single(), keep=keep_all())
    arrays = {"w": np.full((120, 100), value), "n": np.array([1.5, float("nan")]), "ids": np.arange(5)}
    try:
        return saver.save(step, State(arrays=arrays, extra={"epoch": step // 100, "lr": 0.1}), metrics=metrics)
    finally:
        saver.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 100 to 400."""
    run = tmp_path_factory.mktemp("template") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", lambda: SAVED_AT)
        for step in (100, 200, 300, 400):
            save(run / "checkpoints", step, float(step), {"val/loss": 1 / step, "accuracy": step / 1000})
    shutil.rmtree(run / "checkpoints" / "lease", ignore_errors=True)
    return run


@pytest.fixture
def run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it in the working directory, two hours later; its path is `run`."""
    shutil.copytree(template, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ckpt_show.time, "time", lambda: SAVED_AT + 7_500)
    yield Path("run")


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.execute(["ckpt", *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


Ask = Callable[..., tuple[int, str, str]]


def asked_json(ask: Ask, *arguments: str, code: int = 0) -> Any:
    found, out, err = ask(*arguments, "--json")
    assert found == code, err
    return json.loads(out)


def lines(text: str) -> list[str]:
    return [re.sub(r" {2,}", "  ", line).strip() for line in text.splitlines()]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


# ls, latest


def test_ls(run: Path, ask: Ask) -> None:
    bytes_of = [size_of(run / "checkpoints" / make_name(step)) for step in (100, 200, 300, 400)]
    sizes, total = [show_size(count) for count in bytes_of], show_size(sum(bytes_of))
    assert ask("tag", "run@200", "paper")[0] == 0
    assert ask("rollback", "run@300")[0] == 0
    (run / "checkpoints" / make_name(100) / "damaged.json").write_text('{"message": "arrays/w is \\u001b[31mbad"}')
    (run / "checkpoints" / "step-00000500.tmp-1").mkdir()
    code, out, err = ask("ls", "run")
    assert (code, err) == (0, "")
    assert lines(out)[:-2] == [
        "step  age  size  ranks  tensors  metrics  tags  state",
        f"100  2 h 05 min ago  {sizes[0]}  1  3  accuracy 0.1, val/loss 0.01  damaged",
        f"200  2 h 05 min ago  {sizes[1]}  1  3  accuracy 0.2, val/loss 0.005  paper  good",
        f"300  2 h 05 min ago  {sizes[2]}  1  3  accuracy 0.3, val/loss 0.00333333  good",
        f"400  2 h 05 min ago  {sizes[3]}  1  3  accuracy 0.4, val/loss 0.0025  set aside",
    ]
    assert lines(out)[-2] == "step-00000100: arrays/w is \\x1b[31mbad"
    assert lines(out)[-1] == f"4 checkpoints, 2 good, {total} in run/checkpoints"
    assert "incomplete" in ask("ls", "run", "--all")[1]
    assert ask("ls", "run/checkpoints")[1] == ask("ls", "run")[1]


def test_ls_as_json(run: Path, ask: Ask) -> None:
    ask("tag", "run@200", "paper")
    found = asked_json(ask, "ls", "run")
    assert set(found) == {"directory", "in_use_by", "checkpoints"} and found["in_use_by"] is None
    assert found["directory"] == "run/checkpoints" and len(found["checkpoints"]) == 4
    path = run / "checkpoints" / make_name(200)
    assert found["checkpoints"][1] == {
        "path": str(path),
        "step": 200,
        "number": 1,
        "state": "good",
        "bytes": size_of(path),
        "created": SAVED_AT,
        "world": 1,
        "tensors": 3,
        "metrics": {"val/loss": 0.005, "accuracy": 0.2},
        "tags": ["paper"],
        "note": None,
    }


def test_numbers_that_json_lacks(tmp_path: Path, ask: Ask) -> None:
    save(tmp_path, 1, metrics={"a": float("nan"), "b": float("-inf")})
    assert asked_json(ask, "ls", str(tmp_path))["checkpoints"][0]["metrics"] == {"a": "nan", "b": "-inf"}
    assert "a nan, b -inf" in ask("ls", str(tmp_path))[1]


def test_latest(run: Path, ask: Ask) -> None:
    path = run / "checkpoints" / make_name(400)
    assert ask("latest", "run") == (0, f"{path}\n", "")
    assert asked_json(ask, "latest", "run") == {"path": str(path), "step": 400}
    assert ask("latest", "run", "--deep") == (0, f"{path}\n", "")
    damage(path)
    assert ask("latest", "run")[1] == f"{path}\n", "a quick look does not see it"
    code, out, err = ask("latest", "run", "--deep")
    assert (code, out) == (0, f"{run / 'checkpoints' / make_name(300)}\n")
    assert err == "step-00000400 is passed over: damaged: arrays/w\n"
    for step in (100, 200, 300):
        damage(run / "checkpoints" / make_name(step))
    code, out, err = ask("latest", "run", "--deep", "--json")
    assert (code, out) == (66, "") and err.endswith("error: no checkpoint in run/checkpoints is whole\n")


def damage(path: Path, name: str = "arrays/w") -> None:
    manifest = check(path)
    index = [leaf.name for leaf in manifest.layout.leaves].index(name)
    with open(path / "data.h5", "r+b") as file:
        file.seek(int(manifest.layout.starts[index]) + 50_000)
        file.write(b"\x01")


# inspect, verify, diff


def test_inspect(run: Path, ask: Ask) -> None:
    path = run / "checkpoints" / make_name(400)
    layout = check(path).layout
    at = {leaf.name: int(start) for leaf, start in zip(layout.leaves, layout.starts, strict=True)}
    code, out, _ = ask("inspect", "run@400")
    assert code == 0 and lines(out) == [
        "run/checkpoints/step-00000400",
        f"step 400, 2 h 05 min ago, by 1 rank, {show_size(layout.data_end)}",
        "metrics: accuracy 0.4, val/loss 0.0025",
        "state: arrays, extra",
        "name  shape  dtype  bytes  offset  placement",
        f"arrays/ids  [5]  int64  40  {at['arrays/ids']}  replicated",
        f"arrays/n  [2]  float64  16  {at['arrays/n']}  replicated",
        f"arrays/w  [120, 100]  float64  96000  {at['arrays/w']}  replicated",
        "3 tensors, 96.1 kB",
    ]
    code, out, _ = ask("inspect", "run", "/arrays/[nw]", "--stats")
    assert lines(out)[-4:] == [
        "name  shape  dtype  bytes  offset  placement  least  greatest  mean  nan  inf",
        f"arrays/n  [2]  float64  16  {at['arrays/n']}  replicated  1.5  1.5  1.5  1  0",
        f"arrays/w  [120, 100]  float64  96000  {at['arrays/w']}  replicated  400  400  400  0  0",
        "2 tensors, 96.0 kB",
    ]
    assert "and 2 more: choose by a pattern, or --limit 0" in ask("inspect", "run", "--limit", "1")[1]


def test_inspect_as_json(run: Path, ask: Ask) -> None:
    found = asked_json(ask, "inspect", "run@best:accuracy", "arrays/n", "--stats")
    assert found["step"] == 100 and found["state"] == ["arrays", "extra"] and found["metrics"]["accuracy"] == 0.1
    assert set(found) == {
        "path", "step", "uuid", "created", "world", "file_bytes", "block", "metrics", "info", "aliases", "state",
        "tensors",
    }  # fmt: skip
    (tensor,) = found["tensors"]
    assert tensor.pop("offset") > 0
    stats = {"least": 1.5, "greatest": 1.5, "mean": 1.5, "nan": 1, "infinite": 0}
    assert tensor == {"name": "arrays/n", "dtype": "float64", "shape": [2], "bytes": 16, "placement": "replicated",
                      "stats": stats}  # fmt: skip


def test_verify(run: Path, ask: Ask) -> None:
    code, out, err = ask("verify", "run", "-j", "2")
    assert (code, err) == (0, "")
    assert [re.sub(r", .*", "", line) for line in lines(out)] == [
        *(f"{make_name(step)}: good" for step in (400, 300, 200, 100)),
        "4 checkpoints",
    ]
    path = run / "checkpoints" / make_name(300)
    damage(path)
    code, out, _ = ask("verify", "run@300")
    assert (code, out) == (65, "step-00000300: damaged: arrays/w\n")
    found = asked_json(ask, "verify", "run", code=65)
    assert found["good"] is False
    assert [one["good"] for one in found["checkpoints"]] == [True, False, True, True]
    bad = found["checkpoints"][1]
    assert bad.pop("seconds") >= 0 and bad.pop("bytes") > 96000
    told = {"damaged": ["arrays/w"], "error": "damaged: arrays/w", "marked": False}
    assert bad == {"path": str(path), "good": False, **told}
    code, out, err = ask("verify", "run", "--mark")
    assert code == 65 and "4 checkpoints, 1 damaged" in out and "step-00000300 is marked" in err
    assert json.loads((path / "damaged.json").read_text()) == {"message": "damaged: arrays/w"}
    assert ask("verify", "run")[0] == 0, "those that are marked are out of use"
    code, out, err = ask("inspect", "run@300")
    assert (code, out) == (65, "") and "was found damaged" in err
    assert ask("inspect", str(path))[0] == 0, "its path can still be given"


def test_verify_a_manifest_that_is_damaged(run: Path, ask: Ask) -> None:
    (run / "checkpoints" / make_name(400) / "manifest.json").write_text("{}")
    code, out, _ = ask("verify", "run@400", "--mark")
    assert code == 65 and "manifest.json is damaged: it does not begin with a checksum" in out
    assert [one["state"] for one in asked_json(ask, "ls", "run")["checkpoints"]][-1] == "damaged"


def test_diff(run: Path, ask: Ask) -> None:
    code, out, _ = ask("diff", "run@100", "run@latest")
    assert code == 1 and lines(out) == [
        "A: step 100, run/checkpoints/step-00000100",
        "B: step 400, run/checkpoints/step-00000400",
        "tensor  what differs  A  B  elements  largest difference",
        "arrays/w  values  12000  300",
        "state  A  B",
        "extra/value/epoch  1  4",
        "different: 1 of 3 tensors, 1 in the state",
    ]
    assert ask("diff", "run", "run")[0::2] == (0, "")
    assert asked_json(ask, "diff", "run@100", "run@200", "--tol", "100", code=1) == {
        "equal": False,
        "a": {"path": "run/checkpoints/step-00000100", "step": 100},
        "b": {"path": "run/checkpoints/step-00000200", "step": 200},
        "tolerance": 100.0,
        "tensors": [],
        "state": [{"path": "extra/value/epoch", "a": 1, "b": 2}],
    }
    other = save(Path("other"), 100, 100.0)
    assert asked_json(ask, "diff", "run@100", str(other))["equal"] is True, "when and where it was saved does not count"


def test_diff_of_a_damaged_one(run: Path, ask: Ask) -> None:
    damage(run / "checkpoints" / make_name(100))
    code, out, err = ask("diff", "run@100", "run@200")
    assert (code, out) == (65, "") and "arrays/w is damaged" in err


# tag, untag, rollback, prune


def test_tags(run: Path, ask: Ask) -> None:
    assert ask("tag", "run@best:val/loss:max", "paper") == (0, "step-00000100 is tagged paper\n", "")
    code, _, err = ask("tag", "run", "paper")
    assert code == 64 and "the tag 'paper' belongs to step-00000100" in err
    assert asked_json(ask, "tag", "run", "paper", "--move")["path"] == "run/checkpoints/step-00000400"
    assert ask("latest", "run@paper")[0] == 64
    assert ask("untag", "run", "paper") == (0, "step-00000400 is tagged paper no more\n", "")
    code, out, err = ask("untag", "run", "paper")
    assert (code, out, err) == (66, "", "error: there is no tag 'paper' in run/checkpoints; there are no tags\n")
    code, _, err = ask("tag", "run", "1200")
    assert code == 64 and "has a meaning of its own" in err
    ask("tag", "run/checkpoints/step-00000200", "x")
    assert asked_json(ask, "untag", "run", "x") == {"tag": "x", "path": "run/checkpoints/step-00000200"}


def test_rollback(run: Path, ask: Ask) -> None:
    assert ask("rollback", "run@200") == (
        0, "the place to resume from is step-00000200\nset aside: step-00000300, step-00000400\n", "",
    )  # fmt: skip
    assert ask("latest", "run")[1] == "run/checkpoints/step-00000200\n"
    path = str((run / "checkpoints").resolve())
    assert asked_json(ask, "rollback", "run@300") == {
        "path": f"{path}/step-00000300", "set_aside": [], "brought_back": [f"{path}/step-00000300"],
    }  # fmt: skip
    assert ask("rollback", "run/checkpoints/step-00000400")[0] == 0
    assert ask("latest", "run")[1] == "run/checkpoints/step-00000400\n"
    code, out, err = ask("rollback", "run")
    assert (code, out) == (64, "") and "say which one to go back to, as in run@1200" in err


def test_nobody_goes_back_to_a_damaged_one(run: Path, ask: Ask) -> None:
    os.truncate(run / "checkpoints" / make_name(200) / "data.h5", 5)
    code, _, err = ask("rollback", "run@200")
    assert code == 65 and "has 5 bytes" in err and ask("latest", "run")[1].endswith("step-00000400\n")


def test_prune(run: Path, ask: Ask) -> None:
    ask("tag", "run@100", "paper")
    sizes = {step: size_of(run / "checkpoints" / make_name(step)) for step in (200, 300)}
    code, out, _ = ask("prune", "run", "--keep", "last 1", "--dry-run")
    assert code == 0 and lines(out) == [
        f"would remove step-00000200, {show_size(sizes[200])}",
        f"would remove step-00000300, {show_size(sizes[300])}",
        f"2 would go, {show_size(sum(sizes.values()))}; 2 stay",
    ]
    assert len(asked_json(ask, "ls", "run")["checkpoints"]) == 4
    found = asked_json(ask, "prune", "run", "--keep", "last 1 | best accuracy max | every 300")
    assert found == {
        "dry_run": False, "left": 3, "bytes": sizes[200],
        "removed": [{"path": "run/checkpoints/step-00000200", "bytes": sizes[200]}],
    }  # fmt: skip
    ask("rollback", "run@300")
    assert ask("prune", "run", "--keep", "last 1")[1] == "0 removed, 0 B; 3 stay\n", "set aside is not up for pruning"
    assert lines(ask("prune", "run", "--keep", "last 1", "--aside")[1])[-1].endswith("; 2 stay")
    assert [one["step"] for one in asked_json(ask, "ls", "run")["checkpoints"]] == [100, 300]
    Path("empty").mkdir()
    assert ask("prune", "empty", "--keep", "last 1")[0] == 66
    assert not any(Path("empty").iterdir()), "nor a lease"
    code, out, err = ask("prune", "run", "--keep", "lst 3")
    assert (code, out) == (64, "") and err.startswith("error: --keep: there is no rule 'lst'; did you mean `last`?")
    code, out, err = ask("prune", "run", "--keep", "best acuracy 1 max")
    assert (code, out) == (66, "") and "has a number for the metric 'acuracy'; there are" in err, "it would delete all"
    assert [one["step"] for one in asked_json(ask, "ls", "run")["checkpoints"]] == [100, 300]


HOLD = """
import sys
from harness.checkpoint.lease import Lease
lease = Lease.acquire(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


def test_nothing_changes_while_a_job_saves_there(run: Path, ask: Ask) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, "run/checkpoints"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdin and holder.stdout
    try:
        holder.stdout.readline()
        for words in (["rollback", "run@100"], ["prune", "run", "--keep", "last 1"]):
            code, out, err = ask(*words)
            assert (code, out) == (69, "")
            assert f"is in use by process {holder.pid} on " in err and "--force does it all the same" in err
        assert ask("prune", "run", "--keep", "last 1", "--dry-run")[0] == 0, "looking is free"
        assert ask("tag", "run@100", "paper")[0] == 0
        assert f"in use by process {holder.pid} on " in ask("ls", "run")[1]
        assert asked_json(ask, "ls", "run")["in_use_by"]["pid"] == holder.pid
        assert ask("rollback", "run@300", "--force")[0] == 0
    finally:
        holder.kill()
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()
    assert ask("rollback", "run@100")[0] == 0, "the holder is dead"
    Lease.acquire("run/checkpoints", wait=0).release()


# plan


def test_plan(run: Path, ask: Ask) -> None:
    code, out, _ = ask("plan", "run@100", "-n", "3", "--rank", "1")
    assert code == 0
    told = {line.partition("  ")[0]: line.partition("  ")[2] for line in lines(out)}
    assert set(told) == {
        "tensors", "ranks", "balance", "rank 1", "its ranges", "planning", "memory", "file system", "other ranks",
        "messages",
    }  # fmt: skip
    assert told["messages"].startswith("4 to rank 0, 6 from it, about ")
    assert told["file system"].startswith("rank 0: 10 opens, 8 names made or removed, 6 syncs, ")
    assert told["ranks"].startswith("3, each ") and told["tensors"].startswith("3, in a file of ")
    found = [asked_json(ask, "plan", "run@100", "-n", "3", "--rank", str(rank)) for rank in range(3)]
    layout = check(run / "checkpoints" / make_name(100)).layout
    assert sum(one["bytes"] for one in found) == layout.data_end - layout.data_start
    assert asked_json(ask, "plan", "run")["ranks"] == 1, "as many as saved it"
    many = asked_json(ask, "plan", "--tensors", "1000", "--ranks", "100", "--rank", "99")
    assert many["cost"]["root"]["sent"] == 297 and many["cost"]["other"]["names"] == 0
    assert many["tensors"] == 1000 and many["most"] - many["least"] <= many["block"]
    for words in ([], ["run", "--tensors", "3"]):
        code, out, err = ask("plan", *words)
        assert (code, out) == (64, "") and "one of them" in err
    code, _, err = ask("plan", "run", "--rank", "9")
    assert code == 64 and "rank 9 is not one of 1 ranks" in err


# Mistakes


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["ls", "nowhere"], 66, "error: there is no directory nowhere\n"),
        (["ls", "file"], 66, "error: there is no directory file\n"),
        (["ls", "run@100"], 64, "error: run@100 names one checkpoint; give the run: run/checkpoints\n"),
        (["ls", "fresh"], 66, "error: there are no checkpoints yet: fresh/checkpoints is not there\n"),
        (["latest", "fresh"], 66, "error: there are no checkpoints yet: fresh/checkpoints is not there\n"),
        (["latest", "empty"], 66, "error: no checkpoint in empty\n"),
        (["verify", "empty"], 66, "error: there are no checkpoints in empty\n"),
        (["prune", "empty", "--keep", "all"], 66, "error: there are no checkpoints in empty\n"),
        (
            ["inspect", "run@150"],
            66,
            "there is no checkpoint of step 150 in run/checkpoints; there are steps 400, 300",
        ),
        (["inspect", "run@papier"], 66, "error: there is no tag 'papier' in run/checkpoints; there are no tags\n"),
        (["inspect", "run@best:loss"], 66, "for the metric 'loss'; there are accuracy, val/loss\n"),
        (["inspect", "run", "arrays/W"], 66, "holds no tensor 'arrays/W'\n  similar: arrays/w, "),
        (["inspect", "run/checkpoints/step-00000100@3"], 64, "is one checkpoint, so there is nothing to choose"),
        (["diff", "run@100", "nowhere"], 66, "error: there is no directory nowhere\n"),
        (["diff", "run@100", "run@200", "--tol", "-1"], 64, "error: invalid value for '--tol'"),
        (["rollback", "run@"], 64, "error: 'run@' ends in an @"),
        (["tag", "run", "a/b"], 64, "error: 'a/b' cannot be a tag"),
        (["prune", "run"], 64, "error: missing option '--keep'"),
        (["nonsense"], 64, "error: no such command 'nonsense'"),
        (["ls", "run", "--nope"], 64, "error: no such option: --nope"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], code: int, match: str, run: Path, ask: Ask) -> None:
    Path("file").write_text("")
    for name in ("fresh", "empty"):
        Path(name).mkdir()
    Path("fresh/config.yaml").write_text("")
    found, out, err = ask(*words)
    assert (found, out) == (code, "") and match in err


def test_a_newer_version_is_refused(run: Path, ask: Ask) -> None:
    import xxhash

    place = run / "checkpoints" / make_name(400) / "manifest.json"
    rest = place.read_text().partition("\n")[2].replace(f'"version":{VERSION}', f'"version":{VERSION + 1}', 1)
    place.write_text(f'{{"checksum":"{xxhash.xxh3_128_hexdigest(rest.encode())}",\n{rest}')
    for text in ("latest run", "inspect run@400", "diff run@400 run@100", "inspect run@best:loss"):
        words = text.split()
        code, out, err = ask(*words)
        assert (code, out) == (65, "") and f"format version {VERSION + 1}" in err and "use a newer program" in err
    assert asked_json(ask, "ls", "run")["checkpoints"][-1]["state"] == "newer"
    assert asked_json(ask, "verify", "run", code=65)["checkpoints"][0]["damaged"] == []


def test_a_directory_that_cannot_be_read(run: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "run/checkpoints")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert ask("ls", "run") == (74, "", "error: run/checkpoints: Permission denied\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        for words in (["latest", "run"], ["inspect", "run@100"], ["verify", "run"], ["rollback", "run@100"]):
            assert ask(*words) == (74, "", "error: run/checkpoints: Permission denied\n")


def test_a_full_disk_is_told(run: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for words in (["tag", "run", "x"], ["rollback", "run@100"]):
        code, out, err = ask(*words)
        assert (code, out) == (74, "") and "No space left on device" in err


# The program


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "60", **options},
    )  # fmt: skip


def test_as_a_program(run: Path) -> None:
    done = program("ckpt", "ls", "run")
    assert (done.returncode, done.stderr) == (0, "") and "4 checkpoints, 4 good" in done.stdout
    assert len(done.stdout.splitlines()) == 6, "as wide as it needs, where nobody's terminal is narrow"
    done = program("ckpt", "inspect", "run@1")
    assert (done.returncode, done.stdout) == (66, "")
    assert done.stderr.startswith("error: there is no checkpoint of step 1 ")
    done = program("ckpt", "--help")
    assert done.returncode == 0
    for command in ("ls", "latest", "inspect", "verify", "diff", "tag", "untag", "rollback", "prune", "plan"):
        assert re.search(rf"│ {command} ", done.stdout), command


@pytest.mark.parametrize("words", [["ls", "run"], ["inspect", "run", "--stats"], ["verify", "run"], ["plan", "run"]])
def test_it_needs_neither_torch_nor_mpi_nor_hdf5(words: list[str], run: Path) -> None:
    code = (
        "import sys; from launch.cli import execute; assert execute(['ckpt', *sys.argv[1:]]) == 0; "
        "print([n for n in ('torch', 'mpi4py', 'h5py', 'horovod') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr == "[]\n"
