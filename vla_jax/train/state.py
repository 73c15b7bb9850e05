"""All that a training step reads and writes, and how it comes to lie on the devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from vla_jax import rules
from vla_jax.train import mesh as meshes
from vla_jax.train.optim import Split, merge, split

Init = Callable[[jax.Array], Mapping[str, Any]]  # key -> nested parameters


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One point of a run.

    Attributes:
        step: int32 scalar, optimizer steps done.
        trainable: slash path -> float32 array.
        frozen: slash path -> bfloat16 array; no gradient, no moments.
        opt_state: optax state over `trainable`.
        rng: typed key, the same all run long; each step folds its number in.
    """

    step: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    rng: Any

    @property
    def params(self) -> dict[str, Any]:
        """All parameters as the nested dict the model applies."""
        return merge(self.trainable, self.frozen)


def make_state(parts: Split, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=parts.trainable,
        frozen=parts.frozen,
        opt_state=optimizer.init(parts.trainable),
        rng=jax.random.split(jax.random.key(seed))[1],
    )


def state_shardings(state: TrainState, mesh: Mesh, min_sharded: int = meshes.MIN_SHARDED) -> Any:
    """A TrainState of shardings for a (possibly abstract) state.

    Optimizer moments are dicts with the parameters' own keys and lie where the parameters lie;
    all else (counters, the key) is replicated.
    """
    whole = meshes.replicated(mesh)
    where = meshes.param_shardings({**state.trainable, **state.frozen}, mesh, min_sharded)

    def moments(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        key = getattr(path[-1], "key", None) if path else None
        return where[key] if key in state.trainable else whole

    return TrainState(
        step=whole,
        trainable={path: where[path] for path in state.trainable},
        frozen={path: where[path] for path in state.frozen},
        opt_state=jax.tree_util.tree_map_with_path(moments, state.opt_state),
        rng=whole,
    )


def abstract(
    init: Init,
    frozen: tuple[str, ...],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    min_sharded: int = meshes.MIN_SHARDED,
) -> TrainState:
    """Shapes, dtypes and shardings of the state: the template to create, load or restore into.

    Args:
        init: key -> nested parameters.
        frozen: path regexes, see `optim.split`.
        optimizer: over the trainable parameters.
        mesh: where the state will lie.
        min_sharded: see `mesh.param_specs`.
    """
    shapes = jax.eval_shape(
        lambda key: make_state(split(init(key), frozen), optimizer, 0), jax.random.key(0)
    )
    shardings = state_shardings(shapes, mesh, min_sharded)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def create(
    init: Init, optimizer: optax.GradientTransformation, template: TrainState, seed: int
) -> TrainState:
    """A state with random weights, born sharded; the same numbers on every mesh."""

    def build(key: jax.Array) -> TrainState:
        flat = rules.flatten(init(key))
        return make_state(_divide(flat, template), optimizer, seed)

    # The first half of the key starts the weights, the second (make_state) feeds dropout.
    key = jax.random.split(jax.random.key(seed))[0]
    return jax.jit(build, out_shardings=_shardings(template))(key)


def from_params(
    params: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    template: TrainState,
    seed: int,
) -> TrainState:
    """A state with loaded weights: nested dict of host or device arrays, placed by the template.

    Raises:
        ValueError: naming every missing, unexpected and mis-shaped parameter.
    """
    flat = rules.flatten(params)
    want = {**template.trainable, **template.frozen}
    problems = [f"missing: {path}" for path in want if path not in flat]
    problems += [f"unexpected: {path}" for path in flat if path not in want]
    problems += [
        f"shape of {path}: {tuple(flat[path].shape)}, the model has {want[path].shape}"
        for path in want
        if path in flat and flat[path].shape != want[path].shape
    ]
    if problems:
        raise ValueError(f"{len(problems)} parameters do not fit:\n  " + "\n  ".join(problems))
    placed = _divide({path: _place(flat[path], want[path]) for path in want}, template)
    finish = jax.jit(
        lambda parts: make_state(parts, optimizer, seed),
        out_shardings=_shardings(template),
        donate_argnums=0,
    )
    return finish(placed)


def _shardings(template: TrainState) -> Any:
    return jax.tree.map(lambda x: x.sharding, template)


def _divide(flat: Mapping[str, Any], template: TrainState) -> Split:
    return Split(
        {path: flat[path].astype(like.dtype) for path, like in template.trainable.items()},
        {path: flat[path].astype(like.dtype) for path, like in template.frozen.items()},
    )


def _place(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf.astype(like.dtype), like.sharding)
    # Each process slices and casts only what its devices hold, also out of a memory map.
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: np.asarray(leaf[index], like.dtype)
    )
