#!/usr/bin/env bash
# Sets up what is missing, then runs the whole test suite. Arguments go to pytest, for example: -k checkpoint
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh"
cd "$root"

exec .venv/bin/python -m pytest "$@"
