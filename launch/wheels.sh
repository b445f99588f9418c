# shellcheck shell=bash
# The two packages that must be built here: Horovod (for this torch and this MPI) and h5py (for this parallel HDF5).
# Sourced by setup.sh, which sets: root, here, venv_python, mode, hdf5_dir, mpi_version, hdf5_version.
#
# The wheels live in a wheelhouse outside the checkout and never in pip's own cache: there a serial and a parallel h5py,
# or a Horovod for another torch, would look the same.

horovod_version=0.28.1
horovod_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
h5py_version=3.16.0

wheelhouse=${HARNESS_WHEELHOUSE:-${XDG_CACHE_HOME:-$HOME/.cache}/harness/wheels}

# Settings that make a difference to Horovod's build, as NAME=VALUE lines.
horovod_settings() {
    echo HOROVOD_WITH_PYTORCH=1
    echo HOROVOD_WITH_MPI=1
    echo HOROVOD_WITH_GLOO=1
    echo HOROVOD_WITHOUT_TENSORFLOW=1
    echo HOROVOD_WITHOUT_MXNET=1
}

# wheel_folder NAME LINE...: the wheelhouse folder for what the lines describe; the lines are kept beside the wheel.
wheel_folder() {
    local name=$1 hash
    shift
    hash=$(printf '%s\n' "$@" | sha256sum | cut -c1-12)
    printf '%s/%s-%s\n' "$wheelhouse" "$name" "$hash"
}

horovod_folder() {
    wheel_folder "horovod-$horovod_version" "$(python_tag)" "torch $(installed torch)" "mpi $mpi_version" \
        "$(horovod_settings)" "$(env | grep '^HOROVOD_' | sort || true)" "$(cat "$here/horovod-cxx17.cmake")"
}

h5py_folder() {
    wheel_folder "h5py-$h5py_version" "$(python_tag)" "mpi4py $(installed mpi4py)" "mpi $mpi_version" \
        "hdf5 $hdf5_version in $hdf5_dir"
}

python_tag() { "$venv_python" -c 'import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_platform())'; }
installed() { "$venv_python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1"; }

has_wheel() { compgen -G "$1/*.whl" >/dev/null; }

# check_horovod_source DIR: the sources must still ask for C++14 where horovod-cxx17.cmake expects it.
check_horovod_source() {
    local file
    for file in CMakeLists.txt horovod/torch/CMakeLists.txt; do
        if ! grep -Eq '^[[:space:]]*set\(CMAKE_CXX_STANDARD 14\)' "$1/$file"; then
            echo "Horovod's sources have changed: $file no longer sets CMAKE_CXX_STANDARD to 14." >&2
            echo "horovod-cxx17.cmake was written for version $horovod_version; look at both before building." >&2
            return 1
        fi
    done
}

# into_wheelhouse FOLDER COMMAND...: runs COMMAND with a scratch folder as its last argument; the wheel that appears there
# enters FOLDER by one rename, so that an interrupted build leaves nothing that looks like a wheel.
into_wheelhouse() {
    local folder=$1 scratch
    shift
    mkdir -p "$folder"
    exec 8>"$folder/.lock"
    flock 8 || echo "no file locks in $folder; going on without"
    if ! has_wheel "$folder"; then
        rm -rf "$folder"/.build.*
        scratch=$(mktemp -d "$folder/.build.XXXXXX")
        "$@" "$scratch"
        mv "$scratch"/wheel/*.whl "$folder/"
        rm -rf "$scratch"
    fi
    exec 8>&-
}

build_horovod() {
    local scratch=$1 sdist
    "$venv_python" -m pip download $pip_args --no-deps --no-cache-dir --no-binary horovod --no-build-isolation \
        -d "$scratch" "horovod==$horovod_version"
    sdist=$scratch/horovod-$horovod_version.tar.gz
    if ! echo "$horovod_sha256  $sdist" | sha256sum --check --status; then
        echo "horovod-$horovod_version.tar.gz is not the file this was made for: its SHA-256 is" >&2
        echo "$(sha256sum "$sdist" | cut -d' ' -f1), expected $horovod_sha256." >&2
        return 1
    fi
    tar -xzf "$sdist" -C "$scratch"
    check_horovod_source "$scratch/horovod-$horovod_version"
    env $(horovod_settings) \
        CMAKE_TOOLCHAIN_FILE="$here/horovod-cxx17.cmake" CMAKE_POLICY_VERSION_MINIMUM=3.5 CMAKE_GENERATOR="Unix Makefiles" \
        MAKEFLAGS="-j$(nproc)" CXXFLAGS="${CXXFLAGS-} -include stdexcept -include string -include cstdint" \
        "$venv_python" -m pip wheel -v --no-deps --no-index --no-cache-dir --no-build-isolation -w "$scratch/wheel" \
        "$scratch/horovod-$horovod_version"
}

build_h5py() {
    local scratch=$1
    env CC="${MPICC:-mpicc}" HDF5_MPI=ON HDF5_DIR="$hdf5_dir" \
        "$venv_python" -m pip wheel -v $pip_args --no-deps --no-cache-dir --no-binary h5py --no-build-isolation \
        -w "$scratch/wheel" "h5py==$h5py_version"
}
