"""Control steps on GPUs: every layer an array of its own, and no loop over layers.

A loop over stacked layers copies each layer's weights out of the stack before a product reads them,
which a training step hides behind its work and a control step does not. So a served model's layers
are taken apart once, and put together again inside the program, where the compiler sees through it.
Elsewhere parameters stay as they are: TPUs and CPUs read slices in the product itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from vla_jax import rules
from vla_jax.models import sharding

# Else products of the same tokens become one, of kernels that are joined at every step.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}


def serving_mesh(device: Any) -> AbstractMesh | None:
    """The mesh to trace a control step in: one GPU, else None.

    Args:
        device: that serves; it need not be here.
    """
    axes = {"axis_names": (sharding.SERVING,), "axis_types": (AxisType.Auto,)}
    mesh = Mesh(np.array([device]), **axes).abstract_mesh
    device = mesh.abstract_device
    return mesh if device is not None and device.platform == "gpu" else None


def compiler_options(mesh: AbstractMesh | None) -> dict[str, Any] | None:
    """For `lowered.compile`, of a step that was traced in this mesh."""
    return None if mesh is None else GPU_OPTIONS


def apart(params: Any) -> Any:
    """Stacked layers [l, ...] as tuples of l arrays."""

    def each(path: Any, x: Any) -> Any:
        is_stacked = rules.STACKED.search("/".join(str(key.key) for key in path))
        return tuple(x[i] for i in range(len(x))) if is_stacked else x

    return jax.tree_util.tree_map_with_path(each, params)


def together(params: Any) -> Any:
    """What `apart` took apart."""
    is_apart = {"is_leaf": lambda x: isinstance(x, tuple)}
    return jax.tree.map(lambda x: jnp.stack(x) if isinstance(x, tuple) else x, params, **is_apart)
