"""Control steps on GPUs: every layer an array of its own, and no loop over layers.

A loop over stacked layers copies each layer's weights out of the stack before a product reads them,
which a training step hides behind its work and a control step does not. So a served model's layers
are taken apart once, and put together again inside the program, where the compiler sees through it.
Elsewhere parameters stay as they are: TPUs and CPUs read slices in the product itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from vla_jax import rules
from vla_jax.models import sharding
from vla_jax.models.towers.decoder import Cache

# Else products of the same tokens become one, of kernels that are joined at every step.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}


def serving_mesh(device: Any) -> AbstractMesh | None:
    """The mesh to trace a control step in: one GPU, else None.

    Args:
        device: that serves; it need not be here.
    """
    axes = {"axis_names": (sharding.SERVING,), "axis_types": (AxisType.Auto,)}
    # An abstract mesh tells a trace the platform and holds no device, so a plan can be made for a
    # GPU that is elsewhere.
    mesh = Mesh(np.array([device]), **axes).abstract_mesh
    device = mesh.abstract_device
    return mesh if device is not None and device.platform == "gpu" else None


def compiler_options(mesh: AbstractMesh | None) -> dict[str, Any] | None:
    """For `lowered.compile`, of a step that was traced in this mesh."""
    return None if mesh is None else GPU_OPTIONS


def apart(params: Any) -> Any:
    """Stacked layers [l, ...] as tuples of l arrays."""

    def each(path: Any, x: Any) -> Any:
        # By the path and not by the shape: any kernel may have as many rows as there are layers.
        is_stacked = rules.STACKED.search("/".join(str(key.key) for key in path))
        return tuple(x[i] for i in range(len(x))) if is_stacked else x

    return jax.tree_util.tree_map_with_path(each, params)


def together(params: Any) -> Any:
    """What `apart` took apart."""
    is_apart = {"is_leaf": lambda x: isinstance(x, tuple)}
    return jax.tree.map(lambda x: jnp.stack(x) if isinstance(x, tuple) else x, params, **is_apart)


def loop_methods(module: nn.Module) -> Callable[..., Any]:
    """The methods of a bound module for the body of a loop of jax's, which cannot take themselves.

    A loop over tokens is one on GPUs too. There layers go into it one by one, those of a cache like
    those of the weights, or each turn would copy all of them out of their stack and into it again.

    Args:
        module: whose parameters no turn changes.

    Returns:
        run(name, *arguments, **options), what the method of that name returns; its caches are to
        be given to `stacked` before they leave the loop's surroundings.
    """
    unbound, variables = module.unbind()
    is_serving = sharding.is_serving()
    if is_serving:
        variables = apart(variables)

    def run(method: str, *args: Any, **options: Any) -> Any:
        if not is_serving:
            return unbound.apply(variables, *args, **options, method=method)
        args, options = _of_caches(jnp.stack, (args, options))
        # Stacks exist inside of the body alone. What the loop carries stays apart, or each turn
        # would copy it whole.
        result = unbound.apply(together(variables), *args, **options, method=method)
        return _of_caches(tuple, result)

    return run


def stacked(tree: Any) -> Any:
    """A tree whose caches may come from `loop_methods`, with all caches as they are elsewhere."""
    return _of_caches(lambda x: jnp.stack(x) if isinstance(x, tuple) else x, tree)


def _of_caches(change: Callable[[Any], Any], tree: Any) -> Any:
    """The keys and values of all caches in a tree, changed."""

    def each(x: Any) -> Any:
        if not isinstance(x, Cache):
            return x
        return dataclasses.replace(x, keys=change(x.keys), values=change(x.values))

    return jax.tree.map(each, tree, is_leaf=lambda x: isinstance(x, Cache))
