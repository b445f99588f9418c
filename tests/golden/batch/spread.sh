#!/bin/bash
# Batch script of the run exp-7; submit with: sbatch THIS_FILE
#SBATCH --job-name=exp-7
#SBATCH --chdir=/home/me/work
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=3
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue

# exec: the command becomes the batch shell, so it gets the signal before the time limit and its exit code is the job's
exec /env/bin/harness run configs/charlm.yaml train.steps=500
