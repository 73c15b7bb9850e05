#!/usr/bin/env bash
# Packages: jax 0.10.2, Python 3.11 or later (a CPU shows it: 8 virtual devices).
#
# Token ids are split by rows over a mesh axis, and the parameters over the same axis, as fully
# sharded data parallelism does: the embedding table along its width, so that no row of an odd
# vocabulary is cut. One would expect each device to look up and process its own rows.
#
# What happens: the result of the lookup is split along its WIDTH, with all rows on every device,
# and stays so through a scan over layers, forward and backward. The compiler sees the same axis on
# the ids' rows and on the table's width, may use it once, and takes the table's. No warning; the
# numbers are right; memory and compute a device grow with the global batch. With the same layers
# and a batch of vectors in place of ids it does not happen.
# One constraint on the scan's carry repairs it.
#
# Seen: largest value a device holds bf16[256,128,4096] without the constraint (256 is the global
# batch), bf16[32,128,4096] with it; temporaries 5754 and 824 MiB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'EOF'
import os
import re

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def loss(params, ids, constrain):
    table, layers = params

    def layer(x, weights):
        if constrain:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp")))
        return x + jnp.tanh(x @ weights[0]) @ weights[1], None

    x, _ = jax.lax.scan(layer, table[ids], layers)
    return (x**2).mean()


def like(shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


layers = like((4, 1024, 4096), P(None, "fsdp")), like((4, 4096, 1024), P(None, None, "fsdp"))
params = like((32000, 1024), P(None, "fsdp")), layers
ids = like((256, 128), P("fsdp"), jnp.int32)
shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
step = jax.jit(jax.grad(loss), static_argnums=2, out_shardings=shardings)
rows = {}
for constrain in (False, True):
    program = step.lower(params, ids, constrain).compile()
    found = re.findall(r"bf16\[(\d+),128,4096\]", program.as_text())
    rows[constrain] = max(map(int, found))
    mib = program.memory_analysis().temp_size_in_bytes / 2**20
    print(f"constrained {constrain}: rows a device holds {rows[constrain]}, temporaries {mib:.0f} MiB")
raise SystemExit(0 if rows == {False: 256, True: 32} else "the behavior has changed")
EOF
"$folder/venv/bin/python" "$folder/show.py"
