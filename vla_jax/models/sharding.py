"""How the values of a model lie on several devices: rows with rows, whatever else is split.

Left alone, a compiler that meets rows and the input side of a kernel on the same mesh axis follows
the kernel: every device then holds, and computes on, all rows of the batch. So values are pinned
where rows come in and at both ends of every layer; in between the compiler follows.
"""

import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

# The axes of `train.mesh` that a batch is split over. Code here sees the mesh through jax's
# context alone: the step enters it (`jax.sharding.use_abstract_mesh`), tests and serving do not.
ROWS = ("data", "fsdp")
# The only axis, of one device, of the mesh that a control step on a GPU is traced in.
SERVING = "serving"
# What a policy of `jax.checkpoint` may save: the name of every product with weights.
PRODUCT = "product"


def rows(x: Array, count: int | None = None) -> Array:
    """The same values, with dimension 0 split as the rows of the batch are.

    Dimension 0 may have windows and cameras folded into it, rows first; where the other dimensions
    lie stays the compiler's choice, so tensor parallelism keeps its freedom. Nothing happens
    without a mesh and where the devices do not divide the rows.

    Args:
        x: [rows, ...].
        count: rows that dimension 0 consists of, if it has anything but windows and cameras folded
            into it, such as tokens: the devices must divide these.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Axes that a mesh lacks count as one device.
    devices = math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
    if devices == 1 or (x.shape[0] if count is None else count) % devices:
        return x
    # `None` would mean "replicated" here and undo the tensor parallelism of the layers.
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *free))


@jax.custom_vjp
def whole(kernel: Array) -> Array:
    """The same kernel with all of it on every device, for what is computed twice.

    Gathered outside of what is recomputed, it is gathered once. Nothing happens without a mesh and
    where kernels are split for tensor parallelism. The gradient lies as it likes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1 or mesh.shape.get("tensor", 1) > 1:
        return kernel
    # Behind the barrier, or a kernel that was just cast would be gathered in its wider type.
    kernel = jax.lax.optimization_barrier(kernel)
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec())


whole.defvjp(lambda kernel: (whole(kernel), None), lambda _, gradient: (gradient,))


def is_serving() -> bool:
    """Whether a control step on a GPU is traced, see `models.layers_apart`."""
    return SERVING in jax.sharding.get_abstract_mesh().axis_names


def unroll(steps: int) -> int:
    """How many steps of a loop become one: all in a control step on a GPU, else one by one.

    Such a step is short, and would copy the weights of every layer out of their stack before using
    them, and wait for a kernel to count to the next.
    """
    return steps if is_serving() else 1


def product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    """`x @ kernel`, with the rows of `x` pinned in both passes.

    It is one plain matrix product over all rows and tokens: with several batch axes the backward
    pass is 1.7 times slower on CPUs. On TPUs rows and tokens stay apart: their memory comes in
    tiles, and flattened 257 tokens of a row would all be laid out anew.

    The gradients are those of `@`; but `@` would keep the flattened `x` for the backward pass, and
    what a loop over layers stacks of it would lie as the gradient of the kernel does, with all rows
    on each device. So `x` is kept as it came.

    Args:
        x: dimension 0 as in `rows`, if there are several before the last.
        kernel: of the same type.
    """
    # A policy of `jax.checkpoint` does not see the product inside, but a name it does
    # (findings/forward_rule_hides_products.sh).
    return checkpoint_name(_product(x, kernel), PRODUCT)


@jax.custom_vjp
def _product(x: Float[Array, "*b i"], kernel: Float[Array, "i o"]) -> Float[Array, "*b o"]:
    arranged = _arranged(x)
    out = jax.lax.dot_general(arranged, kernel, (((arranged.ndim - 1,), (0,)), ((), ())))
    return out.reshape(*x.shape[:-1], kernel.shape[1])


def _arranged(x: Float[Array, "*b i"]) -> Float[Array, "*n i"]:
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "tpu":
        return rows(x)
    flat = x.reshape(-1, x.shape[-1])
    # Rows were folded with tokens, so the devices must divide the rows, not the product of both.
    return rows(flat, x.shape[0]) if x.ndim > 2 else flat


def _product_forward(x: Any, kernel: Any) -> tuple[Array, Any]:
    # What only a frozen operand's gradient would need is not kept.
    residuals = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _product(x.value, kernel.value), residuals


def _product_backward(residuals: Any, gradient: Any) -> tuple[Any, Any]:
    x, kernel = residuals
    # Nothing downstream depends on the product, so nothing has to be computed.
    if isinstance(gradient, SymbolicZero):
        return None, None
    arranged, by_x, by_kernel = _arranged(gradient), None, None
    lead = tuple(range(arranged.ndim - 1))
    if kernel is not None:
        by_x = jax.lax.dot_general(arranged, kernel, (((len(lead),), (1,)), ((), ())))
        by_x = by_x.reshape(*gradient.shape[:-1], kernel.shape[0])
    if x is not None:
        by_kernel = jax.lax.dot_general(_arranged(x), arranged, ((lead, lead), ((), ())))
    return by_x, by_kernel


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
