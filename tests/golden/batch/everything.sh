#!/bin/bash
# Batch script of the run exp-7; submit with: sbatch THIS_FILE
#SBATCH --job-name=exp-7
#SBATCH --chdir=/home/me/work
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --time=01:00:00
#SBATCH --partition=gpu,long
#SBATCH --account=m123
#SBATCH --qos=normal
#SBATCH --constraint=a100&ib
#SBATCH --mem=64G
#SBATCH --signal=B:TERM@91
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --reservation=maint
#SBATCH --comment="a b #1"
#SBATCH --output=logs/%j.txt

module load openmpi/4.1.4
module load 'my module'
ulimit -n 4096
export X="$HOME/x"
# exec: the command becomes the batch shell, so it gets the signal before the time limit and its exit code is the job's
exec /env/bin/harness run configs/charlm.yaml train.steps=500
