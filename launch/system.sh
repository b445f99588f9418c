# shellcheck shell=bash disable=SC2154  # its variables are set by setup.sh
# What this machine has, what it lacks, and how to get that. Sourced by setup.sh.

mpicc=${MPICC:-mpicc}

# suitable_python COMMAND: 3.10 or newer, able to make a virtual environment and to compile extensions.
suitable_python() {
    "$1" - 2>/dev/null <<'PY'
import ensurepip, os, sys, sysconfig, venv
sys.exit(not (sys.version_info >= (3, 10) and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))))
PY
}

# real_python COMMAND: the program behind links, shims and virtual environments
real_python() { "$1" -c 'import os, sys; print(os.path.realpath(sys.executable))'; }

# find_python: prints the Python for .venv: the one asked for; else the one .venv has; else the first on PATH that will do.
find_python() {
    local candidate made_from=
    [[ ! -e $root/.venv/.made-from ]] || read -r made_from <"$root/.venv/.made-from"
    for candidate in "${python_option:-$made_from}" python3 python3.{14,13,12,11,10} /usr/bin/python3; do
        if [[ -n $candidate ]] && suitable_python "$candidate"; then
            real_python "$candidate"
            return
        fi
    done
    return 1
}

# find_hdf5: prints "INCLUDE|LIB", the folders of a parallel HDF5: from HDF5_DIR, else h5pcc, else where Debian keeps them.
find_hdf5() {
    local flag folder include='' lib=''
    if [[ -n ${HDF5_DIR-} ]]; then
        for lib in "$HDF5_DIR/lib" "$HDF5_DIR/lib64"; do
            hdf5_pair "$HDF5_DIR/include" "$lib" && return
        done
        return 1
    fi
    # h5pcc -show prints its compiler's command line; the folders may also be in the wrapped compiler's own paths
    for flag in $(h5pcc -show 2>/dev/null); do
        case $flag in
        -I*) [[ ! -e ${flag#-I}/H5pubconf.h ]] || include=${flag#-I} ;;
        -L*) ! compgen -G "${flag#-L}/libhdf5.so*" >/dev/null || lib=${flag#-L} ;;
        esac
    done
    hdf5_pair "$include" "$lib" && return
    if folder=$(command -v h5pcc); then
        folder=$(dirname "$(dirname "$(realpath "$folder")")")
        for lib in "$folder/lib" "$folder/lib64"; do
            hdf5_pair "$folder/include" "$lib" && return
        done
    fi
    for lib in /usr/lib/*-linux-gnu/hdf5/"$(mpi_family)"; do
        hdf5_pair "$lib/include" "$lib" && return
    done
    return 1
}

# mpi_family: openmpi or mpich, as packages name the HDF5 that goes with it
mpi_family() {
    case $("$mpicc" -show 2>/dev/null) in
    *mpich*) echo mpich ;;
    *) echo openmpi ;;
    esac
}

# hdf5_pair INCLUDE LIB: prints the pair when it is a parallel HDF5. (A serial one would build, and fail at the first write.)
hdf5_pair() {
    grep -qsE '^#define H5_HAVE_PARALLEL 1' "$1"/H5pubconf*.h && compgen -G "$2/libhdf5.so*" >/dev/null && echo "$1|$2"
}

hdf5_version() { sed -n 's/^#define H5_VERSION "\(.*\)"/\1/p' "$1"/H5pubconf*.h | head -n 1; }

find_cmake() {
    local version
    version=$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
    [[ -n $version ]] && printf '3.21\n%s\n' "$version" | sort -V -C
}

# mpi_version: what "mpirun --version" says, in one line; quick. (mpi_library, in wheels.sh, asks the library itself.)
mpi_version() { { mpirun --version || mpiexec --version || "$mpicc" -show; } 2>/dev/null | head -n 2 | tr '\n' ' ' || true; }

# find_cuda: prints the CUDA toolkit's folder. An nvcc on PATH can be a wrapper outside of it.
find_cuda() {
    local folder
    for folder in "${CUDA_HOME-}" "${CUDA_PATH-}" /usr/local/cuda "$(dirname "$(dirname "$(command -v nvcc || echo //)")")"; do
        [[ -n $folder && -x $folder/bin/nvcc && -e $folder/include/cuda_runtime.h ]] && echo "$folder" && return
    done
    return 1
}

has_gpu() { find_cuda >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# wrong_choices: one line per thing that the user chose and that cannot be used.
wrong_choices() {
    [[ -z $python_option ]] || suitable_python "$python_option" ||
        say "--python $python_option: no Python 3.10 or newer with the venv and ensurepip modules and its C headers."
    [[ -z ${MPICC-} ]] || command -v "$MPICC" >/dev/null ||
        say "MPICC=$MPICC: no such command."
    [[ -z ${HDF5_DIR-} ]] || find_hdf5 >/dev/null ||
        say "HDF5_DIR=$HDF5_DIR: no HDF5 built for MPI (include/H5pubconf.h with H5_HAVE_PARALLEL, and lib/libhdf5.so)."
    [[ $mode_option != gpu ]] || find_cuda >/dev/null ||
        say "--gpu: no CUDA toolkit here (nvcc and its headers); install it, or name its folder in CUDA_HOME."
}

# missing_things: one line per missing thing, "what|apt|dnf|conda|modules".
missing_things() {
    local family
    family=$(mpi_family)
    command -v g++ >/dev/null || say 'a C++ compiler (g++)|build-essential|gcc-c++|cxx-compiler|gcc'
    command -v make >/dev/null || say 'make|make|make|make|'
    find_cmake || say 'CMake 3.21 or newer (cmake)|cmake|cmake|cmake|cmake'
    [[ -n $python_option ]] || find_python >/dev/null ||
        say 'Python 3.10 or newer with venv and headers|python3-venv python3-dev|python3.11-devel|python|python'
    [[ -n ${MPICC-} ]] || { command -v mpicc && command -v mpicxx; } >/dev/null ||
        say 'MPI (mpicc, mpicxx)|libopenmpi-dev openmpi-bin|openmpi-devel|openmpi-mpicxx|openmpi'
    [[ -n ${HDF5_DIR-} ]] || find_hdf5 >/dev/null ||
        printf 'HDF5 built for MPI (h5pcc, or HDF5_DIR)|libhdf5-%s-dev hdf5-tools|hdf5-%s-devel|hdf5=*=mpi_%s*|hdf5-mpi\n' \
            "$family" "$family" "$family"
}

# column N LINES: the N-th fields, in one line
column() { cut -d'|' -f"$1" <<<"$2" | tr '\n' ' ' | sed 's/  */ /g; s/^ //; s/ $//'; }

report_missing() {
    local load='' conda
    [[ $1 != *openmpi-devel* ]] || load=' && module load mpi/openmpi-x86_64'
    conda=$(column 4 "$1" | sed "s/hdf5=[^ ]*/'&'/") # the shell must leave its stars alone
    say "Missing on this machine:"
    cut -d'|' -f1 <<<"$1" | sed 's/^/  - /'
    say "Any one of these lines brings what is missing:"
    say "  apt      sudo apt-get install $(column 2 "$1")"
    say "  dnf      sudo dnf install $(column 3 "$1")$load"
    say "  conda    conda install -c conda-forge $conda"
    say "  modules  module load $(column 5 "$1")    (\"module avail\" shows the names at your site)"
    say "Then run the same command again. A different MPI is as good, if HDF5 was built with that one."
}

# may_install: root, or sudo that works. A password is asked for only where it is likely to help.
may_install() {
    [[ $system == yes ]] && command -v apt-get >/dev/null || return 1
    ((EUID != 0)) || return 0
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null && return
    [[ -t 0 && " $(id -nG) " =~ \ (sudo|admin|wheel)\  ]] && say "sudo installs: $(column 2 "$1")" && sudo -v
}

# install_system_packages PACKAGE...: .setup/apt stands while apt is at work; where it is found, apt was interrupted.
install_system_packages() {
    local as_root=()
    ((EUID == 0)) || as_root=(sudo -n)
    as_root+=(env DEBIAN_FRONTEND=noninteractive)
    echo "$@" >"$state/apt"
    "${as_root[@]}" dpkg --configure -a
    "${as_root[@]}" apt-get -q -o DPkg::Lock::Timeout=600 update
    "${as_root[@]}" apt-get -q -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "$@"
    rm "$state/apt"
}
