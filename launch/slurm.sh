#!/usr/bin/env bash
# Train on GPU nodes under Slurm, one process a node with all of its GPUs:
#
#     sbatch --nodes=2 launch/slurm.sh --config=configs/kosmos_ph.py --workdir=runs/kosmos_ph
#
# The workdir must be on a disk that all nodes see. Two minutes before its time is up the job is
# told to stop: it saves, exits with 0 and is queued again, and goes on where it was. A node that
# fails takes the others down within a minute; the job is queued again too.
#SBATCH --job-name=vla
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vla-%j.log
set -euo pipefail

# Slurm runs a copy of this file, so the checkout is where sbatch was called, or as said.
cd "${VLA_CHECKOUT:-$SLURM_SUBMIT_DIR}"
PYTHON="${PYTHON:-.venv/bin/python}"

# jax would give a task one GPU, that of its number on the node.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))"
    export JAX_LOCAL_DEVICE_IDS
fi

# srun hands the signal on to every task.
told=0
trap 'told=1; kill -TERM "$step"' TERM
srun --kill-on-bad-exit=1 "$PYTHON" launch/train.py "$@" &
step=$!
status=0
wait "$step" || status=$?
if [ "$told" -eq 1 ]; then # the trap ended the wait, not the step
    status=0
    wait "$step" || status=$?
fi
if [ "$told" -eq 1 ] || { [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; }; then
    echo "ended with status $status: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
