#!/usr/bin/env bash
# Packages: jax and jaxlib 0.10.2, numpy 2.4.6, Python 3.11 or later. The same was seen with 0.12.0.1.
#
# A matrix product with gradients of its own (`jax.custom_vjp`) in layers under `jax.checkpoint`, with the
# policy that keeps products with weights, `dots_with_no_batch_dims_saveable`. One would expect the three
# products to be kept whichever way the forward rule makes its value, as it is the same product.
#
# What happens: they are kept where the forward rule writes the product out, and all computed again
# where it calls the function that it belongs to, which is how rules are mostly written. The inner call
# is one opaque operation to the policy. The numbers are right, nothing is said, and a step does the
# work that the policy was chosen to spare. A name put on the value from outside (`checkpoint_name`) is
# seen in both.
#
# Seen: products in the gradient of three layers, with everything kept, nothing kept, products kept,
# named values kept: written out 9, 12, 9, 9; calling itself 9, 12, 12, 9.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/show.py" <<'EOF'
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

POLICIES = jax.checkpoint_policies
x, kernels = jnp.ones((4, 8)), [jnp.ones((8, 8))] * 3


def product(calls_itself):
    @jax.custom_vjp
    def multiply(x, kernel):
        return x @ kernel

    def forward(x, kernel):
        return multiply(x, kernel) if calls_itself else x @ kernel, (x, kernel)

    multiply.defvjp(forward, lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    return multiply


def products(jaxpr):
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            count += products(inner) if hasattr(inner, "eqns") else 0
    return count


def computed(multiply, policy):
    def layer(x, kernel):
        return jnp.sin(checkpoint_name(multiply(x, kernel), "product"))

    def loss(kernels):
        y = x
        for kernel in kernels:
            y = jax.checkpoint(layer, policy=policy)(y, kernel)
        return y.sum()

    return products(jax.make_jaxpr(jax.grad(loss))(kernels).jaxpr)


policies = {
    "everything": POLICIES.everything_saveable,
    "nothing": POLICIES.nothing_saveable,
    "products": POLICIES.dots_with_no_batch_dims_saveable,
    "names": POLICIES.save_only_these_names("product"),
}
counts = {}
for calls_itself in (False, True):
    multiply = product(calls_itself)
    counts[calls_itself] = [computed(multiply, policy) for policy in policies.values()]
    rule = "calls itself" if calls_itself else "written out"
    print(f"forward rule {rule}: {dict(zip(policies, counts[calls_itself]))}")
raise SystemExit(
    0 if counts == {False: [9, 12, 9, 9], True: [9, 12, 12, 9]} else "the behavior has changed"
)
EOF
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"
