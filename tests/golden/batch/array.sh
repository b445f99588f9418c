#!/bin/bash
# Batch script of the run exp-7; submit with: sbatch THIS_FILE
#SBATCH --job-name=exp-7
#SBATCH --chdir=/w
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --output=runs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --array=0-1

# each task of the array has a run directory of its own
case "$SLURM_ARRAY_TASK_ID" in
  0) set -- runs/exp-7/optim.lr=1e-3 "$@" ;;
  1) set -- 'runs/a b;c' "$@" ;;
  *) echo "there is no task '$SLURM_ARRAY_TASK_ID' in this script: submit it with its --array" >&2; exit 64 ;;
esac
# exec: the command becomes the batch shell, so it gets the signal before the time limit and its exit code is the job's
exec /env/bin/harness run "$@"
