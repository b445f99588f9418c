#!/bin/bash
# A run longer than the time limit:  sbatch slurm/requeue.sh CONFIG [key=value ...]
# Before the limit the state is saved and the job goes back into the queue, under the same number, until it has finished.
# Where your site does not allow that, use chain.sh.
#SBATCH --job-name=harness
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
##SBATCH --partition=...
##SBATCH --account=...

# module load openmpi hdf5/parallel; source .venv/bin/activate
exec harness run "$@" slurm.requeue=true
