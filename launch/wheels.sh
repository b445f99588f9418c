# shellcheck shell=bash disable=SC2154  # its variables are set by setup.sh
# The packages that are built here: Horovod (for this torch and MPI), h5py (for this MPI and its HDF5), and mpi4py where its
# ready-made wheel does not fit the MPI. Sourced by setup.sh.
#
# The wheels live in a wheelhouse outside the checkout and never in pip's own cache: there a serial and a parallel h5py,
# or a Horovod for another torch, would look the same.

horovod_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
wheelhouse=${HARNESS_WHEELHOUSE:-${XDG_CACHE_HOME:-$HOME/.cache}/harness/wheels}

# pinned NAME: its version in constraints.txt
pinned() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$here/constraints.txt" | head -n 1; }
installed() { "$venv_python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1"; }
python_tag() { "$venv_python" -c 'import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_platform())'; }

# mpi_library: the full name and version of the MPI behind mpicc, from the library itself (the call needs no MPI_Init).
mpi_library() {
    local scratch status=0
    scratch=$(mktemp -d)
    cat >"$scratch/probe.c" <<'C'
#include <mpi.h>
#include <stdio.h>
int main(void) { char name[MPI_MAX_LIBRARY_VERSION_STRING]; int n; MPI_Get_library_version(name, &n); puts(name); return 0; }
C
    { "$mpicc" -o "$scratch/probe" "$scratch/probe.c" && "$scratch/probe"; } || status=$?
    rm -rf "$scratch"
    return "$status"
}

# ---- keys: a wheel is used again only where all of this is the same ---------------------------------------------------

# wheel_folder NAME FACT...: the folder in the wheelhouse for a wheel made under these facts
wheel_folder() {
    local name
    name=$1-$(pinned "$1")
    shift
    echo "$wheelhouse/$name-$(printf '%s\n' "$(python_tag)" "$(grep -sE '^(ID|VERSION_ID)=' /etc/os-release)" "$@" |
        sha256sum | cut -c1-12)"
}

horovod_folder() {
    wheel_folder horovod "torch $(installed torch)" "mpi $mpi" "$(horovod_settings)" "$(<"$here/horovod-cxx17.cmake")" \
        "$(env | grep -E '^HOROVOD_(WITH|BUILD|GPU|NCCL|CUDA|ROCM|CPU|CMAKE|DEBUG)' | sort)"
}

h5py_folder() { wheel_folder h5py "mpi4py $(installed mpi4py)" "mpi $mpi" "hdf5 $(hdf5_version "${hdf5%|*}") $hdf5"; }

mpi4py_folder() { wheel_folder mpi4py "mpi $mpi"; }

wheel_in() { compgen -G "$1/*.whl"; }

# into_wheelhouse FOLDER COMMAND...: COMMAND SCRATCH must leave a wheel in SCRATCH/wheel. It enters FOLDER by one rename, so
# whatever interrupts a build, nothing half made is ever taken for a wheel.
into_wheelhouse() {
    local folder=$1 scratch
    shift
    mkdir -p "$folder"
    exec 8>"$folder/.lock"
    flock 8 || echo "No file locks in $folder; going on without."
    if ! wheel_in "$folder"; then
        rm -rf "$folder"/.build.*
        scratch=$(mktemp -d "$folder/.build.XXXXXX")
        # TMPDIR: what a killed build leaves is then removed by the line above
        TMPDIR=$scratch "$@" "$scratch"
        mv "$scratch"/wheel/*.whl "$folder/"
        rm -rf "$scratch"
    fi
    exec 8>&-
}

# pip_wheel SCRATCH ARGUMENT...: a wheel of one package, from source, with what is in .venv
pip_wheel() {
    local scratch=$1
    shift
    "$venv_python" -m pip wheel -v "${pip_args[@]}" --no-deps --no-cache-dir --no-build-isolation -w "$scratch/wheel" "$@"
}

# ---- Horovod ---------------------------------------------------------------------------------------------------------

# check_horovod_source DIR: are these the sources that horovod-cxx17.cmake was written for?
check_horovod_source() {
    local file
    for file in CMakeLists.txt horovod/torch/CMakeLists.txt; do
        if ! grep -Eq '^[[:space:]]*set\(CMAKE_CXX_STANDARD 14\)' "$1/$file"; then
            echo "Horovod's sources have changed: $file does not set CMAKE_CXX_STANDARD to 14." >&2
            echo "launch/horovod-cxx17.cmake was written for sources that do; compare the two before building." >&2
            return 1
        fi
    done
}

# check_horovod_sdist FILE: is this the file that was looked at?
check_horovod_sdist() {
    local sum
    sum=$(sha256sum "$1" | cut -d' ' -f1)
    if [[ $sum != "$horovod_sha256" ]]; then
        echo "$(basename "$1") is not the file this set-up was written for: its SHA-256 is $sum, not $horovod_sha256." >&2
        return 1
    fi
}

# horovod_settings: NAME=VALUE lines for its build
horovod_settings() {
    printf '%s\n' HOROVOD_WITH_{PYTORCH,MPI,GLOO}=1 HOROVOD_WITHOUT_{TENSORFLOW,MXNET}=1
    if [[ $mode == gpu ]]; then
        printf '%s\n' HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED "HOROVOD_CUDA_HOME=$(find_cuda)"
        # without a list Horovod compiles its kernels for every GPU that nvcc knows
        echo "HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-$(gpu_architectures)}"
    fi
}

# gpu_architectures: of the GPUs here, as 80,90; those two where none is seen
gpu_architectures() {
    local found
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '.' | grep -E '^[0-9]+$' |
        sort -un | paste -sd, -) || true
    echo "${found:-80,90}"
}

build_horovod() {
    local scratch=$1 version source settings compiler jobs hide=
    compiler=$(command -v "$mpicc")
    version=$(pinned horovod)
    source=$scratch/horovod-$version
    "$venv_python" -m pip download "${pip_args[@]}" --no-deps --no-cache-dir --no-binary horovod --no-build-isolation \
        -d "$scratch" "horovod==$version"
    check_horovod_sdist "$source.tar.gz"
    tar -xzf "$source.tar.gz" -C "$scratch"
    check_horovod_source "$source"
    readarray -t settings < <(horovod_settings)
    if [[ $mode == gpu ]]; then
        settings+=("CUDA_HOME=$(find_cuda)" "HOROVOD_NCCL_HOME=${HOROVOD_NCCL_HOME:-$(nccl_home "$scratch")}")
    else
        # a CUDA torch turns Horovod's CUDA on wherever it finds a toolkit, and nothing but not finding it turns it off
        mkdir "$scratch/hide"
        cat >"$scratch/hide/sitecustomize.py" <<'PY'
import os, shutil
exists, which = os.path.exists, shutil.which
os.path.exists = lambda path: path != "/usr/local/cuda" and exists(path)
shutil.which = lambda name, *rest, **more: None if name == "nvcc" else which(name, *rest, **more)
PY
        hide=$scratch/hide
        unset CUDA_HOME CUDA_PATH
    fi
    # CMAKE_POLICY_VERSION_MINIMUM: CMake 4 refuses the oldest CMakeLists.txt in there without.
    # The three headers: since gcc 13 they no longer come along with others.
    # PATH: CMake takes the mpicxx beside the chosen mpicc.
    (
        export "${settings[@]}" PYTHONPATH="$hide" CMAKE_TOOLCHAIN_FILE="$here/horovod-cxx17.cmake"
        export CMAKE_POLICY_VERSION_MINIMUM=3.5 CMAKE_GENERATOR="Unix Makefiles"
        export CXXFLAGS="${CXXFLAGS-} -include stdexcept -include string -include cstdint"
        jobs=$(nproc)
        export MAKEFLAGS="-j$jobs" PATH="${compiler%/*}:$PATH"
        pip_wheel "$scratch" "$source"
    )
}

# nccl_home SCRATCH: torch's own NCCL in the layout that Horovod looks for (its wheel has no libnccl.so)
nccl_home() {
    local home=$root/.setup/nccl nccl
    nccl=$("$venv_python" -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])')
    rm -rf "$home"
    mkdir -p "$home/lib"
    ln -s "$nccl/include" "$home/include"
    ln -s "$nccl/lib/libnccl.so.2" "$home/lib/libnccl.so"
    echo "$home"
}

# ---- h5py and mpi4py -------------------------------------------------------------------------------------------------

build_h5py() {
    # HDF5_DIR: h5py takes either that or the two folders, which is what find_hdf5 made of it
    unset HDF5_DIR
    CC=$mpicc HDF5_MPI=ON HDF5_INCLUDEDIR=${hdf5%|*} HDF5_LIBDIR=${hdf5#*|} \
        pip_wheel "$1" --no-binary h5py "h5py==$(pinned h5py)"
}

build_mpi4py() { MPICC=$(command -v "$mpicc") pip_wheel "$1" --no-binary mpi4py "mpi4py==$(pinned mpi4py)"; }
