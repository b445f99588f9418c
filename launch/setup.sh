#!/usr/bin/env bash
# Makes .venv in this checkout, with Horovod and a parallel h5py built for the MPI and the HDF5 of this machine.
# The one place that does set-up; quickstart.sh and test.sh call it. Run it at any time: it goes on where an earlier run
# stopped, and returns at once when there is nothing to do.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$here")
state=$root/.setup
log=$state/setup.log
venv_python=$root/.venv/bin/python

say() { printf '%s\n' "$*"; }

# shellcheck source-path=SCRIPTDIR source=system.sh
source "$here/system.sh"
# shellcheck source-path=SCRIPTDIR source=wheels.sh
source "$here/wheels.sh"

usage() {
    cat <<'TEXT'
Usage: bash launch/setup.sh [--cpu | --gpu] [--no-system] [--python PATH]

Makes .venv in this checkout: torch, mpi4py, Horovod, a parallel h5py, and this project itself. As root, or with sudo, it
first installs what is missing on Debian and Ubuntu; elsewhere it says what is missing and how to get it.

  --cpu          build Horovod without CUDA
  --gpu          build Horovod with CUDA and NCCL
                 (neither: as the last time; the first time, --gpu where a CUDA toolkit and a GPU are found)
  --no-system    do not install system packages
  --python PATH  the Python (3.10 or newer) to make .venv from
  --help         this text

Environment variables:
  MPICC, HDF5_DIR     the MPI compiler and the folder of the parallel HDF5, where those on PATH are not the right ones
  CUDA_HOME           the CUDA toolkit
  HARNESS_PIP_ARGS    more arguments for pip, for example to choose where torch comes from: on x86 the ordinary one brings
                      some GB of CUDA libraries (pip's own variables and configuration files count as well)
  HARNESS_WHEELHOUSE  where the wheels built here are kept (~/.cache/harness/wheels)
  HOROVOD_...         passed on to Horovod's build

Exit codes: 0 ready; 64 wrong usage; 69 something is missing; 1 a step failed (the log is .setup/setup.log).
The folders .venv and .setup belong to this script; "rm -rf .venv .setup" starts over.
TEXT
}

# ---- steps -----------------------------------------------------------------------------------------------------------

# step TITLE HINT COMMAND...: runs COMMAND with its output in the log. A failure ends the set-up with the log's last lines.
step() {
    local title="[$((++number))/$steps] $1" hint=$2 began=$SECONDS status=0 before columns
    shift 2
    columns=$(tput cols 2>/dev/null) || columns=80
    printf '\n==== %s\n' "$title" >>"$log"
    before=$(wc -l <"$log")
    printf '%s ...' "$title"
    set -m # a process group of its own, so that an interrupt ends all of it
    (
        set -e
        "$@"
    ) </dev/null >>"$log" 2>&1 &
    job=$!
    set +m
    while kill -0 "$job" 2>/dev/null; do
        [[ ! -t 1 ]] || printf '\r%.*s ... %d s' $((columns - 12)) "$title" $((SECONDS - began))
        sleep 0.2
    done
    wait "$job" || status=$?
    job=
    [[ ! -t 1 ]] || printf '\r%s ...' "$title"
    if ((status != 0)); then
        printf ' FAILED after %d s. The last lines of %s:\n\n' $((SECONDS - began)) "$log"
        tail -n "+$((before + 1))" "$log" | tail -n 25 | sed 's/^/    /'
        printf '\n%s\nWhat is done stays done: the same command goes on from this step.\n' "$hint"
        exit 1
    fi
    printf ' %d s\n' $((SECONDS - began))
}

interrupted() {
    trap '' INT TERM HUP
    if [[ -n $job ]]; then
        kill -TERM -- "-$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
    fi
    printf '\nInterrupted. What is done stays done: the same command goes on from here.\n'
    exit 130
}

# make_venv: .made-from is written last; a .venv without it, or with other content, is half made, made from another Python,
# or moved here from elsewhere.
make_venv() {
    local made_from
    made_from=$(printf '%s\n' "$python" "$("$python" -VV)" "$root")
    if [[ $(cat "$root/.venv/.made-from" 2>/dev/null) != "$made_from" ]]; then
        rm -rf "$root/.venv"
        "$python" -m venv "$root/.venv"
        echo "$made_from" >"$root/.venv/.made-from"
    fi
}

# requirements: all of setup.cfg's, but not the two that are built here
requirements() {
    "$venv_python" - "$root/setup.cfg" <<'PY'
import configparser, re, sys
config = configparser.ConfigParser()
config.read(sys.argv[1])
lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
for line in (line.strip() for text in lists for line in text.splitlines()):
    if line and not line.startswith("#") and re.match(r"[\w.-]+", line)[0] not in ("horovod", "h5py", "harness"):
        print(line)
PY
}

install_packages() {
    requirements >"$state/requirements.txt"
    # The last line is what the builds need. --no-compile: half a minute for .pyc files that are mostly never used; those of
    # the modules that are used are written by check_environment, which imports them.
    "$venv_python" -m pip install "${pip_args[@]}" --no-compile -c "$here/constraints.txt" -r "$state/requirements.txt" \
        pip setuptools wheel packaging cffi cython pkgconfig
}

# fit_mpi4py: its wheel brings no MPI and looks for one when it is imported. Where that is not the one behind mpicc, it is
# built for that one.
fit_mpi4py() {
    local loaded
    loaded=$("$venv_python" -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py.MPI import *
print(Get_library_version())') || echo "mpi4py's own wheel finds no MPI."
    [[ $loaded != "$mpi" ]] || return 0
    into_wheelhouse "$(mpi4py_folder)" build_mpi4py
    install_wheel "$(mpi4py_folder)"
}

# Both at once: h5py's build has one thread, Horovod's as many as there are cores.
build_wheels() {
    local h5py_build status=0
    into_wheelhouse "$(h5py_folder)" build_h5py &
    h5py_build=$!
    (
        set -e
        into_wheelhouse "$(horovod_folder)" build_horovod
    ) &
    wait $! || status=1
    wait "$h5py_build" || status=1
    return "$status"
}

# install_wheel FOLDER: unless it is what is installed already
install_wheel() {
    local wheel name
    wheel=$(wheel_in "$1")
    name=${wheel##*/}
    grep -qsF "/${1##*/}/" "$root"/.venv/lib/python*/site-packages/"${name%%-*}"-*.dist-info/direct_url.json ||
        "$venv_python" -m pip install --no-index --no-deps --no-cache-dir --force-reinstall "$wheel"
}

install_project() {
    install_wheel "$(horovod_folder)"
    install_wheel "$(h5py_folder)"
    "$venv_python" -m pip install --no-index --no-deps --no-build-isolation -e "$root"
}

check_environment() {
    "$venv_python" -m pip check
    "$venv_python" - "$mode" <<'PY'
import re, sys
import mpi4py
mpi4py.rc.initialize = False  # a login node may not start MPI
import torch
from mpi4py import MPI
import h5py
import horovod.torch as hvd
import hypothesis, jinja2, mypy, psutil, pydantic, pytest, rich.progress, ruamel.yaml, sklearn.datasets, typer, xxhash
import torch.utils.tensorboard
import harness, launch

libraries = set(re.findall(r"/\S*/libmpi(?:_cray|ch)?\.so\S*", open("/proc/self/maps").read()))
for good, complaint in (
    (h5py.get_config().mpi, "h5py was built without MPI"),
    (hvd.mpi_built(), "Horovod was built without its MPI controller"),
    (hvd.gloo_built(), "Horovod was built without its Gloo controller"),
    (sys.argv[1] == "cpu" or hvd.nccl_built(), "Horovod was built without NCCL"),
    (len(libraries) <= 1, f"more than one MPI in one process: {', '.join(sorted(libraries))}"),
):
    if not good:
        sys.exit(complaint)
print("torch", torch.__version__, "|", MPI.Get_library_version().split(",")[0], "| HDF5", h5py.version.hdf5_version)
PY
}

# ---- main ------------------------------------------------------------------------------------------------------------

# fingerprint: all that a finished set-up depends on
fingerprint() {
    {
        cat "$here"/{setup.sh,system.sh,wheels.sh,horovod-cxx17.cmake,constraints.txt} "$root/setup.cfg" \
            "$root/.venv/.made-from" "$state/mode"
        "$venv_python" -VV
        command -v "$mpicc"
        mpi_version
        say "${HDF5_DIR-}"
    } 2>/dev/null | sha256sum
}

parse() {
    python_option='' mode_option='' system=yes
    while (($#)); do
        case $1 in
        --cpu | --gpu) mode_option=${1#--} ;;
        --no-system) system=no ;;
        --python) python_option=${2-} && shift ;;
        --help) usage && exit 0 ;;
        *) usage >&2 && exit 64 ;;
        esac
        shift || { usage >&2 && exit 64; }
    done
}

# is_ready: the set-up is finished, and was made as it is asked for now
is_ready() {
    [[ -e $state/stamp && $(<"$state/stamp") == "$(fingerprint)" ]] || return 1
    [[ -z $mode_option || $mode_option == "$(<"$state/mode")" ]] || return 1
    [[ -z $python_option || $(real_python "$python_option" 2>/dev/null) == "$(head -n 1 "$root/.venv/.made-from")" ]]
}

require_system() {
    local wrong missing packages
    wrong=$(wrong_choices)
    missing=$(missing_things)
    if [[ -z $wrong && ( -n $missing || -e $state/apt ) ]] && may_install "$missing"; then
        read -r -a packages <<<"$(column 2 "$missing")"
        steps=$((steps + 1))
        step "System packages: ${packages[*]:-finishing an interrupted installation}" \
            "Is the package mirror of this machine reachable? \"sudo apt-get update\" tells." \
            install_system_packages "${packages[@]}"
        missing=$(missing_things)
    fi
    if [[ -n $wrong || -n $missing ]]; then
        [[ -z $wrong ]] || say "$wrong" >&2
        [[ -z $missing ]] || report_missing "$missing" >&2
        exit 69
    fi
}

choose_mode() {
    if [[ -n $mode_option ]]; then
        mode=$mode_option
    elif [[ -e $state/mode ]]; then
        mode=$(<"$state/mode")
    elif has_gpu; then
        mode=gpu
    else
        mode=cpu
    fi
    if [[ $mode == gpu ]] && ! "$venv_python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
        if [[ $mode_option == gpu ]]; then
            say "--gpu: the torch in .venv is a CPU build. Let pip find a CUDA build (HARNESS_PIP_ARGS), \"rm -rf .venv\", again." >&2
            exit 69
        fi
        say "      torch is a CPU build here, so Horovod is built without CUDA."
        mode=cpu
    fi
    [[ $mode == cpu ]] || say "      Horovod is built with CUDA and NCCL."
    echo "$mode" >"$state/mode"
}

main() {
    local began=$SECONDS number=0 steps=5 job='' python mode mpi hdf5 about
    parse "$@"
    if is_ready; then
        return
    fi
    # packages of a loaded environment module must not stand in for those of .venv
    unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
    export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    read -r -a pip_args <<<"${HARNESS_PIP_ARGS-}"

    mkdir -p "$state"
    # The steps inherit the lock: after a "kill -9" it is free when what was left running has ended.
    exec 9>"$state/lock"
    if ! flock -n 9; then
        say "Another set-up is at work in this checkout; waiting for it to end."
        flock 9 || true
        if is_ready; then
            return
        fi
    fi
    trap interrupted INT TERM HUP
    date >"$log"
    rm -f "$state/stamp"
    say "Setting up $root/.venv (details: .setup/setup.log)"

    require_system
    python=$(find_python)
    hdf5=$(find_hdf5)
    step "Virtual environment from $python" "Remove .venv and try again, or choose another Python with --python." make_venv
    step "torch and the other Python packages: 1-5 min" \
        "Does pip reach its package index from here? See HARNESS_PIP_ARGS in \"bash launch/setup.sh --help\"." install_packages
    mpi=$(mpi_library 2>>"$log") || mpi=$(mpi_version)
    choose_mode
    about='from the wheelhouse'
    { wheel_in "$(horovod_folder)" && wheel_in "$(h5py_folder)"; } >/dev/null || about='building, 5 min on 2 cores'
    step "Horovod $(pinned horovod) and parallel h5py $(pinned h5py): $about" \
        "Search the log for the first \"error\". A library or header that is missing may need \"module load\"." build_all
    step "Installing them and harness" "Is the disk full?" install_project
    step "Checking" "\"rm -rf .venv .setup\" starts over; wheels that are at fault are in $wheelhouse." check_environment
    fingerprint >"$state/stamp"
    say "Ready after $((SECONDS - began)) s."
}

build_all() {
    fit_mpi4py
    build_wheels
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
