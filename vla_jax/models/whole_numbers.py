"""Products with kernels that are kept as whole numbers; how they are made: `inference/weights.py`.

A module with such kernels names them in a method `kernels`, where `vla.linear_maps` finds them.
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Float


def brought_back(module: nn.Module, product: Float[Array, "*n o"], kernel: str) -> Array:
    """A product, scaled if its kernel is kept as whole numbers.

    Args:
        module: whose `__call__` this is.
        product: with the kernel of this name.
        kernel: a key of the module's `kernels`.
    """
    name = f"{kernel}_scale"
    if not module.has_variable("params", name):
        return product
    # Behind a barrier: for a v5e two such products, joined into one kernel, overflow the stack of
    # the compiler of libtpu 0.0.42.
    product = jax.lax.optimization_barrier(product)
    # The scales are float32: rounded to bfloat16 they would move all weights of an output alike.
    return (product * module.get_variable("params", name)).astype(product.dtype)
