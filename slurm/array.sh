#!/bin/bash
# Runs that differ in one value, as one array:  sbatch slurm/array.sh CONFIG [key=value ...]
# At most two at a time (%2); each has its own run directory. `harness status runs/sweep` shows them all.
#SBATCH --job-name=harness
#SBATCH --array=0-2%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
##SBATCH --partition=...
##SBATCH --account=...

rates=(1e-2 3e-3 1e-3)
lr=${rates[$SLURM_ARRAY_TASK_ID]}

# module load openmpi hdf5/parallel; source .venv/bin/activate
exec harness run "$@" optim.lr="$lr" run_dir="runs/sweep/optim.lr=$lr"
