#!/usr/bin/env bash
# Packages: jax 0.10.2, Python 3.11 or later; two processes with two virtual CPU devices each.
#
# Every process hands its own rows to jax.make_array_from_process_local_data, and the rows are split
# over one mesh axis. The mesh's other axis (tensor parallelism) happens to run ACROSS processes, as
# jax.make_mesh lays it out on some TPU tori (v5e:8x8 with a tensor axis of 4). One would expect a
# global batch of all rows, or an error, since two processes now hold devices of the same row block.
#
# What happens: no error. The global shape is inferred as if both processes had passed the same rows:
# 8 + 8 rows become a global batch of 8, and the two devices that should hold copies of one row block
# hold different rows, so that a product over the tensor axis mixes samples of the two processes.
#
# Seen: global shape (8,) in both; rows 0..3 of the global array are 0, 1, 2, 3 on one process and
# 100, 101, 102, 103 on the other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'EOF'
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

process, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
d = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
mesh = Mesh(np.array([[d[0], d[2]], [d[1], d[3]]]), ("rows", "tensor"))
mine = np.arange(8, dtype=np.float32) + 100 * process
made = jax.make_array_from_process_local_data(NamedSharding(mesh, P("rows")), mine)
held = np.asarray(made.addressable_shards[0].data).tolist()
print(f"process {process}: global shape {made.shape}, first shard {held}", flush=True)
as_seen = made.shape == (8,) and held == mine[:4].tolist()
jax.distributed.shutdown()
raise SystemExit(0 if as_seen else "the behavior has changed")
EOF
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/python" "$folder/show.py" 0 "$port" &
first=$!
"$folder/venv/bin/python" "$folder/show.py" 1 "$port"
wait "$first"
