#!/bin/bash
# A run on several nodes, its ranks started by srun:  sbatch slurm/many_nodes_srun.sh CONFIG [key=value ...]
# For sites whose `srun --mpi=list` names pmix. srun binds and accounts ranks; Slurm sees each of them.
#SBATCH --job-name=harness
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
##SBATCH --partition=...
##SBATCH --account=...

# module load openmpi hdf5/parallel; source .venv/bin/activate
exec harness run "$@" --launcher srun
