#!/bin/bash
# A run on one node:  sbatch slurm/single_node.sh CONFIG [key=value ...]
#SBATCH --job-name=harness
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
##SBATCH --partition=...
##SBATCH --account=...
##SBATCH --gpus-per-node=2

# module load openmpi hdf5/parallel; source .venv/bin/activate
# exec: the command becomes the batch shell, so it gets the signal before the time limit and its exit code is the job's
exec harness run "$@"
