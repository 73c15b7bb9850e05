"""All that a training step reads and writes, and how it comes to lie on the devices."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vla_jax import rules
from vla_jax.train import mesh as meshes
from vla_jax.train.split import Rules, Split, merge, split, split_like

if TYPE_CHECKING:
    import optax  # takes a fifth of a second, and who only reads parameters needs none of it

Init = Callable[[jax.Array], Mapping[str, Any]]  # key -> nested parameters


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One point of a run.

    Attributes:
        step: int32 scalar, optimizer steps done.
        trainable: slash path -> float32 array.
        frozen: slash path -> bfloat16 array; no gradient, no moments. A stack of which only the
            last layers train is in both, see `split`.
        ema: slash path -> float32 moving average of each trainable parameter; empty when off.
        opt_state: optax state over `trainable`.
        rng: typed key, the same all run long; each step folds its number in.
    """

    step: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    ema: dict[str, Any]
    opt_state: Any
    rng: Any

    @property
    def params(self) -> dict[str, Any]:
        """All parameters as the nested dict the model applies."""
        return merge(self.trainable, self.frozen)

    @property
    def averaged(self) -> dict[str, Any]:
        """The parameters to act with: the average where one is kept, else `params`."""
        return merge(self.ema or self.trainable, self.frozen)


def make_state(
    parts: Split, optimizer: "optax.GradientTransformation", seed: int, ema: bool = False
) -> TrainState:
    """The state before the first step; with `ema` it keeps an average, starting at the weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=parts.trainable,
        frozen=parts.frozen,
        # Starting at zero it would need a correction for its first steps.
        ema=dict(parts.trainable) if ema else {},
        opt_state=optimizer.init(parts.trainable),
        # The other half of the key makes the initial weights, see `create`.
        rng=jax.random.split(jax.random.key(seed))[1],
    )


def state_shardings(state: TrainState, mesh: Mesh, min_sharded: int = meshes.MIN_SHARDED) -> Any:
    """A TrainState of shardings for a (possibly abstract) state.

    Optimizer moments are dicts with the parameters' own keys and lie where the parameters lie;
    all else (counters, the key) is replicated.
    """
    replicated = meshes.replicated(mesh)
    # Of the whole parameters: the two parts of a stack that is cut are joined in every step, for
    # which they have to lie alike.
    where = meshes.param_shardings(rules.flatten(state.params), mesh, min_sharded)

    def moments(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # However optax nests its states, the last key of a path is the parameter's.
        key = getattr(path[-1], "key", None) if path else None
        return where[key] if key in state.trainable else replicated

    return TrainState(
        step=replicated,
        trainable={path: where[path] for path in state.trainable},
        frozen={path: where[path] for path in state.frozen},
        ema={path: where[path] for path in state.ema},
        opt_state=jax.tree_util.tree_map_with_path(moments, state.opt_state),
        rng=replicated,
    )


def abstract(
    init: Init,
    table: Rules,
    optimizer: "optax.GradientTransformation",
    mesh: Mesh,
    min_sharded: int = meshes.MIN_SHARDED,
    ema: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state: the template to create, load or restore into.

    Args:
        init: key -> nested parameters.
        table: what trains, see `split.split`.
        optimizer: over the trainable parameters.
        mesh: where the state will lie.
        min_sharded: see `mesh.param_specs`.
        ema: whether to keep an average of the trainable parameters.
    """
    # Shapes alone: the whole state may fit on no single device.
    bare = jax.eval_shape(
        lambda key: make_state(split(init(key), table), optimizer, 0, ema), jax.random.key(0)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        bare,
        state_shardings(bare, mesh, min_sharded),
    )


def create(
    init: Init,
    optimizer: "optax.GradientTransformation",
    template: TrainState,
    seed: int,
    loaded: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """The state before the first step, born sharded; the same numbers on every mesh.

    Args:
        init: key -> nested random parameters.
        optimizer: see `abstract`.
        template: of `abstract`.
        seed: of the run.
        loaded: slash path -> array (see `place`) that takes the place of a random parameter. The
            arrays are given up (donated).

    Raises:
        ValueError: naming every loaded parameter that is unexpected or mis-shaped.
    """
    loaded, want = dict(loaded or {}), rules.flatten(template.params)
    problems = [f"unexpected: {path}" for path in loaded if path not in want]
    problems += [
        f"shape of {path}: {x.shape}, the model has {want[path].shape}"
        for path, x in loaded.items()
        if path in want and x.shape != want[path].shape
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"{len(problems)} loaded parameters do not fit:\n  {listing}")

    def build(key: jax.Array, loaded: dict[str, jax.Array]) -> TrainState:
        flat = {**rules.flatten(init(key)), **loaded}
        parts = split_like(flat, Split(template.trainable, template.frozen))
        return make_state(parts, optimizer, seed, bool(template.ema))

    shardings = jax.tree.map(lambda x: x.sharding, template)
    # The first half of the key starts the weights, the second (make_state) feeds dropout.
    key = jax.random.split(jax.random.key(seed))[0]
    # With out_shardings each device makes its own part of the numbers and no more.
    return jax.jit(build, out_shardings=shardings, donate_argnums=1)(key, loaded)


def place_parts(params: Mapping[str, Any], template: TrainState) -> Split:
    """Whole parameters on the devices, cut as the template has them and where it has them."""
    flat, layout = rules.flatten(params), Split(template.trainable, template.frozen)
    # Only these need a program; the other leaves lie where they belong.
    cut = {path for path in layout.trainable if path in layout.frozen}

    @functools.partial(
        jax.jit, out_shardings=jax.tree.map(lambda x: x.sharding, _only(layout, cut))
    )
    def parts(leaves: dict[str, Any]) -> Split:
        return split_like(leaves, _only(layout, cut))

    cut_parts = parts({path: flat[path] for path in cut}) if cut else Split({}, {})
    return Split(
        {path: cut_parts.trainable.get(path, flat[path]) for path in layout.trainable},
        {path: cut_parts.frozen.get(path, flat[path]) for path in layout.frozen},
    )


def _only(parts: Split, paths: set[str]) -> Split:
    return Split(*({path: x for path, x in p.items() if path in paths} for p in parts))


def shapes(template: TrainState) -> dict[str, tuple[int, ...]]:
    """Slash path -> shape of every parameter."""
    return {path: x.shape for path, x in rules.flatten(template.params).items()}


def misfits(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What keeps stored parameters from being a model's: one line each, [] if nothing does.

    Args:
        stored: slash path -> anything with a shape.
        wanted: the same of the model.
    """
    problems = [f"missing in the checkpoint: {path}" for path in wanted if path not in stored]
    problems += [f"not in the model: {path}" for path in stored if path not in wanted]
    problems += [
        f"shape of {path}: {tuple(stored[path].shape)} stored, {wanted[path].shape} in the model"
        for path in wanted
        if path in stored and tuple(stored[path].shape) != tuple(wanted[path].shape)
    ]
    return problems


def summary(template: TrainState) -> str:
    """How many parameters train and how many do not, and what the optimizer holds, in words."""
    train, still = (
        sum(math.prod(x.shape) for x in part.values())
        for part in (template.trainable, template.frozen)
    )
    return (
        f"{train / 1e6:.2f} M trainable in float32, {still / 1e6:.2f} M frozen in bfloat16, "
        f"optimizer state {nbytes(template.opt_state) / 1e6:.2f} MB"
    )


def nbytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or shape structs, over all devices."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def place(template: TrainState, path: str, value: Any) -> jax.Array:
    """A loaded parameter (host array) on the devices, in the dtype and where the template says.

    Each process slices and casts only what its devices hold, also out of a memory map.

    Raises:
        ValueError: if its shape is not the template's.
    """
    spec = rules.flatten(template.params)[path]
    if tuple(value.shape) != spec.shape:
        raise ValueError(f"{path}: shape {tuple(value.shape)}, the model has {spec.shape}")
    return jax.make_array_from_callback(
        spec.shape, spec.sharding, lambda index: np.asarray(value[index], spec.dtype)
    )
