#!/usr/bin/env bash
# From a bare machine to a training run on two ranks. Arguments go to "harness run", for example: optim.lr=1e-3 -n 4
# To choose how things are set up, run launch/setup.sh first; "bash launch/setup.sh --help" tells what there is to choose.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/setup.sh"
cd "$root"

run_dir=runs/quickstart-$(date +%Y%m%d-%H%M%S)
.venv/bin/harness run configs/quickstart.yaml "run_dir=$run_dir" -n 2 "$@"
