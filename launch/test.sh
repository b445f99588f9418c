#!/usr/bin/env bash
# Sets up what is missing, then runs the whole test suite. Arguments go to pytest, for example: -k checkpoint
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh"
cd "$root"

# Two files of tests at a time; in their order, as the long ones have few tests and must not come last.
# Ranks that wait leave the cores to the other file's.
export OMPI_MCA_mpi_yield_when_idle=1
# A rank that dies of a signal leaves its stacks.
export PYTHONFAULTHANDLER=1
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
