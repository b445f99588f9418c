#!/bin/bash
# A run whose ranks horovodrun starts:  sbatch slurm/horovodrun.sh CONFIG [key=value ...]
# On several nodes horovodrun needs ssh between them without a password; srun and mpirun do not.
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

# module load openmpi hdf5/parallel; source .venv/bin/activate
exec harness run "$@" --launcher horovodrun
