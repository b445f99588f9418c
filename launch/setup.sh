#!/usr/bin/env bash
# Makes .venv in this checkout, with Horovod and a parallel h5py built for the MPI and HDF5 of this machine.
# The one place that does set-up: quickstart.sh and test.sh call it. Run it again at any time: it goes on where it stopped, and
# returns at once when there is nothing to do.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$here")
state=$root/.setup
log=$state/setup.log
venv_python=$root/.venv/bin/python
# shellcheck source=launch/wheels.sh
source "$here/wheels.sh"

usage() {
    cat <<'TEXT'
Usage: bash launch/setup.sh [--cpu | --gpu] [--no-system] [--python PATH]

Makes .venv beside this folder: torch, mpi4py, Horovod and a parallel h5py, and this project itself.

  --cpu          build Horovod without CUDA
  --gpu          build Horovod with CUDA and NCCL
                 (default: as the last time; at first, --gpu when both nvcc and a working nvidia-smi are here)
  --no-system    never install system packages, also not as root; say what is missing instead
  --python PATH  the Python (>= 3.10) to make .venv from
  --help         this text

Environment:
  HARNESS_PIP_ARGS   extra arguments for every "pip install", for example to choose where torch comes from
                     (pip's own variables and configuration files work as well)
  HARNESS_WHEELHOUSE where the built wheels are kept (default: ~/.cache/harness/wheels)
  MPICC, HDF5_DIR    the MPI compiler and the parallel HDF5 to use, when not those on PATH
  HOROVOD_*          passed on to Horovod's build

Everything it does is logged in .setup/setup.log. "rm -rf .venv .setup" starts over.
TEXT
}

say() { printf '%s\n' "$*"; }

# ---- what is there ---------------------------------------------------------------------------------------------------

find_python() {
    local candidate
    for candidate in ${python_option:+"$python_option"} $(sed -n '1p' "$root/.venv/.made-from" 2>/dev/null) \
        python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3; do
        if "$candidate" - 2>/dev/null <<'PY'
import ensurepip, os, sys, sysconfig, venv
sys.exit(not (sys.version_info >= (3, 10) and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))))
PY
        then
            "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
            return
        fi
    done
    return 1
}

# find_hdf5: the folder of a parallel HDF5, from HDF5_DIR, h5pcc, or where Debian keeps it.
find_hdf5() {
    local folder h5pcc
    if [[ -n ${HDF5_DIR-} ]]; then
        parallel_hdf5 "$HDF5_DIR" && echo "$HDF5_DIR"
        return
    fi
    if h5pcc=$(command -v h5pcc); then
        for folder in "$("$h5pcc" -showconfig 2>/dev/null | sed -n 's/^ *Installation point: *//p')" \
            "$(dirname "$(dirname "$(realpath "$h5pcc")")")"; do
            parallel_hdf5 "$folder" && echo "$folder" && return
        done
    fi
    for folder in /usr/lib/*/hdf5/openmpi /usr/lib/*/hdf5/mpich; do
        parallel_hdf5 "$folder" && echo "$folder" && return
    done
    return 1
}

parallel_hdf5() { [[ -d $1/include ]] && grep -qsE '^#define H5_HAVE_PARALLEL 1' "$1"/include/H5pubconf*.h; }

find_cmake() {
    local version
    version=$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
    [[ -n $version ]] && printf '3.21\n%s\n' "$version" | sort -V -C
}

# missing_things: one line per missing thing, "what|apt|dnf|conda|module".
missing_things() {
    command -v g++ >/dev/null || say 'a C++ compiler (g++)|build-essential|gcc-c++|cxx-compiler|gcc'
    command -v make >/dev/null || say 'make|make|make|make|'
    find_cmake || say 'CMake 3.21 or newer|cmake|cmake|cmake|cmake'
    find_python >/dev/null ||
        say 'Python 3.10 or newer with venv and headers|python3-venv python3-dev|python3.11 python3.11-devel|python|python'
    command -v "${MPICC:-mpicc}" >/dev/null || say 'MPI (mpicc)|libopenmpi-dev openmpi-bin|openmpi-devel|openmpi-mpicxx|openmpi'
    find_hdf5 >/dev/null ||
        say 'HDF5 built for MPI (h5pcc, or HDF5_DIR)|libhdf5-openmpi-dev hdf5-tools|hdf5-openmpi-devel|hdf5=*=mpi_openmpi_*|hdf5-parallel'
}

column() { cut -d'|' -f"$1" | tr '\n' ' ' | sed 's/  */ /g; s/ $//'; }

report_missing() {
    say "Missing on this machine:"
    cut -d'|' -f1 <<<"$1" | sed 's/^/  - /'
    say "Any one of these brings them:"
    say "  apt:     sudo apt-get install $(column 2 <<<"$1")"
    say "  dnf:     sudo dnf install $(column 3 <<<"$1")"
    say "  conda:   conda install -c conda-forge $(column 4 <<<"$1")"
    say "  modules: module load $(column 5 <<<"$1")      (\"module avail\" shows your site's names)"
    say "Then run this again."
}

install_system_packages() {
    local packages
    read -r -a packages <<<"$1"
    export DEBIAN_FRONTEND=noninteractive
    # an earlier run may have been killed between unpacking and configuring
    $sudo dpkg --configure -a
    $sudo apt-get -o DPkg::Lock::Timeout=600 update
    $sudo apt-get -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "${packages[@]}"
}

# ---- steps -----------------------------------------------------------------------------------------------------------

# step TITLE COMMAND...: runs COMMAND with its output in the log; a failure ends the set-up with the log's last lines.
step() {
    local title=$1 began=$SECONDS status
    shift
    number=$((number + 1))
    printf '[%d/%d] %s ...' "$number" "$steps" "$title"
    printf '\n==== %s\n' "$title" >>"$log"
    set +e
    (
        set -e
        "$@"
    ) >>"$log" 2>&1 </dev/null
    status=$?
    set -e
    if ((status != 0)); then
        printf ' FAILED after %d s\n\n' $((SECONDS - began))
        tail -n 25 "$log" | sed 's/^/    /'
        say ""
        say "The whole log: $log"
        say "Nothing is lost: mend the cause and run the same command again."
        exit "$status"
    fi
    printf ' %d s\n' $((SECONDS - began))
}

make_venv() {
    local made="$python
$("$python" -VV)
$root"
    if [[ $(cat "$root/.venv/.made-from" 2>/dev/null) != "$made" ]]; then
        # half made, or made from another Python, or moved from elsewhere
        rm -rf "$state/old-venv"
        [[ ! -e $root/.venv ]] || mv "$root/.venv" "$state/old-venv"
        rm -rf "$state/old-venv"
        "$python" -m venv "$root/.venv"
        echo "$made" >"$root/.venv/.made-from"
    fi
}

requirements() {
    "$venv_python" - "$root/setup.cfg" <<'PY'
import configparser, re, sys
config = configparser.ConfigParser()
config.read(sys.argv[1])
lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
for line in (line.strip() for text in lists for line in text.splitlines()):
    name = re.match(r"[\w.-]*", line)[0].lower()
    if name and name not in ("horovod", "h5py", "harness"):
        print(line)
PY
}

install_packages() {
    local list
    requirements >"$state/requirements.txt"
    # the second line is what Horovod's and h5py's builds need beside them
    "$venv_python" -m pip install $pip_args -c "$here/constraints.txt" -r "$state/requirements.txt" \
        pip setuptools wheel packaging cffi cython pkgconfig
}

build_wheels() {
    local failed=0 h5py_job
    into_wheelhouse "$(h5py_folder)" build_h5py &
    h5py_job=$!
    into_wheelhouse "$(horovod_folder)" build_horovod || failed=1
    wait "$h5py_job" || failed=1
    return "$failed"
}

install_wheels() {
    "$venv_python" -m pip install --no-index --no-deps --force-reinstall --no-cache-dir \
        "$(horovod_folder)"/*.whl "$(h5py_folder)"/*.whl
    "$venv_python" -m pip install --no-index --no-deps --no-build-isolation -e "$root"
}

check_environment() {
    "$venv_python" -m pip check
    "$venv_python" - <<'PY'
from mpi4py import MPI
import h5py, torch
import horovod.torch as hvd
assert h5py.get_config().mpi, "h5py was built without MPI"
assert hvd.mpi_built() and hvd.gloo_built(), "Horovod lacks its MPI or its Gloo controller"
import harness, launch
print("torch", torch.__version__, "|", MPI.Get_library_version().split(",")[0], "| HDF5", h5py.version.hdf5_version)
PY
}

mpi_version() { { mpirun --version || mpiexec --version || mpichversion; } 2>/dev/null | head -n 2 | tr '\n' ' '; }
hdf5_version() { sed -n 's/^#define H5_VERSION "\(.*\)"/\1/p' "$1"/include/H5pubconf*.h | head -n 1; }

fingerprint() {
    {
        cat "$here/setup.sh" "$here/wheels.sh" "$here/horovod-cxx17.cmake" "$here/constraints.txt" "$root/setup.cfg"
        cat "$root/.venv/.made-from"
        "$venv_python" -VV
        mpi_version
        say "$mode"
    } 2>/dev/null | sha256sum | cut -d' ' -f1
}

main() {
    local missing number=0 steps=5 sudo=
    python_option='' mode='' system=yes
    while (($#)); do
        case $1 in
        --cpu | --gpu) mode=${1#--} ;;
        --no-system) system=no ;;
        --python) python_option=${2:?--python needs a path} && shift ;;
        --help | -h) usage && exit 0 ;;
        *) usage >&2 && exit 64 ;;
        esac
        shift
    done
    pip_args=${HARNESS_PIP_ARGS-}
    mode=cpu
    mkdir -p "$state"
    if [[ -e $state/stamp && $(cat "$state/stamp") == "$(fingerprint)" ]]; then
        return
    fi
    exec 9>"$state/lock"
    if ! flock -n 9; then
        say "Another set-up is at work in this folder; waiting for it."
        flock 9
    fi
    : >"$log"
    missing=$(missing_things)
    if [[ -n $missing ]]; then
        if [[ $system == no ]] || ! command -v apt-get >/dev/null || { ((EUID != 0)) && ! sudo -n true; }; then
            report_missing "$missing" >&2
            exit 69
        fi
        ((EUID == 0)) || sudo=sudo
        steps=6
        step "System packages: $(column 2 <<<"$missing")" install_system_packages "$(column 2 <<<"$missing")"
    fi
    python=$(find_python)
    hdf5_dir=$(find_hdf5)
    hdf5_version=$(hdf5_version "$hdf5_dir")
    mpi_version=$(mpi_version)
    step "Virtual environment .venv" make_venv
    step "torch, mpi4py and the other Python packages (1-5 min)" install_packages
    step "Horovod $horovod_version and parallel h5py $h5py_version (5-8 min the first time)" build_wheels
    step "Installing both, and harness" install_wheels
    step "Checking" check_environment
    fingerprint >"$state/stamp"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
