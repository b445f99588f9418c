"""Configs: layers, origins, references to the environment, every kind of mistake, freezing, the JSON Schema."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from support import ROOT

from harness.config import FREE, MATHEMATICS, Config
from harness.errors import ConfigError, Exit, InputMissing
from harness.frozen import leaves
from harness.mistakes import OTHER_NAMES, explain, fields, is_free_form, section_of, suggest
from harness.references import escape, substitute
from harness.resolve import freeze, resolve, schema
from harness.yamlfile import Node, parse, read

LEAST = ["name=x", "task.name=linear", "train.steps=9", "train.global_batch=8"]
BASE = """\
name: x
task:
  name: linear
train:
  steps: 9
  global_batch: 8
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the working directory, which is empty; returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def to(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return to


def told(*args, **kwargs) -> list[str]:
    """The mistakes in a config, as lines."""
    with pytest.raises(ConfigError) as caught:
        resolve(*args, **kwargs)
    assert caught.value.code == Exit.CONFIG
    return [str(mistake) for mistake in caught.value.mistakes]


# --- values and overrides


def test_overrides_alone_make_a_config():
    config = resolve(None, [*LEAST, "optim.lr=3e-4", "optim.betas=[0.9,0.95]", "horovod.fusion=64MB"]).config
    assert (config.optim.lr, config.optim.betas, config.horovod.fusion) == (3e-4, (0.9, 0.95), 64_000_000)
    assert config.train.steps == 9


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("eval.stop=null", "eval.stop", None),
        ("run_dir=/a b/#1: x", "run_dir", "/a b/#1: x"),
        ("run_dir=*not an alias", "run_dir", "*not an alias"),
        ("run_dir='5'", "run_dir", "5"),
        ("run_dir=a=b", "run_dir", "a=b"),
        (" run_dir = x ", "run_dir", "x"),
        ("launch.hosts=a:2,b:2", "launch.hosts", "a:2,b:2"),
        ('slurm.setup=["module load x", "y: z"]', "slurm.setup", ["module load x", "y: z"]),
        ("task.args.deep.key=[1, {a: no}]", "task.args.deep.key", [1, {"a": "no"}]),
        ("task.args.nothing=null", "task.args.nothing", None),
        ("task.args.text=", "task.args.text", None),
        ("task={args: {x: 1}}", "task.args.x", 1),
        ("horovod.cycle_time=5ms", "horovod.cycle_time", 0.005),
        ("slurm.time=1:30:00", "slurm.time", 5400.0),
        ("data.shuffle=false", "data.shuffle", False),
        ("seed=0x10", "seed", 16),
        ("optim.lr=1", "optim.lr", 1.0),
        ("slurm.extra.exclusive=null", "slurm.extra.exclusive", None),
        ("eval.stop={patience: 2}", "eval.stop.patience", 2),
    ],
)
def test_an_override(override, path, value):
    resolved = resolve(None, [*LEAST, override])
    assert leaves(resolved.config)[tuple(path.split("."))] == value
    assert resolved.origins[path] == "command line"


def test_the_last_override_of_a_key_holds():
    assert resolve(None, [*LEAST, "seed=1", "seed=2"]).config.seed == 2


def test_null_takes_free_form_values_back_before_new_ones(write):
    file = write("a.yaml", BASE + "  \noptim: {args: {a: 1, b: 2}}\n")
    assert resolve(file, ["optim.args.a=3"]).config.optim.args == {"a": 3, "b": 2}
    assert resolve(file, ["optim.args=null", "optim.args.a=3"]).config.optim.args == {"a": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "'train.steps' is no override (write it as optim.lr=3e-4)"),
        ("=5", "'=5' is no override"),
        ("optim..lr=5", "is no override"),
        (".lr=5", "is no override"),
        ("optim.lr.=5", "is no override"),
        ("a." * 60 + "b=1", "is no override"),
        ("optim.betas=[0.9", "optim.betas: this is not YAML: expected ',' or ']'"),
        ("optim.betas={a: 1, a: 2}", "optim.betas: the key 'a' is here twice"),
        ("optim.betas=!!python/name:os.system", "optim.betas: '!!python/name:os.system' is not a list"),
        ("optim.bet=1", "unknown key optim.bet (did you mean optim.betas?)"),
        ("train.steps.x=5", "train.steps: a mapping is not a whole number"),
        ("train.steps=abc", "train.steps: 'abc' is not a whole number"),
        ("base=x.yaml", "base is a key of config files only"),
        ("name=\udcff", r"name: '\udcff' is not text in UTF-8"),
    ],
)
def test_a_bad_override(override, message):
    lines = told(None, [*LEAST, override])
    assert any(line.startswith("command line: ") and message in line for line in lines), lines


def test_every_bad_override_is_told():
    assert len(told(None, [*LEAST, "foo", "seed=a", "bar=1", "optim.lr=["])) == 4


def test_a_number_where_text_is_wanted_is_taken_as_it_was_written(write):
    file = write(
        "a.yaml", BASE + "launch: {env: {OMP_NUM_THREADS: 04, X: 1e3}}\nslurm: {memory: 0, extra: {a: 1.50, b: 7}}\n"
    )
    config = resolve(file, ["slurm.account=007"]).config
    assert config.launch.env == {"OMP_NUM_THREADS": "04", "X": "1e3"}
    assert (config.slurm.memory, config.slurm.account) == ("0", "007")
    assert config.slurm.extra == {"a": "1.50", "b": 7}


def test_true_and_null_are_no_text():
    lines = told(None, [*LEAST, "launch.env.A=true", "launch.env.B=null"])
    assert lines == [
        'command line: launch.env.A: true is not text (quote it: "true")',
        'command line: launch.env.B: null is not text (quote it: "null")',
    ]


# --- files: base, sites, run directories, and where values come from


def test_origins_of_every_leaf(write):
    write("base.yaml", "optim:\n  lr: 0.1\n  name: sgd\nseed: 3\n")
    file = write(
        "a.yaml",
        "base: base.yaml\n"
        + BASE
        + "optim:\n  lr: 0.2\n  weight_decay: null\ntask: null\n".replace("task: null\n", ""),
    )
    resolved = resolve(file, ["seed=4", "task.args.x={y: 1}"])
    origins = resolved.origins
    assert (resolved.config.optim.lr, origins["optim.lr"]) == (0.2, "a.yaml:9")
    assert (resolved.config.optim.name, origins["optim.name"]) == ("sgd", "base.yaml:3")
    assert (resolved.config.optim.weight_decay, origins["optim.weight_decay"]) == (0.0, "a.yaml:10")
    assert (resolved.config.seed, origins["seed"]) == (4, "command line")
    assert origins["task.args.x.y"] == "command line"
    assert origins["horovod.op"] == "default"
    assert set(origins) == {".".join(path) for path in leaves(resolved.config)}
    with pytest.raises(TypeError):
        origins["seed"] = "x"


def test_bases_are_relative_and_the_later_one_is_higher(write):
    write("lib/deep/one.yaml", "base: ../zero.yaml\nseed: 1\noptim: {lr: 1.0, eps: 1.0}\n")
    write("lib/zero.yaml", "seed: 0\nlog: {every: 77}\n")
    write("lib/two.yaml", "optim: {lr: 2.0}\n")
    file = write("configs/a.yaml", "base: [../lib/deep/one.yaml, ../lib/two.yaml]\n" + BASE)
    resolved = resolve(file)
    config = resolved.config
    assert (config.seed, config.optim.lr, config.optim.eps, config.log.every) == (1, 2.0, 1.0, 77)
    assert resolved.origins["log.every"] == "lib/zero.yaml:2"
    assert resolved.origins["optim.lr"] == "lib/two.yaml:1"


def test_the_same_base_twice_is_no_circle(write):
    write("common.yaml", "seed: 5\n")
    write("b.yaml", "base: common.yaml\n")
    write("c.yaml", "base: common.yaml\n")
    assert resolve(write("a.yaml", "base: [b.yaml, c.yaml]\n" + BASE)).config.seed == 5


def test_circles(write):
    write("b.yaml", "base: c.yaml\n")
    write("c.yaml", "\nbase: ./b.yaml\n")
    assert told(write("a.yaml", "base: b.yaml\n" + BASE)) == [
        "c.yaml:2: base goes in a circle: b.yaml -> c.yaml -> b.yaml"
    ]
    assert told(write("self.yaml", BASE + "base: self.yaml\n")) == [
        "self.yaml:7: base goes in a circle: self.yaml -> self.yaml"
    ]


def test_bases_that_cannot_be(write):
    bases = ["nowhere.yaml", "5", '""', "{a: b}", r'"x\0y"', '"${env:NOWHERE}/x.yaml"']
    lines = told(write("a.yaml", "base:\n" + "".join(f"- {base}\n" for base in bases) + BASE), environ={})
    assert [line.split(": ")[0] for line in lines] == [f"a.yaml:{number}" for number in range(2, 8)]
    assert lines[0] == "a.yaml:2: base: nowhere.yaml cannot be read: No such file or directory"
    assert all("base is the path of a config file, or a list of such paths" in line for line in lines[1:5])
    assert "NOWHERE is not set" in lines[-1]


def test_a_bomb_of_bases_is_refused_at_once(write):
    for level in range(30):
        write(f"{level}.yaml", f"base: [{', '.join([f'{level + 1}.yaml'] * 9)}]\n")
    write("30.yaml", "seed: 1\n")
    before = time.perf_counter()
    assert any("base leads to more than 50 files" in line for line in told(Path("0.yaml")))
    assert time.perf_counter() - before < 5


def test_mistakes_in_bases_have_their_own_file(write):
    write("base.yaml", "optim:\n  lrr: 1\n")
    write("torn.yaml", "a: [\n")
    assert told(write("a.yaml", "base: base.yaml\n" + BASE)) == [
        "base.yaml:2: unknown key optim.lrr (did you mean optim.lr?)"
    ]
    # what a file that cannot be read leaves out is no mistake of its own, a bad override is
    lines = told(write("b.yaml", "base: torn.yaml\n"), ["foo"])
    assert [line.split(": ")[0] for line in lines] == ["command line", "torn.yaml:2:1"]


def test_a_base_in_a_variable(write):
    write("there/b.yaml", "seed: 6\n")
    file = write("a.yaml", "base: ${env:WHERE}/b.yaml\n" + BASE)
    assert resolve(file, environ={"WHERE": "there"}).config.seed == 6


def test_sites_lie_between_base_and_file(write):
    write("base.yaml", "launch: {ranks: 1, threads: 1, bind: core}\n")
    write("runs/sites/here.yaml", "launch: {ranks: 2, threads: 2}\n")
    write("configs/sites/there.yaml", "launch: {threads: 3}\nbase: more.yaml\n")
    write("configs/sites/more.yaml", "launch: {interfaces: ib0, ranks: 9}\nslurm: {nodes: 3}\n")
    file = write("runs/a.yaml", "base: ../base.yaml\n" + BASE + "launch: {ranks: 4}\n")
    resolved = resolve(file, sites=["here", "there"])
    launch = resolved.config.launch
    assert (launch.ranks, launch.threads, launch.bind, launch.interfaces) == (4, 3, "core", "ib0")
    assert resolved.config.slurm.nodes == 3
    assert resolved.origins["launch.threads"] == "configs/sites/there.yaml:1"
    assert resolve(file, ["launch.threads=5"], sites=["configs/sites/there.yaml"]).config.launch.threads == 5


def test_a_site_that_is_not_there(write):
    write("configs/sites/here.yaml", "")
    file = write("a.yaml", BASE)
    with pytest.raises(InputMissing, match=r"no site 'nowhere' in sites or configs/sites\n  there are here") as caught:
        resolve(file, sites=["nowhere"])
    assert caught.value.code == Exit.NO_INPUT
    with pytest.raises(InputMissing, match=r"x/nowhere\.yaml cannot be read"):
        resolve(file, sites=["x/nowhere.yaml"])


def test_a_config_that_is_not_there(write):
    write("configs/charlm.yaml", BASE)
    for name in ("charlm", "charlm.yaml"):
        with pytest.raises(InputMissing, match=r"did you mean configs/charlm\.yaml\?") as caught:
            resolve(Path(name))
        assert caught.value.code == Exit.NO_INPUT
    with pytest.raises(InputMissing, match="there is no config file other"):
        resolve(Path("other"))
    with pytest.raises(InputMissing, match=r"configs is a directory without config\.yaml"):
        resolve(Path("configs"))


def test_a_run_directory_is_gone_on_with(write):
    write("configs/sites/new.yaml", "launch: {ranks: 6}\n")
    config = resolve(None, [*LEAST, "launch.ranks=2"]).config
    write("runs/x/config.yaml", freeze(config))
    assert resolve(Path("runs/x")).config == config
    resolved = resolve(Path("runs/x"), ["launch.threads=2"], sites=["configs/sites/new.yaml"])
    assert resolved.config.launch.ranks == 6, "the frozen config states every field: a site comes above it"
    assert resolved.config.launch.threads == 2
    assert resolved.config.directory == "runs/x"


def test_a_run_directory_that_was_moved_stays_its_own(write, monkeypatch):
    write("elsewhere/config.yaml", freeze(resolve(None, LEAST).config))
    resolved = resolve(Path("elsewhere"))
    assert (resolved.config.run_dir, resolved.origins["run_dir"]) == ("elsewhere", "elsewhere")
    assert resolve(Path("elsewhere"), ["run_dir=third"]).config.run_dir == "third"
    assert resolve(Path("elsewhere/config.yaml")).config.run_dir is None, "a file is only a file"


# --- ${env:...}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${env:A}", "one"),
        ("x/${env:A}/${env:B}", "x/one/2"),
        ("${env:NO:-fallback}", "fallback"),
        ("${env:EMPTY:-fallback}", "fallback"),
        ("${env:NO:-}", ""),
        ("${env:A:-x}", "one"),
        ("$${env:A}", "${env:A}"),
        ("$$${env:A}", "$${env:A}"),
        ("${HOME} $x $$ {env:A}", "${HOME} $x $$ {env:A}"),
        ("${env:NESTED}", "${env:A}"),  # what a variable holds is not looked into
    ],
)
def test_references(text, value):
    environ = {"A": "one", "B": "2", "EMPTY": "", "NESTED": "${env:A}"}
    assert substitute(text, environ) == value


@pytest.mark.parametrize(
    "text", ["${env:}", "${env:A", "${env:1A}", "${env:A B}", "${env:A-x}", "${env:A:-{}}", "${env:é}"]
)
def test_what_is_no_reference(text):
    with pytest.raises(ValueError, match="a reference that is not"):
        substitute(text, {"A": "x"})


@given(st.text("${}envA:-", max_size=30) | st.text(max_size=30))
def test_escaped_text_comes_back(text):
    assert substitute(escape(text), {}) == text


def test_values_from_the_environment(write):
    text = (
        BASE
        + 'launch:\n  ranks: ${env:N}\n  threads: "${env:T:-3}"\n  env: {X: "n${env:N}", Y: "${env:N}"}\n'
        + "run_dir: ${env:D:-null}\n"
    )
    resolved = resolve(write("a.yaml", text), environ={"N": "4"})
    launch = resolved.config.launch
    assert (launch.ranks, launch.threads, launch.env) == (4, 3, {"X": "n4", "Y": "4"})
    assert resolved.config.run_dir is None
    assert resolved.origins["launch.ranks"] == "a.yaml:8"


def test_unset_variables_are_told_once_with_all_else(write):
    file = write(
        "a.yaml", BASE + "launch:\n  ranks: ${env:NO}\n  env: {X: '${env:NO}'}\n  mpi_flags: ['${env:}']\nseed: x\n"
    )
    lines = told(file, environ={})
    assert len(lines) == 4
    assert (
        lines[0]
        == "a.yaml:8: launch.ranks: the environment variable NO is not set; ${env:NO:-...} would give a default"
    )
    assert lines[1].startswith("a.yaml:9: launch.env.X: the environment variable NO")
    assert lines[2].startswith("a.yaml:10: launch.mpi_flags.0: '${env:}' has a reference that is not")
    assert lines[3] == "a.yaml:11: seed: 'x' is not a whole number"


def test_a_value_that_is_overridden_needs_no_variable(write):
    file = write("a.yaml", BASE + "run_dir: ${env:NO}/x\n")
    assert resolve(file, ["run_dir=y"], environ={}).config.run_dir == "y"


def test_a_hostile_variable(write):
    file = write("a.yaml", BASE + "run_dir: ${env:V}\nlaunch: {threads: '${env:V}'}\n")
    assert len(told(file, environ={"V": "\udcff"})) == 2
    assert told(file, environ={"V": "[1, 2]"}) == ["a.yaml:8: launch.threads: '[1, 2]' is not a whole number"]
    long = told(file, environ={"V": "9" * 100_000})
    assert len(long[0]) < 200


# --- mistakes

KINDS = [
    # (YAML below BASE, message), one line each at least for every kind of error that the schema can give
    ("optim: {lrr: 1}", "unknown key optim.lrr (did you mean optim.lr?)"),
    ("lr: 1", "unknown key lr (did you mean optim.lr?)"),
    ("optim: {learning_rate: 1}", "unknown key optim.learning_rate (did you mean optim.lr?)"),
    ("optmi: {lr: 1}", "unknown key optmi (did you mean optim?)"),
    ("slurm: {op: sum}", "unknown key slurm.op (did you mean horovod.op?)"),
    ("eval: {stop: {patiense: 3}}", "unknown key eval.stop.patiense (did you mean eval.stop.patience?)"),
    ("qwertzuiop: 1", "unknown key qwertzuiop"),
    ("optim.lr: 1", "unknown key 'optim.lr' (write it as optim: {lr: ...})"),
    ("<<: {seed: 1}", "YAML 1.2 has no merge key << (use `base: other.yaml`)"),
    ("seed: abc", "seed: 'abc' is not a whole number"),
    ("seed: 1.5", "seed: 1.5 is not a whole number"),
    ("seed: 1e3", "seed: 1e3 is not a whole number (write 1000)"),
    ("seed: true", "seed: true is not a whole number"),
    ("seed: [1]", "seed: a list is not a whole number"),
    ("seed: -1", "seed: -1 is out of range, it must be at least 0"),
    ("seed: 9223372036854775808", "seed: 9223372036854775808 is out of range, it must be less than 9"),
    ("seed: 99999999999999999999999999", "seed: 99999999999999999999999999 is out of range, it must be less than 9"),
    ("data: {prefetch: 0}", "data.prefetch: 0 is out of range, it must be greater than 0"),
    ("schedule: {final: 1.5}", "schedule.final: 1.5 is out of range, it must be at most 1"),
    ("optim: {lr: .inf}", "optim.lr: .inf is not a finite number"),
    ("optim: {lr: .nan}", "optim.lr: .nan is not a finite number"),
    ("optim: {lr: '0.1'}", "optim.lr: '0.1' is not a number"),
    ("optim: {betas: 0.9}", "optim.betas: 0.9 is not a list (write [0.9])"),
    ("optim: {betas: [0.9]}", "optim.betas has too few values (1)"),
    ("optim: {betas: [0.1, 0.2, 0.3]}", "optim.betas has too many values, at most 2 are allowed"),
    ("optim: {betas: [0.9, 2]}", "optim.betas.1: 2 is out of range, it must be at most 1"),
    ("optim: {betas: ['0.9', 0.9]}", "optim.betas.0: '0.9' is not a number"),
    ("data: {shuffle: yes}", "data.shuffle: 'yes' is not true or false (write true)"),
    ("data: {shuffle: Off}", "data.shuffle: 'Off' is not true or false (write false)"),
    ("data: {shuffle: 1}", "data.shuffle: 1 is not true or false"),
    ("run_dir: true", 'run_dir: true is not text (quote it: "true")'),
    ("run_dir: [a]", "run_dir: a list is not text"),
    ("launch: {mpi_flags: --x}", "launch.mpi_flags: '--x' is not a list (write [--x])"),
    ("launch: {mpi_flags: [a, [b]]}", "launch.mpi_flags.1: a list is not text"),
    ("launch: {env: [a]}", "launch.env: a list is not a mapping of keys to values"),
    ("slurm: {extra: {x: [a]}}", "slurm.extra.x: a list is neither text nor a whole number"),
    ("schedule: cosine", "schedule is a section with keys of its own; 'cosine' is not (did you mean schedule.name?)"),
    ("data: [1]", "data is a section with keys of its own; a list is not"),
    ("eval: {stop: true}", "eval.stop is a section with keys of its own; true is not"),
    ("schedule: {name: cosin}", "schedule.name: 'cosin' is not one of constant, linear, cosine, step, inverse_sqrt ("),
    ("horovod: {op: avg}", "horovod.op: 'avg' is not one of average, sum, adasum (did you mean average?)"),
    ("schedule: {name: 5}", "schedule.name: 5 is not one of constant, linear, cosine, step, inverse_sqrt"),
    ("horovod: {fusion: 12 parsecs}", "horovod.fusion: '12 parsecs' is not a size; write it as 64MB or 8GiB"),
    ("horovod: {cycle_time: [1]}", "horovod.cycle_time: give a duration such as 30s, 10m or 2h"),
    ("schedule: {name: step}", "schedule: schedule step needs every: the number of steps between two reductions"),
    (
        "optim: {name: adamm}",
        "optim.name: 'adamm' is none of gd, sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw,"
        " nor of the form package.module:Class; did you mean adam?",
    ),
    ("optim: {name: Torch.optim}", "optim.name: 'Torch.optim' is none of"),
    ("optim: {name: 'torch.optim:'}", "optim.name: 'torch.optim:' is none of"),
    ("optim: {name: ':SGD'}", "optim.name: ':SGD' is none of"),
    ("launch: {hosts: 'a:1', hostfile: h}", "give launch.hosts or launch.hostfile, not both"),
]  # fmt: skip


@pytest.mark.parametrize(("yaml", "message"), KINDS, ids=[yaml for yaml, _ in KINDS])
def test_each_kind_of_mistake(write, yaml, message):
    lines = told(write("a.yaml", BASE + yaml + "\n"))
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"a.yaml:7: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BASE.replace("name: x", "name: a b", 1),
            "a.yaml:1: name: 'a b' does not fit: Name of the run: letters, digits",
        ),
        (BASE.replace("name: x", "name: ''", 1), "a.yaml:1: name: '' does not fit"),
        (BASE.replace("name: x", f"name: {'x' * 101}", 1), "a.yaml:1: name has too many characters, at most 100"),
        (BASE.replace("name: linear", "name: ''", 1), "a.yaml:3: task.name: '' is none of linear, "),
        (BASE.replace("name: x\n", "", 1), "a.yaml: name is missing: Name of the run"),
        (BASE.replace("  name: linear", "  args: {}", 1), "a.yaml:2: task.name is missing: A built-in task"),
        (
            BASE.replace("  global_batch: 8\n", ""),
            "a.yaml:4: train.global_batch is missing: Samples per optimizer step",
        ),
        (BASE.replace("steps: 9", "steps: null"), "a.yaml:4: train: give either steps or epochs"),
        (BASE + "  epochs: 2\n", "a.yaml:4: train: give either steps or epochs, not both"),
        (BASE.replace("task:\n  name: linear\n", ""), "a.yaml: task is missing: What is trained."),
    ],
)
def test_mistakes_in_what_must_be_there(write, text, message):
    lines = told(write("a.yaml", text))
    assert len(lines) == 1, lines
    assert lines[0].startswith(message)


def test_an_empty_file_lacks_everything_that_is_needed(write):
    assert [line.split(":")[1] for line in told(write("a.yaml", ""))] == [
        " name is missing",
        " task is missing",
        " train is missing",
    ]


def test_all_mistakes_at_once_in_order(write):
    """Also those that pydantic would look for only once the others are repaired."""
    write("base.yaml", "seed: -1\n")
    text = """\
base: base.yaml
name: x y
tsak: {name: linear}
train:
  steps: abc
  precision: fp23
schedule: {name: step}
horovod: {op: adasum, predivide: 2.0, stall_warn: ten}
launch: {ranks: "${env:NO}"}
"""
    lines = told(write("a.yaml", text), ["foo", "log.every=0"], environ={})
    assert [line.split(" ")[0] + " " + line.split(" ")[1] for line in lines] == [
        "a.yaml: task",
        "a.yaml:2: name:",
        "a.yaml:3: unknown",
        "a.yaml:4: train.global_batch",
        "a.yaml:5: train.steps:",
        "a.yaml:6: train.precision:",
        "a.yaml:7: schedule:",
        "a.yaml:8: horovod.stall_warn:",
        "a.yaml:8: horovod.predivide",
        "a.yaml:9: launch.ranks:",
        "base.yaml:1: seed:",
        "command line:",
        "command line:",
    ]


def test_a_section_keeps_its_line_when_the_command_line_adds_to_it(write):
    file = write("a.yaml", BASE.replace("  global_batch: 8\n", ""))
    assert told(file, ["train.micro_batch=2"])[0].startswith("a.yaml:4: train.global_batch is missing")


def test_thousands_of_mistakes_are_told_in_short_and_at_once(write):
    before = time.perf_counter()
    lines = told(write("a.yaml", BASE + "".join(f"kee{n}: 1\n" for n in range(9000))))
    assert time.perf_counter() - before < 10
    assert len(lines) == 101 and "9000 mistakes in all, of which 100 are told" in lines[0]


def test_every_error_kind_that_the_schema_can_give_has_its_own_sentence():
    """Random wrong values for random fields: no sentence may come from the fallback."""
    wrong = [
        None,
        True,
        0,
        -1,
        7,
        10**30,
        0.5,
        -2.5,
        float("inf"),
        float("nan"),
        "",
        "x" * 200,
        "a b",
        [],
        [1],
        ["x"],
        [[]],
    ]
    wrong += [[0.1] * 3, {}, {"a": []}, {"name": 5}, {"a": 1.5}]
    least = {"name": "x", "task": {"name": "linear"}, "train": {"steps": 1, "global_batch": 1}}
    seen = set()
    for path in fields():
        for value in wrong:
            values = copy.deepcopy(least)
            *sections, key = path.split(".")
            inner = values
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[key] = value
            try:
                Config.model_validate(values)
            except ValidationError as error:
                seen |= {found["type"] for found in error.errors()}
    from harness.mistakes import _SENTENCES

    assert len(seen) >= 14
    assert seen <= set(_SENTENCES), f"no sentence for {sorted(seen - set(_SENTENCES))}"


def test_an_error_kind_of_a_later_pydantic_has_a_sentence_too():
    tree = parse("optim:\n  lr: 5\n", "a.yaml")
    error = {"type": "brand_new", "loc": ("optim", "lr"), "msg": "Input should be nicer", "input": 5}
    assert [str(mistake) for mistake in explain([error], tree)] == [
        "a.yaml:2: optim.lr: 5 does not fit: input should be nicer"
    ]


@pytest.mark.parametrize("path", [path for path in fields() if len(path.rpartition(".")[2]) > 4])
def test_a_slip_of_the_finger_is_recognised(path):
    section, dot, key = path.rpartition(".")
    assert suggest(f"{section}{dot}{key[:2]}{key[3:]}") == path
    assert suggest(f"{section}{dot}{key[0]}{key[2]}{key[1]}{key[3:]}") == path


def test_a_key_in_the_wrong_section_is_recognised():
    assert suggest("optim.steps") == "train.steps"
    assert suggest("train.step") == "train.steps", "not watchdog.step"
    assert suggest("train.lr") == "optim.lr"
    assert suggest("tensorboard") == "log.tensorboard"
    assert suggest("xyz.global_batch") == "train.global_batch"


def test_names_of_other_tools_lead_to_keys_that_exist():
    assert set(OTHER_NAMES.values()) <= set(fields())
    assert not set(OTHER_NAMES) & set(fields())


# --- freezing

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    ["5", "no", "null", "${env:HOME}", "$${env:X:-${env:Y}}", "a: b", "#", "3e-4", "", "true", "\n"]
)
FREE_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
CONFIGS = st.fixed_dictionaries(
    {
        "name": NAMES,
        "seed": st.integers(0, 2**63 - 1),
        "run_dir": st.none() | TEXT,
        "task": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["linear", "a.b:C", "on:off", "µ:É"]),
                "args": st.dictionaries(TEXT, FREE_VALUES, max_size=4),
            }
        ),
        "train": st.fixed_dictionaries(
            {"epochs": POSITIVE, "global_batch": st.integers(1), "clip_norm": st.none() | POSITIVE}
        ),
        "optim": st.fixed_dictionaries(
            {"lr": POSITIVE, "betas": st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)), "args": st.just({})}
        ),
        "eval": st.fixed_dictionaries({"stop": st.none() | st.fixed_dictionaries({"min_delta": POSITIVE})}),
        "horovod": st.fixed_dictionaries(
            {"fusion": st.none() | st.integers(0, 2**40), "stall_warn": st.floats(0, 1e9)}
        ),
        "launch": st.fixed_dictionaries(
            {"env": st.dictionaries(TEXT, TEXT, max_size=3), "mpi_flags": st.lists(TEXT, max_size=3)}
        ),
        "slurm": st.fixed_dictionaries(
            {
                "extra": st.dictionaries(TEXT, st.none() | st.integers() | TEXT, max_size=3),
                "setup": st.lists(TEXT, max_size=2),
            }
        ),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_a_frozen_config_is_read_back_equal(tmp_path, values):
    config = Config.model_validate(values)
    file = tmp_path / "config.yaml"
    text = freeze(config)
    file.write_text(text, encoding="utf-8")
    again = resolve(file, environ={"HOME": "/nowhere"}).config
    assert again == config
    assert repr(again) == repr(config), "a type differs: 1 and 1.0 are equal"
    assert freeze(again) == text


def test_a_frozen_config_states_every_field_and_keeps_floats(write):
    config = resolve(
        None, [*LEAST, "optim.lr=3e-4", "optim.eps=1e-08", "horovod.cycle_time=1ms", "task.args.x=.inf"]
    ).config
    text = freeze(config)
    assert text.startswith("# The config of run x")
    file = write("config.yaml", text)
    stated = read(file)
    for path in fields():
        if section_of(fields()[path]) is None and not path.startswith(("eval.stop.", "parallel.outer.")):  # both unset
            node: Node | dict = stated
            for part in path.split("."):
                assert isinstance(node.value, dict) and part in node.value, path
                node = node.value[part]
    again = resolve(file).config
    assert (again.optim.lr, again.optim.eps, again.horovod.cycle_time) == (3e-4, 1e-8, 1e-3)
    assert again == config


def test_what_yaml_cannot_hold_is_not_frozen():
    values = {
        "name": "x",
        "task": {"name": "linear", "args": {"f": object()}},
        "train": {"steps": 1, "global_batch": 1},
    }
    with pytest.raises(ConfigError, match=r"task\.args\.f is a object, which a config file cannot hold"):
        freeze(Config.model_validate(values))


# --- the schema itself, and what it tells editors


@pytest.mark.parametrize("path", fields())
def test_every_field_is_described(path):
    field = fields()[path]
    section = section_of(field)
    text = field.description or (section.__doc__ if section else None)
    assert text and len(text) >= 10 and text.endswith((".", "`"))


@pytest.mark.parametrize("path", fields())
def test_null_means_the_default_everywhere(path):
    """`null` resets a field, so no field may take null for something else than its default."""
    field = fields()[path]
    if type(None) in get_args(field.annotation):
        assert field.default is None


def test_the_mathematics_are_named_by_keys_that_exist():
    assert set(MATHEMATICS) <= set(fields()) and set(FREE) <= set(fields())
    assert all(any(free.startswith(f"{root}.") for root in MATHEMATICS) for free in FREE)


def test_free_form_keys():
    assert [path for path in fields() if is_free_form(path)] == ["task.args", "optim.args", "launch.env", "slurm.extra"]


def resolved_field(made: dict, path: str) -> dict:
    field = made
    for part in path.split("."):
        references = [branch["$ref"] for branch in field.get("anyOf", []) if "$ref" in branch]
        if references:
            field = made["$defs"][references[0].rpartition("/")[2]]
        field = field["properties"][part]
    return field


def test_the_json_schema_describes_every_field():
    made = schema()
    assert made["$schema"].endswith("2020-12/schema")
    json.dumps(made, allow_nan=False)
    for path in fields():
        field = resolved_field(made, path)
        assert len(field["description"]) >= 10, path
        assert {"type": "null"} in field["anyOf"], path
    assert "base" in made["properties"]
    for section in (made, *made["$defs"].values()):
        assert "required" not in section and section["additionalProperties"] is False


def test_the_json_schema_allows_units_and_references():
    made = schema()
    for path in ("horovod.fusion", "horovod.cycle_time", "slurm.time"):
        assert any(branch.get("type") == ["number", "string"] for branch in resolved_field(made, path)["anyOf"])
    for path in ("train.steps", "optim.lr", "schedule.name", "launch.ranks"):
        patterns = [branch["pattern"] for branch in resolved_field(made, path)["anyOf"] if "pattern" in branch]
        assert any(re.search(pattern, "${env:RANKS:-4}") for pattern in patterns)
        assert not any(re.search(pattern, "${env:}") for pattern in patterns)
    assert resolved_field(made, "schedule.name")["anyOf"][0]["enum"] == [
        "constant",
        "linear",
        "cosine",
        "step",
        "inverse_sqrt",
    ]


# --- the configs that come with it


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_resolves(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    resolved = resolve(path.relative_to(ROOT))
    assert resolved.origins["task.name"].startswith("configs/")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sites").glob("*.yaml")), ids=lambda path: path.name)
def test_every_site_resolves(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    resolved = resolve(None, LEAST, sites=[path.stem], environ={"SBATCH_ACCOUNT": "12345"})
    assert any(origin.startswith(f"configs/sites/{path.name}:") for origin in resolved.origins.values())
    if "SBATCH_ACCOUNT" in path.read_text():
        assert resolved.config.slurm.account == "12345"
        assert resolve(None, LEAST, sites=[path.stem], environ={}).config.slurm.account is None
    slurm = resolved.config.slurm
    assert slurm.margin < slurm.time


def test_there_are_sites():
    assert {path.stem for path in (ROOT / "configs/sites").glob("*.yaml")} >= {"laptop", "slurm-cpu", "slurm-gpu"}


def test_reading_a_config_needs_no_torch_mpi_or_hdf5():
    code = (
        "import sys; import harness.resolve, harness.rundir\n"
        "print(sorted({'torch', 'numpy', 'mpi4py', 'h5py', 'horovod'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_sections_are_immutable():
    config = resolve(None, LEAST).config
    for section in (config, *(value for _, value in config if isinstance(value, BaseModel))):
        with pytest.raises(ValidationError):
            setattr(section, next(iter(type(section).model_fields)), None)
