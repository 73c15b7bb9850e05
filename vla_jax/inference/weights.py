"""In which form a served model's weights lie in memory: what a control step reads.

A control step of one session is bound by the bytes of its weights. `int8` keeps the kernels of all
linear maps, convolutions among them, as whole numbers with a scale for every output, `kernel_scale`
beside the kernel as LoRA's factors are; `whole_numbers.brought_back` multiplies the product by it.
`bf16` keeps everything in bfloat16, whatever the model computes in.

Axis letters: l layers of a stack · i inputs of a linear map · o its outputs.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from vla_jax import rules

FORMS = ("", "bf16", "int8")
_LARGEST = 127  # of int8, used symmetrically


def store(
    params: Mapping[str, Any], form: str, dtype: Any, maps: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Parameters as they are served.

    Args:
        params: nested dict of float arrays.
        form: one of FORMS; "" is the type that the model computes in.
        dtype: that type.
        maps: path of the kernel of every linear map -> how many axes its stack has and how many
            are inputs, see `vla.linear_maps`.

    Raises:
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"weights: {form!r} is none of {[name for name in FORMS if name]}")
    stored_type = jnp.bfloat16 if form == "bf16" else dtype
    stored: dict[str, Any] = {}
    for path, x in rules.flatten(params).items():
        if form != "int8" or path not in maps:
            stored[path] = x.astype(stored_type)
            continue
        # Every layer of a stack is a linear map of its own, with scales of its own.
        stored[path], stored[path + "_scale"] = quantize(x, *maps[path])
    return rules.unflatten(stored)


def quantize(
    kernel: Float[Array, "..."], lead: int, inputs: int
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """A kernel [*l, *i, *o] as int8, and the scales [*l, o] that bring its products back.

    Args:
        kernel: of a linear map, or of a stack of them.
        lead: how many axes count the layers of a stack.
        inputs: how many axes behind these are inputs.
    """
    wide = kernel.astype(jnp.float32)
    over = tuple(range(lead, lead + inputs))
    scale = jnp.max(jnp.abs(wide), axis=over, keepdims=True) / _LARGEST
    # An output that is always 0 needs some scale.
    scale = jnp.where(scale == 0, 1.0, scale)
    # The cast alone would cut toward zero and make all weights smaller.
    rounded = jnp.round(wide / scale).astype(jnp.int8)
    return rounded, scale.reshape(*kernel.shape[:lead], -1)
