#!/usr/bin/env bash
# Train on all workers of a Cloud TPU slice, from a machine with gcloud:
#
#     launch/tpu_pod.sh NAME ZONE --config=configs/kosmos_ph.py --workdir=gs://BUCKET/kosmos_ph
#
# The checkout and its .venv (pip install -e '.[tpu]') lie in ~/vla_jax of every worker. The same
# command starts a run and goes on with it. Every worker is told the first one's address and its
# own number, which it finds in the machine's metadata.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
fi
name="$1" zone="$2"
shift 2
flags="$(printf '%q ' "$@")"

read -r -d '' worker <<'END' || true
set -euo pipefail
about() {
    curl -sf -H 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
# An endpoint is ADDRESS, or NAME:NUMBER:ADDRESS.
addresses="$(about worker-network-endpoints | tr ',' '\n' | sed 's/.*://')"
export JAX_PROCESS_ID="$(about agent-worker-number)"
export JAX_NUM_PROCESSES="$(printf '%s\n' "$addresses" | wc -l)"
export JAX_COORDINATOR_ADDRESS="$(printf '%s\n' "$addresses" | head -1):8476"
cd ~/vla_jax
END
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="$worker
exec .venv/bin/python launch/train.py $flags"
