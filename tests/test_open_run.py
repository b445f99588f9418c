"""The run directory: made once, entered again, refused where it holds another run, sentences where it cannot be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from harness import rundir
from harness.config import FREE, MATHEMATICS, Config
from harness.errors import ConfigError, Exit, StorageError
from harness.frozen import compare, freeze, leaves
from harness.resolve import resolve
from harness.rundir import RunDir, find_frozen, open_run, write_json

LEAST = ["name=x", "task.name=linear", "train.steps=9", "train.global_batch=8"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> Config:
    return resolve(None, [*LEAST, *overrides]).config


def contents(run: RunDir) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(run.root.iterdir())}


def test_a_new_run_is_made_with_its_frozen_config():
    made = config("optim.lr=3e-4")
    run = open_run(made)
    assert str(run.root) == "runs/x"
    assert contents(run) == {"config.yaml": freeze(made)}
    assert resolve(run.root).config == made


def test_opening_again_changes_nothing():
    first = contents(open_run(config()))
    stamp = os.stat("runs/x/config.yaml").st_mtime_ns
    for again in (config(), resolve(Path("runs/x")).config):
        assert contents(open_run(again)) == first
    assert os.stat("runs/x/config.yaml").st_mtime_ns == stamp


def test_comments_in_an_equal_frozen_config_are_kept():
    run = open_run(config())
    run.config.write_text("# mine\n" + freeze(config()))
    open_run(config())
    assert run.config.read_text().startswith("# mine\n")


def test_a_start_that_must_be_the_first_one_is_refused_where_there_are_checkpoints_and_binds_no_later_one():
    run = open_run(config("checkpoint.resume=false"))
    assert resolve(run.root).config.checkpoint.resume, "the run's own restarts go on from what it saves"
    before = contents(run)
    (run.checkpoints / "step-00000004").mkdir(parents=True)
    for attempt in (open_run, lambda again: find_frozen(run, again)):
        with pytest.raises(ConfigError, match=r"already holds checkpoints(.|\n)*checkpoint\.resume=true"):
            attempt(config("checkpoint.resume=false"))
    run.checkpoints.joinpath("step-00000004").rmdir()
    run.checkpoints.rmdir()
    assert contents(run) == before


def test_free_fields_may_change_and_no_config_is_lost():
    run = open_run(config())
    second = config("train.steps=20", "launch.ranks=2")
    third = config("train.steps=30", "log.every=1")
    open_run(second)
    open_run(third)
    open_run(third)
    assert contents(run) == {
        "config.1.yaml": freeze(config()),
        "config.2.yaml": freeze(second),
        "config.yaml": freeze(third),
    }


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=1", "seed is 0 there and 1 here (seed=0 agrees)"),
        ("optim.lr=3e-4", "optim.lr is 0.001 there and 0.0003 here (optim.lr=0.001 agrees)"),
        ("train.global_batch=16", "train.global_batch is 8 there and 16 here (train.global_batch=8 agrees)"),
        ("optim.betas=[0.9,0.95]", "optim.betas is null there and [0.9, 0.95] here (optim.betas=null agrees)"),
        ("task.args.a=1", "task.args.a is not set there and 1 here (leave it out)"),
        ("task.args.x=2", "task.args.x is '1' there and 2 here"),
        ("task.args.x=null", "task.args.x is"),
        ("task.name=digits", "task.name is linear there and digits here (task.name=linear agrees)"),
        ("data.shuffle=false", "data.shuffle is true there and false here (data.shuffle=true agrees)"),
        ("horovod.op=sum", "horovod.op is average there and sum here"),
        ("schedule.warmup=1", "schedule.warmup is 0 there and 1 here"),
    ],
)
def test_another_mathematics_is_refused_with_what_to_do(override, told):
    there = ["task.args.x='1'"] if "task.args.x" in override else []
    run = open_run(config(*there))
    before = contents(run)
    with pytest.raises(ConfigError) as caught:
        open_run(config(*there, override))
    text = str(caught.value)
    assert text.startswith("runs/x holds a run that computes something else than this config:\n  ")
    assert told.replace("'1'", '"1"') in text
    assert text.endswith("choose another run_dir, or go on with that run's values")
    assert caught.value.code == Exit.CONFIG
    assert contents(run) == before


def test_every_difference_is_named():
    open_run(config())
    with pytest.raises(ConfigError) as caught:
        open_run(config("seed=1", "optim.lr=1", "task.args.a=1", "train.ema=0.5", "train.steps=10", "log.every=2"))
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == ["seed", "train.ema", "optim.lr", "task.args.a"]


@pytest.mark.parametrize(
    "there",
    [
        ["optim.betas=[0.9,0.95]"],
        ["task.args.text='a b $${env:HOME}'"],
        ['task.args.list=[1, {"a: b": "no"}, .inf]'],
        ["task.args.number='5'"],
        ["task.args.deep={a: {b: null}}"],
        ['task.args.quote="it\'s\\n\\""'],
        ["task.args.x=.nan"],
        ["schedule.name=cosine", "optim.eps=1e-08"],
    ],
)
def test_the_overrides_that_are_proposed_do_agree(there):
    """Given to a shell as they are printed."""
    open_run(config(*there))
    other = [f"{text.split('=')[0]}=null" if "args" in text else f"{text.split('=')[0]}=0.5" for text in there]
    other = [text.replace("betas=0.5", "betas=[0.5,0.5]").replace("name=0.5", "name=linear") for text in other]
    with pytest.raises(ConfigError) as caught:
        open_run(config(*other))
    found = str(caught.value).splitlines()[1:-1]
    proposed = [line[line.rindex(" here (") + 7 : -len(" agrees)")] for line in found if line.endswith(" agrees)")]
    assert proposed
    script = "import json, sys; print(json.dumps(sys.argv[1:]))"
    done = subprocess.run(
        f"{sys.executable} -c '{script}' " + " ".join(proposed), shell=True, capture_output=True, text=True, check=True
    )
    reset = [text for text in other if "deep" not in text]
    open_run(config(*reset, *json.loads(done.stdout)))


def test_nan_is_the_same_as_nan():
    run = open_run(config("task.args.x=.nan"))
    open_run(config("task.args.x=.nan"))
    assert list(contents(run)) == ["config.yaml"]


def test_an_empty_mapping_and_a_filled_one_differ_by_its_entries():
    some, none = config("task.args.a=1"), config()
    assert compare(some, none, under=["task"]) == ["task.args.a is 1 there and not set here (task.args.a=1 agrees)"]
    assert compare(none, some, under=["task"]) == ["task.args.a is not set there and 1 here (leave it out)"]
    assert compare(none, none, under=["task"]) == []


def test_each_leaf_is_either_mathematics_or_free():
    """Every leaf of the schema, changed one at a time."""
    base = config()
    changes = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 + 0.25, str: lambda v: f"{v}z"}
    seen = 0
    for path, value in leaves(base).items():
        if type(value) not in changes:
            continue
        values = base.model_dump()
        inner = values
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = changes[type(value)](value)
        changed = Config.model_construct(**values)  # choices are not checked: only comparison is
        for name, field in Config.model_fields.items():
            if isinstance(values[name], dict):
                changed.__dict__[name] = field.annotation.model_construct(**values[name])  # past the freezing
        dotted = ".".join(path)
        inside = any(dotted == root or dotted.startswith(f"{root}.") for root in MATHEMATICS) and dotted not in FREE
        assert bool(compare(base, changed, under=MATHEMATICS, but=FREE)) is inside, dotted
        seen += 1
    assert seen > 30


def test_a_moved_run_is_gone_on_with_where_it_is():
    os.rename(open_run(config()).root, "moved")
    again = resolve(Path("moved")).config
    run = open_run(again)
    assert str(run.root) == "moved" and not os.path.exists("runs/x")
    assert resolve(Path("moved")).config.directory == "moved"
    assert (run.root / "config.1.yaml").read_text() == freeze(config())


# --- directories that cannot be


def refused(*overrides: str) -> StorageError:
    with pytest.raises(StorageError) as caught:
        open_run(config(*overrides))
    assert caught.value.code == Exit.IO and "run_dir" in str(caught.value.hint)
    return caught.value


def test_a_file_in_the_way():
    Path("file").write_text("precious")
    assert "file is not a directory" in str(refused("run_dir=file"))
    assert "file is not a directory" in str(refused("run_dir=file/deep/er"))
    os.symlink("nowhere", "link")
    assert "link is not a directory" in str(refused("run_dir=link"))
    assert Path("file").read_text() == "precious"


def test_a_read_only_file_system():
    """/sys takes no directories, not even from root."""
    assert "/sys/run cannot be written (" in str(refused("run_dir=/sys/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory():
    os.mkdir("closed", 0o500)
    assert "cannot be written (Permission denied)" in str(refused("run_dir=closed/run"))
    assert "cannot be written (Permission denied)" in str(refused("run_dir=closed"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_loses_nothing(monkeypatch, number):
    run = open_run(config())
    before = contents(run)

    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(rundir.os, "fsync", full)
        assert "no space left for runs/x" in str(refused("train.steps=20"))
        assert "no space left for runs/y" in str(refused("name=y"))
    assert contents(run) == before, "something was lost or left behind"
    assert os.listdir("runs/y") == []
    open_run(config("name=y"))
    open_run(config("train.steps=20"))
    assert set(contents(run)) == {"config.1.yaml", "config.yaml"}


def test_a_kill_between_the_two_writes_loses_nothing(monkeypatch):
    run = open_run(config())
    wanted = config("train.steps=20")
    write = rundir.write_atomic

    def killed(path, text):
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rundir, "write_atomic", killed)
        open_run(wanted)
    assert contents(run) == {"config.1.yaml": freeze(config()), "config.yaml": freeze(config())}
    open_run(wanted)
    assert run.config.read_text() == freeze(wanted)


def test_a_frozen_config_that_was_damaged_is_told_with_its_line():
    run = open_run(config())
    run.config.write_text(run.config.read_text().replace("seed: 0", "seed: zero"))
    with pytest.raises(ConfigError, match=r"runs/x/config\.yaml:4: seed: 'zero' is not a whole number"):
        open_run(config())
    run.config.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"runs/x/config\.yaml:1: this is not text in UTF-8"):
        open_run(config())


def test_a_long_name_of_a_directory():
    with pytest.raises(StorageError, match="File name too long"):
        open_run(config(f"run_dir={'x' * 300}"))


def test_a_run_directory_that_holds_other_things_keeps_them():
    os.makedirs("mine/sub")
    Path("mine/notes.txt").write_text("mine")
    run = open_run(config("run_dir=mine"))
    assert sorted(path.name for path in run.root.iterdir()) == ["config.yaml", "notes.txt", "sub"]


def test_importing_rundir_is_light():
    code = "import sys; import harness.rundir; print('pydantic' in sys.modules, 'ruamel.yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "False False", done.stderr


def test_a_mistake_found_before_the_first_step_does_not_bind_the_directory():
    run = open_run(config("task.name=mytsk:Net"))
    run.new_attempt()
    open_run(config("task.name=mytask:Net"))
    assert (run.root / "config.1.yaml").read_text() == freeze(config("task.name=mytsk:Net"))
    write_json(run.status, {"state": "failed", "step": 3})
    with pytest.raises(ConfigError, match="computes something else"):
        open_run(config("task.name=mytsk:Net"))
