#!/bin/bash
#SBATCH --job-name=books-6ca2b4
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --qos=long
#SBATCH --constraint=h100
#SBATCH --exclude=n7,n9
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/books/logs/job-%j.log

# books, bd3_scale at commit 0123456789ab; job.json in this folder has the details.

set -eo pipefail
module load cuda/12.8 nccl
export OMP_NUM_THREADS=12
export PYTHONSAFEPATH=1
export GLOO_SOCKET_IFNAME=ib0
export NCCL_SOCKET_IFNAME=ib0
export NCCL_DEBUG=WARN
export NOTE='two words'
exec /opt/bd3/bin/python -u /opt/bd3/supervise.py keep /shared/runs/books/slurm/job.json
