"""launch/setup.sh and what it sources: what is missing, the wheelhouse, interrupts, the quick second run.

Nothing is installed or built here: the scripts run in a copy of the checkout, on a PATH of their own, or are sourced so
that single functions can be called.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci/run"]
TOOLS = """
basename bash cat chmod cp cut date dirname env flock grep head id ls mkdir mktemp mv nproc paste printf readlink
realpath rm sed sha256sum sleep sort tail touch tr uname wc
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout with a space in its path; no .venv and no .setup."""
    copy = tmp_path / "a checkout"
    shutil.copytree(LAUNCH, copy / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", copy)
    (copy / ".setup").mkdir()
    return copy


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder for PATH with nothing but the core utilities."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS.split():
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def command(folder: Path, name: str, body: str) -> None:
    """Put an executable script into `folder`."""
    path = folder / name
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


def run(*argv: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command with these changes to the environment, its two outputs together."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MPICC", "HDF5_DIR") and not k.startswith("HOROVOD_")}
    return subprocess.run(
        argv, env=clean | changes, stdin=subprocess.DEVNULL, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=60
    )


def source(checkout: Path, script: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run shell code after the functions of setup.sh."""
    facts = 'python_option="" mode_option="" mode=cpu mpi=1 hdf5="/i|/l" job=""'
    preamble = f'source "{checkout}/launch/setup.sh"; {facts}\n'
    return run("bash", "-c", preamble + script, **changes)


def finish(checkout: Path) -> None:
    """Make the copy look like one whose set-up has ended well."""
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    (checkout / ".venv/.made-from").write_text(f"{sys.executable}\n")
    (checkout / ".setup/mode").write_text("cpu\n")
    assert source(checkout, 'fingerprint >"$state/stamp"').returncode == 0


# ---- the command line ------------------------------------------------------------------------------------------------


def test_help_names_every_option() -> None:
    shown = run("bash", LAUNCH / "setup.sh", "--help")
    assert shown.returncode == 0
    for option in ("--cpu", "--gpu", "--no-system", "--python", "HARNESS_PIP_ARGS", "HDF5_DIR", "MPICC"):
        assert option in shown.stdout


@pytest.mark.parametrize("arguments", [["--fast"], ["--python"], ["quickstart"]])
def test_wrong_usage(arguments: list[str]) -> None:
    shown = run("bash", LAUNCH / "setup.sh", *arguments)
    assert (shown.returncode, shown.stdout.splitlines()[0][:6]) == (64, "Usage:")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    beside_python = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = run(shellcheck, "--external-sources", script)
    assert checked.returncode == 0, checked.stdout


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_all_that_is_missing_is_listed_at_once(checkout: Path, bare: Path) -> None:
    shown = run("bash", checkout / "launch/setup.sh", "--no-system", PATH=str(bare))
    assert shown.returncode == 69, shown.stdout
    for thing in ("C++ compiler", "make", "CMake 3.21", "MPI (mpicc, mpicxx)"):
        assert f"  - {thing}" in shown.stdout.replace("a C++", "C++")
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert "apt-get install build-essential make cmake" in lines["apt"] and "libopenmpi-dev" in lines["apt"]
    assert "dnf install gcc-c++" in lines["dnf"] and lines["dnf"].endswith("module load mpi/openmpi-x86_64")
    assert "conda-forge cxx-compiler" in lines["conda"] and "openmpi" in lines["conda"]
    assert "module load gcc" in lines["modules"]


def test_conda_build_string_is_quoted_for_the_shell(checkout: Path) -> None:
    shown = source(checkout, "report_missing 'HDF5|libhdf5|hdf5|hdf5=*=mpi_openmpi*|hdf5-mpi'")
    assert "conda install -c conda-forge 'hdf5=*=mpi_openmpi*'" in shown.stdout


@pytest.mark.parametrize("version, good", [("3.20.9", False), ("3.21.0", True), ("4.1.2", True)])
def test_cmake_version(checkout: Path, bare: Path, version: str, good: bool) -> None:
    command(bare, "cmake", f"echo cmake version {version}")
    found = source(checkout, "find_cmake", PATH=str(bare))
    assert (found.returncode == 0) is good


def test_apt_is_asked_for_what_is_missing_and_only_where_allowed(checkout: Path, bare: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    command(bare, "apt-get", f'echo "apt-get $*" >>"{calls}"')
    command(bare, "dpkg", f'echo "dpkg $*" >>"{calls}"')
    command(bare, "sudo", 'shift; exec "$@"')
    command(bare, "true", "exit 0")
    run("bash", checkout / "launch/setup.sh", "--no-system", PATH=str(bare))
    assert not calls.exists()
    shown = run("bash", checkout / "launch/setup.sh", PATH=str(bare))
    assert shown.returncode == 69  # this apt-get brings nothing
    configure, update, install = calls.read_text().splitlines()
    assert (configure, update.split()[-1]) == ("dpkg --configure -a", "update")
    assert "install -y" in install and "libopenmpi-dev openmpi-bin" in install


def test_interrupted_apt_is_run_again(checkout: Path, bare: Path) -> None:
    command(bare, "apt-get", "exit 100")
    command(bare, "dpkg", "exit 0")
    command(bare, "sudo", 'shift; exec "$@"')
    command(bare, "true", "exit 0")
    shown = run("bash", checkout / "launch/setup.sh", PATH=str(bare))
    assert shown.returncode == 1 and "apt-get update" in shown.stdout
    assert (checkout / ".setup/apt").exists()
    again = source(checkout, "system=yes number=0 steps=0; missing_things() { :; }; require_system", PATH=str(bare))
    assert "finishing an interrupted installation ... FAILED" in again.stdout


# ---- HDF5 and Python -------------------------------------------------------------------------------------------------


def hdf5(folder: Path, parallel: bool = True, include: str = "include", lib: str = "lib") -> Path:
    (folder / include).mkdir(parents=True)
    (folder / lib).mkdir(parents=True)
    line = "#define H5_HAVE_PARALLEL 1" if parallel else "/* #undef H5_HAVE_PARALLEL */"
    (folder / include / "H5pubconf.h").write_text(f'{line}\n#define H5_VERSION "1.14.3"\n')
    (folder / lib / "libhdf5.so").touch()
    return folder


def test_serial_hdf5_is_refused(checkout: Path, tmp_path: Path) -> None:
    serial = hdf5(tmp_path / "serial", parallel=False)
    shown = run("bash", checkout / "launch/setup.sh", HDF5_DIR=str(serial))
    assert shown.returncode == 69
    assert f"HDF5_DIR={serial}: no HDF5 built for MPI" in shown.stdout


@pytest.mark.parametrize("lib", ["lib", "lib64"])
def test_hdf5_dir(checkout: Path, tmp_path: Path, lib: str) -> None:
    folder = hdf5(tmp_path / "h", lib=lib)
    found = source(checkout, 'find_hdf5; hdf5_version "$HDF5_DIR/include"', HDF5_DIR=str(folder))
    assert found.stdout.split() == [f"{folder}/include|{folder}/{lib}", "1.14.3"]


def test_hdf5_from_the_compiler_wrapper(checkout: Path, bare: Path, tmp_path: Path) -> None:
    folder = hdf5(tmp_path / "h", include="inc/mpi", lib="lib/mpi")
    command(bare, "h5pcc", f"echo mpicc -I/usr/include -I{folder}/inc/mpi -L/lib -L{folder}/lib/mpi libhdf5.a -lz")
    assert source(checkout, "find_hdf5", PATH=str(bare)).stdout == f"{folder}/inc/mpi|{folder}/lib/mpi\n"


def test_hdf5_beside_the_compiler_wrapper(checkout: Path, bare: Path, tmp_path: Path) -> None:
    folder = hdf5(tmp_path / "h")
    (folder / "bin").mkdir()
    command(folder / "bin", "h5pcc", "exit 1")
    found = source(checkout, "find_hdf5", PATH=f"{folder}/bin:{bare}")
    assert found.stdout == f"{folder}/include|{folder}/lib\n"


@pytest.mark.parametrize("family, flags", [("openmpi", "-lmpi"), ("mpich", "-I/usr/include/mpich -lmpich")])
def test_hdf5_asked_for_is_that_of_the_mpi(checkout: Path, bare: Path, family: str, flags: str) -> None:
    command(bare, "mpicc", f"echo gcc {flags}")
    command(bare, "mpicxx", "")
    listed = source(checkout, "find_hdf5() { return 1; }; missing_things", PATH=str(bare)).stdout.splitlines()[-1]
    assert listed.split("|")[1:4] == [
        f"libhdf5-{family}-dev hdf5-tools",
        f"hdf5-{family}-devel",
        f"hdf5=*=mpi_{family}*",
    ]


def test_python_that_will_not_do(checkout: Path, tmp_path: Path) -> None:
    command(tmp_path, "python3", "exit 1")
    shown = run("bash", checkout / "launch/setup.sh", "--python", tmp_path / "python3")
    assert shown.returncode == 69
    assert f"--python {tmp_path}/python3: no Python 3.10 or newer" in shown.stdout


def test_gpu_without_a_toolkit(checkout: Path) -> None:
    shown = source(checkout, "find_cuda() { return 1; }; mode_option=gpu; wrong_choices")
    assert shown.stdout.startswith("--gpu: no CUDA toolkit here")


# ---- Horovod's sources -----------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "horovod-0.28.1"
    (folder / "horovod/torch").mkdir(parents=True)
    (folder / "CMakeLists.txt").write_text("project(horovod CXX)\n\nset(CMAKE_CXX_STANDARD 14)\n")
    (folder / "horovod/torch/CMakeLists.txt").write_text("if(x)\n    set(CMAKE_CXX_STANDARD 14)\nendif()\n")
    return folder


def test_known_sources_pass(checkout: Path, sources: Path) -> None:
    assert source(checkout, f'check_horovod_source "{sources}"').returncode == 0


@pytest.mark.parametrize("file", ["CMakeLists.txt", "horovod/torch/CMakeLists.txt"])
def test_changed_sources_are_refused(checkout: Path, sources: Path, file: str) -> None:
    text = (sources / file).read_text()
    (sources / file).write_text(text.replace("14", "17"))
    checked = source(checkout, f'check_horovod_source "{sources}"')
    assert checked.returncode == 1
    assert f"Horovod's sources have changed: {file} does not set CMAKE_CXX_STANDARD to 14" in checked.stdout


def test_another_sdist_is_refused(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "horovod-0.28.1.tar.gz").write_bytes(b"not it")
    checked = source(checkout, f'check_horovod_sdist "{tmp_path}/horovod-0.28.1.tar.gz"')
    assert checked.returncode == 1
    assert "is not the file this set-up was written for" in checked.stdout


# ---- the wheelhouse --------------------------------------------------------------------------------------------------


def keys(checkout: Path, script: str = "", **changes: str) -> list[str]:
    """The two folders in the wheelhouse, with `script` changing the facts first."""
    facts = "python_tag() { echo cp311; }; installed() { echo $1 2.13.0; }; hdf5_version() { echo 1.10.8; }\n"
    return source(checkout, f"{facts}{script}\nhorovod_folder; h5py_folder", **changes).stdout.split()


@pytest.mark.parametrize(
    "script, horovod, h5py",
    [
        ("", False, False),
        ("installed() { echo $1 2.14.0; }", True, True),
        ("installed() { [[ $1 != torch ]] && echo $1 2.13.0; }", True, False),
        ("mpi='Open MPI v5.0.1'", True, True),
        ("python_tag() { echo cp312; }", True, True),
        ("hdf5_version() { echo 1.14.0; }", False, True),
        ("find_cuda() { echo /cuda; }; mode=gpu", True, False),
        ("export HOROVOD_WITHOUT_GLOO=1", True, False),
        ("export HOROVOD_TIMELINE=trace.json", False, False),  # means something at run time only
        ("echo 'set(X 1)' >>\"$here/horovod-cxx17.cmake\"", True, False),
    ],
)
def test_a_wheel_is_for_one_set_of_facts(checkout: Path, script: str, horovod: bool, h5py: bool) -> None:
    before, after = keys(checkout), keys(checkout, script)
    assert [x != y for x, y in zip(before, after, strict=True)] == [horovod, h5py]


def test_wheelhouse_can_be_chosen(checkout: Path, tmp_path: Path) -> None:
    for folder in keys(checkout, HARNESS_WHEELHOUSE=str(tmp_path / "wheels")):
        assert folder.startswith(f"{tmp_path}/wheels/h")
    for folder in keys(checkout, XDG_CACHE_HOME=str(tmp_path), HARNESS_WHEELHOUSE=""):
        assert folder.startswith(f"{tmp_path}/harness/wheels/h")


BUILD = 'build() { echo built >>"$1/../builds"; mkdir "$1/wheel"; touch "$1/wheel/x-1-py3.whl"; }\n'


def test_interrupted_build_leaves_no_wheel(checkout: Path, tmp_path: Path) -> None:
    house = tmp_path / "house"
    killed = 'build() { mkdir "$1/wheel"; touch "$1/wheel/x-1-py3.whl"; kill -9 $BASHPID; }\n'
    assert source(checkout, f'{killed} into_wheelhouse "{house}" build').returncode == -signal.SIGKILL
    assert list(house.glob(".build.*")) and not list(house.glob("*.whl"))
    assert source(checkout, f'{BUILD} into_wheelhouse "{house}" build').returncode == 0
    assert [path.name for path in house.glob("*.whl")] == ["x-1-py3.whl"]
    assert not list(house.glob(".build.*"))


def test_failed_build_fails(checkout: Path, tmp_path: Path) -> None:
    shown = source(checkout, f'build() {{ false; }}; into_wheelhouse "{tmp_path}/house" build; echo went on')
    assert shown.returncode != 0 and "went on" not in shown.stdout


def test_builds_at_the_same_time_become_one(checkout: Path, tmp_path: Path) -> None:
    slow = BUILD.replace("mkdir", "sleep 0.5; mkdir")
    script = f'{slow} for i in 1 2 3; do into_wheelhouse "{tmp_path}/house" build & done; wait'
    assert source(checkout, script).returncode == 0
    assert (tmp_path / "house/builds").read_text() == "built\n"


# ---- steps, interrupts, locks ----------------------------------------------------------------------------------------


def test_failed_step_says_what_to_do(checkout: Path) -> None:
    script = 'number=0 steps=3; fails() { echo "the reason"; false; echo "went on"; }; step "Breaking" "Mend it." fails'
    shown = source(checkout, script)
    assert shown.returncode == 1
    assert "[1/3] Breaking ... FAILED" in shown.stdout
    assert "    the reason\n" in shown.stdout and "went on" not in shown.stdout
    assert f"{checkout}/.setup/setup.log" in shown.stdout and "Mend it." in shown.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_ends_the_step_and_all_it_started(checkout: Path, tmp_path: Path, number: signal.Signals) -> None:
    pids = tmp_path / "pids"
    script = f"""source "{checkout}/launch/setup.sh"; number=0 steps=1 job=''; trap interrupted INT TERM HUP
    busy() {{ sleep 60 & echo $! >>"{pids}"; (echo $BASHPID >>"{pids}"; exec sleep 60); }}; step Busy Hint busy"""
    shell = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup it is ignored, and a shell keeps that
    )  # fmt: skip
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    shell.send_signal(number)
    out, _ = shell.communicate(timeout=60)
    assert shell.returncode == 130
    assert "the same command goes on from here" in out
    wait_until(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))


def test_second_setup_waits_for_the_first(checkout: Path) -> None:
    finish(checkout)
    stamp = checkout / ".setup/stamp"
    right = stamp.read_text()
    stamp.write_text("another state")
    with subprocess.Popen(["flock", checkout / ".setup/lock", "sleep", "60"], start_new_session=True) as first:
        wait_until(lambda: run("flock", "-n", checkout / ".setup/lock", "true").returncode != 0)
        second = subprocess.Popen(["bash", checkout / "launch/setup.sh"], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert "waiting for it" in second.stdout.readline()
        stamp.write_text(right)  # the first one ends well
        os.killpg(first.pid, signal.SIGTERM)
        out, _ = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, "")


def wait_until(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- the second run --------------------------------------------------------------------------------------------------


def test_second_run_is_quick_and_silent(checkout: Path) -> None:
    finish(checkout)
    began = time.monotonic()
    shown = run("bash", checkout / "launch/setup.sh")
    assert (shown.returncode, shown.stdout) == (0, "")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "change",
    [
        'echo "# x" >>"$here/constraints.txt"',
        'echo "# x" >>"$root/setup.cfg"',
        'echo "# x" >>"$here/wheels.sh"',
        'echo gpu >"$state/mode"',
        "mpi_version() { echo mpirun 9.9; }",
        "mpicc=/elsewhere/mpicc",
        'rm "$root/.venv/bin/python"',
        'rm "$root/.venv/.made-from"',
        "mode_option=gpu",
        "python_option=/elsewhere/python3",
    ],
)
def test_what_matters_undoes_the_quick_way(checkout: Path, change: str) -> None:
    finish(checkout)
    shown = source(checkout, f"is_ready && echo ready\n{change}\nis_ready || echo changed")
    assert shown.stdout.split() == ["ready", "changed"]


def test_quickstart_and_test_pass_their_arguments_on(checkout: Path) -> None:
    finish(checkout)
    command(checkout / ".venv/bin", "harness", 'printf "%s|" "$PWD" "$@"')
    shown = run("bash", checkout / "launch/quickstart.sh", "train.steps=5", "data.path=a b")
    where, *arguments = shown.stdout.splitlines()[0].split("|")
    assert where == str(checkout)
    assert arguments[:2] == ["run", "configs/quickstart.yaml"]
    assert re.fullmatch(r"run_dir=runs/quickstart-\d{8}-\d{6}", arguments[2])
    assert arguments[3:7] == ["-n", "2", "train.steps=5", "data.path=a b"]
    (checkout / ".venv/bin/python").unlink()
    command(checkout / ".venv/bin", "python", 'printf "%s|" "$PWD" "$@"')
    assert source(checkout, 'fingerprint >"$state/stamp"').returncode == 0
    shown = run("bash", checkout / "launch/test.sh", "-k", "a or b")
    assert shown.stdout == f"{checkout}|-m|pytest|-n|2|--dist|loadfile|--no-loadscope-reorder|-k|a or b|"


# ---- versions --------------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [requirement for requirement in found if requirement.name != "harness"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_each_requirement_is_pinned_inside_its_range(requirement: Requirement, python: str) -> None:
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    versions = [
        next(iter(pin.specifier)).version
        for pin in pins
        if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        and (pin.marker is None or pin.marker.evaluate(here))
    ]
    assert len(versions) == 1, f"{requirement.name} has {len(versions)} pins for Python {python}"
    assert requirement.specifier.contains(Version(versions[0]))
