#!/bin/bash
# A run as several jobs, one after the other:  bash slurm/chain.sh JOBS SCRIPT CONFIG [key=value ...]
#   bash slurm/chain.sh 3 slurm/many_nodes_srun.sh configs/digits.yaml
# Each goes on from the state that the one before has saved; those that find the run finished end at once.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,3s/^# //p' "$0" >&2
  exit 64
fi
jobs=$1 script=$2
shift 2

id=$(sbatch --parsable "$script" "$@")
echo "${id%%;*}"
for ((number = 1; number < jobs; number++)); do
  id=$(sbatch --parsable --dependency="afterany:${id%%;*}" "$script" "$@" --follow-up)
  echo "${id%%;*}"
done
