#!/usr/bin/env bash
# Packages: jax 0.10.2, Python 3.11 or later.
#
# Attention inside a scan over layers, each layer under jax.checkpoint, so that nothing of a layer
# should be kept for the backward pass. The mask [b, n, n] is the same for all layers and is applied
# as jnp.where(mask[:, None], scores, low), the way most attention code has it.
#
# What happens: under jax.grad the parts of the layer that do not depend on the scan's carry are
# taken out of the loop, AFTER broadcasting: the mask as bool [b, h, n, n] and the constant `low` as
# float32 [b, h, n, n] become constants of the loop and live as long as it runs, five bytes a score.
# With 32 heads and 2576 tokens that is a gigabyte a sample, for a mask of 6 MB and one number.
# Adding a mask of zeros and large negative numbers instead keeps float32 [b, 1, n, n].
#
# Seen: constants of the forward loop bool[4,8,64,64] and float32[4,8,64,64] with `where`,
# float32[4,1,64,64] with the sum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/show.py" <<'EOF'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp

b, h, n, k, layers = 4, 8, 64, 16, 6


def loss(kernels, x, mask, how):
    def layer(x, kernel):
        q = (x @ kernel).reshape(b, n, h, k).swapaxes(1, 2)
        scores = q @ q.swapaxes(2, 3)
        if how == "where":
            scores = jnp.where(mask[:, None], scores, -1e9)
        else:
            scores = scores + jnp.where(mask, 0.0, -1e9)[:, None]
        return x + (jax.nn.softmax(scores) @ q).swapaxes(1, 2).reshape(b, n, h * k), None

    x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, kernels)
    return (x**2).mean()


arguments = jnp.zeros((layers, h * k, h * k)), jnp.zeros((b, n, h * k)), jnp.ones((b, n, n), bool)
kept = {}
for how in ("where", "sum"):
    traced = jax.make_jaxpr(jax.grad(loss), static_argnums=3)(*arguments, how)
    forward = next(eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan")
    constants = forward.invars[: forward.params["num_consts"]]
    kept[how] = sorted(v.aval.str_short() for v in constants)
    print(f"{how}: the forward loop keeps {kept[how]}")
expected = {"where": ["bool[4,8,64,64]", "float32[4,8,64,64]"], "sum": ["float32[4,1,64,64]"]}
raise SystemExit(0 if kept == expected else "the behavior has changed")
EOF
"$folder/venv/bin/python" "$folder/show.py"
