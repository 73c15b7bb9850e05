#!/usr/bin/env bash
# Evaluate on several nodes under Slurm: each task of an array runs a part of the episodes, against
# one or several policy servers, and whoever ends last puts the parts together.
#
#     export PYTHON=VENV/bin/python                     # of the simulator, see its setup.sh
#     sbatch --array=0-7 launch/slurm_evaluate.sh libero \
#         --server=ws://node1:8000,ws://node2:8000 --out=runs/libero_object --suite=object
#
# The servers run elsewhere (launch/serve.py --host=0.0.0.0), and --out must be on a disk that all
# nodes see. A task that Slurm queues again goes on where it was; one that failed is started again
# by its number: sbatch --array=3 with the same --array's size in SHARDS.
#SBATCH --job-name=vla-evaluate
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vla-evaluate-%A-%a.log
set -euo pipefail

if [ $# -lt 1 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "usage: sbatch --array=0-7 launch/slurm_evaluate.sh SIMULATOR --server=URI --out=DIR ..." >&2
    exit 2
fi
# Slurm runs a copy of this file, so the checkout is where sbatch was called, or as said.
cd "${VLA_CHECKOUT:-$SLURM_SUBMIT_DIR}"
rollout="eval_servers/$1/rollout.py"
shift
if [ ! -f "$rollout" ]; then
    echo "no $rollout in $PWD: name a simulator, such as libero, calvin, simpler or tabletop" >&2
    exit 2
fi
shard="$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}"
# A requeued task has rows already; one that is started by hand may have.
exec "${PYTHON:-python3}" "$rollout" --workers="${SLURM_CPUS_PER_TASK:-2}" --resume \
    --shard="$shard" "$@"
