#!/bin/bash
#SBATCH --job-name=books-6ca2b4
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:12,singleton
#SBATCH --time=10:00
#SBATCH --signal=B:USR1@300
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/books/logs/job-%j.log

# books, bd3_scale at commit 0123456789ab; job.json in this folder has the details.

set -eo pipefail
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
exec /opt/bd3/bin/python -u /opt/bd3/supervise.py keep /shared/runs/books/slurm/job.json
