#!/bin/bash
# A run in a queue whose jobs others may take the nodes from:  sbatch slurm/preemptible.sh CONFIG [key=value ...]
# Sites differ in how long a job is warned, down to not at all: so a checkpoint every few minutes, and Slurm, or the run
# itself where it was warned, puts the job back into the queue.
#SBATCH --job-name=harness
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
##SBATCH --partition=preemptible
##SBATCH --account=...

# mpirun gives ranks 2 seconds from SIGTERM to the kill, whatever Slurm does; srun leaves that to Slurm (KillWait, 30)
export OMPI_MCA_odls_base_sigkill_timeout=20
# module load openmpi hdf5/parallel; source .venv/bin/activate
exec harness run "$@" checkpoint.interval=5m slurm.requeue=true
