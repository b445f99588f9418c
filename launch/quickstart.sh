#!/usr/bin/env bash
# From a bare machine to a training run on two ranks. Arguments go to "harness run", for example: optim.lr=1e-3 -n 4
# What there is to choose in the set-up is chosen by running launch/setup.sh first; see "bash launch/setup.sh --help".
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh"
cd "$root"

run_dir=runs/quickstart-$(date +%Y%m%d-%H%M%S)
.venv/bin/harness run configs/quickstart.yaml "run_dir=$run_dir" -n 2 "$@" # when it fails, it has said why
echo
echo "Try next:  .venv/bin/harness run configs/digits.yaml -n 2     (your own task in 20 lines: README.md)"
