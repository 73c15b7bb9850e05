"""The compiled program of a run: one optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vla_jax.config import Config
from vla_jax.models.caption_loss import caption_loss
from vla_jax.models.image import ImageSpec, preprocess
from vla_jax.train import lora
from vla_jax.train import mesh as meshes
from vla_jax.train.augment import augment
from vla_jax.train.finite import all_finite, choose
from vla_jax.train.optim import make_optimizer, make_schedule, moving_average
from vla_jax.train.split import merge
from vla_jax.train.state import TrainState
from vla_jax.types import Actions, Batch

T = TypeVar("T")
Metrics = dict[str, Array]


@runtime_checkable
class Model(Protocol):
    """What a step needs of a model; `vla_jax.models.vla` builds one."""

    @property
    def image(self) -> ImageSpec:
        """What its image tower takes."""
        ...

    def apply(self, variables: Any, *args: Any, rngs: Any = None, **method: Any) -> Any:
        """Call `method` on (preprocessed observation, actions, key, gripper weight).

        "loss" gives a float32 scalar and its parts: "rows" [b], of each window, and means over
        the supervised actions; "evaluate" those and a `Prediction` of the supervised steps. An
        rng named "dropout" turns dropout on; the key feeds what else is random.
        """
        ...

    def supervised(self, actions: Actions) -> Actions:
        """Those of a window's steps that the loss looks at."""
        ...


def make_train_step(
    model: Model,
    config: Config,
    mesh: Mesh,
    template: TrainState,
    names: Sequence[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step, compiled; the state's buffers are reused (donated).

    Args:
        model: applied in its own compute dtype to float32 or bfloat16 parameters.
        config: of the run. With `train.accumulate` n the batch goes through in n parts, one after
            the other; every supervised action counts the same whatever part it is in.
        mesh: of the run.
        template: carries the state's shardings, pinned on the way in and out.
        names: of the mixture's datasets.

    Returns:
        (state, batch) -> (state, metrics); metrics are float32 device scalars: "loss", its parts,
        "loss_caption" and "acc_caption" of batches with captions, "grad_norm" before clipping,
        "lr" used, "skipped" (1 if the loss or the gradients were not finite: parameters, average
        and optimizer are then as before, only the step number goes on), and "loss/NAME", the
        action loss on each dataset of several, NaN where the batch has none of it. Reading one
        waits for the step; keep a few steps' worth and read late.
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    schedule = make_schedule(config.optim, config.train.steps)
    parts_of = config.train.accumulate

    def objective(
        trainable: Any, state: TrainState, batch: Batch, key: Array, fractions: Array
    ) -> tuple[Array, tuple[Metrics, Array]]:
        """Loss of a part of a batch; `fractions` [2] is its part of all actions and tokens."""
        # Dropout is on where an rng is passed, so none is without it. Noise of heads has a key of
        # its own, so that turning dropout on does not change it.
        rngs, noise = {"dropout": key} if config.model.dropout else None, jax.random.fold_in(key, 1)
        observation = augment(
            batch.observation, batch.sample, config.seed, config.augment, model.image, train=True
        )
        params = merge(trainable, state.frozen)
        variables = {"params": lora.active(params, config.lora, train=True)}
        args = (observation, batch.actions, noise, config.optim.gripper_weight)
        total, parts = model.apply(variables, *args, method="loss", rngs=rngs)
        # A copy, since "rows" is taken out.
        parts = dict(parts)
        rows = parts.pop("rows", None)
        actions = model.supervised(batch.actions)
        parts = {name: fractions[0] * x for name, x in parts.items()}
        total = fractions[0] * total
        if batch.captions is not None:
            images = preprocess(batch.captions.images, model.image)
            args = (variables, images, batch.captions)
            caption, more = model.apply(*args, method=caption_loss, rngs=rngs)
            parts |= {name: fractions[1] * x for name, x in more.items()}
            total += fractions[1] * config.optim.caption_weight * caption
        sums = by_dataset(rows, actions, batch.dataset, len(names))
        return total, ({**parts, "loss": total}, sums)

    gradients = jax.value_and_grad(objective, has_aux=True)

    def accumulated(state: TrainState, batch: Batch, key: Array) -> Any:
        """What `gradients` gives for a batch that goes through in parts."""
        micro = split_rows(batch, parts_of, mesh)
        mask = jax.vmap(model.supervised)(micro.actions).mask
        actions = mask.sum((1, 2, 3), dtype=jnp.float32)
        tokens = jnp.zeros_like(actions)
        if micro.captions is not None:
            tokens = micro.captions.target.sum((1, 2), dtype=jnp.float32)
        counts = jnp.stack([actions, tokens], axis=1)
        # So weighed, the means of the parts add up to the mean over the whole batch.
        shares = counts / jnp.maximum(counts.sum(0), 1.0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(parts_of))

        def add(total: Any, part: tuple[Batch, Array, Array]) -> tuple[Any, None]:
            new = gradients(state.trainable, state, *part)
            return jax.tree.map(jnp.add, total, new), None

        first = (jax.tree.map(lambda x: x[0], micro), keys[0], shares[0])
        shapes = jax.eval_shape(gradients, state.trainable, state, *first)
        # The scan's carry must have the types of what is added to it.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (micro, keys, shares))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The model pins its rows to the axes of this mesh; see `models.sharding`.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            # From the step number, so that a resumed run draws what it would have drawn.
            key = jax.random.fold_in(state.rng, state.step)
            (_, (metrics, sums)), grads = (
                gradients(state.trainable, state, batch, key, jnp.ones(2))
                if parts_of == 1
                else accumulated(state, batch, key)
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics |= {"grad_norm": optax.global_norm(grads), "lr": schedule(state.step)}
        # The gradients too: a finite loss may have some that overflow, and one such step spoils the
        # moments for good.
        is_finite = all_finite((metrics["loss"], grads))
        metrics["skipped"] = 1.0 - is_finite.astype(jnp.float32)
        # The loss of a single dataset is "loss" itself.
        if len(names) > 1:
            each = jnp.where(sums[1] > 0, sums[0] / sums[1], jnp.nan)
            metrics |= {f"loss/{name}": each[i] for i, name in enumerate(names)}
        trainable: Any = optax.apply_updates(state.trainable, updates)  # type: ignore[arg-type]
        decay, warmup = config.optim.ema_decay, config.optim.ema_warmup
        ema = moving_average(state.ema, trainable, state.step, decay, warmup)
        before = state.trainable, state.ema, state.opt_state
        trainable, ema, opt_state = choose(is_finite, (trainable, ema, opt_state), before)
        after = TrainState(
            # Also where the step was skipped: the loader has gone on, and the two must not drift
            # apart.
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen,
            ema=ema,
            opt_state=opt_state,
            rng=state.rng,
        )
        return after, metrics

    shardings = jax.tree.map(lambda x: x.sharding, template)
    return jax.jit(
        step,
        in_shardings=(shardings, meshes.batch_sharding(mesh)),
        # Pinned, or the compiler may lay the new state out otherwise, and the next step, which gets
        # it, is compiled again.
        out_shardings=(shardings, meshes.replicated(mesh)),
        # The new state takes the old one's memory: a large model has no room for two.
        donate_argnums=0,
        compiler_options=meshes.compiler_options(mesh),
    )


def split_rows(batch: T, parts: int, mesh: Mesh) -> T:
    """Rows [b, ...] -> [parts, b / parts, ...]; every row stays on its device.

    Part i takes rows i, i + parts, ...: each device splits what it holds. Contiguous parts would
    send every image to another device (seven all-to-all measured).
    """
    where = NamedSharding(mesh, PartitionSpec(None, *meshes.batch_sharding(mesh).spec))

    def cut(x: Array) -> Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, where)

    return jax.tree.map(cut, batch)


def by_dataset(
    rows: Float[Array, "b"] | None, actions: Actions, dataset: Int[Array, "b"], datasets: int
) -> Float[Array, "2 datasets"]:
    """Sum of the loss over each dataset's supervised actions, and how many those are.

    Args:
        rows: mean loss of each window, or None when the loss does not tell.
        actions: supervised in those windows.
        dataset: of each window.
        datasets: of the mixture.
    """
    if rows is None or datasets < 2:
        return jnp.zeros((2, datasets))
    count = actions.mask.sum((1, 2), dtype=jnp.float32)
    # A row's mean counts once for each of its actions, or the cut window at an episode's end would
    # weigh as much as a full one.
    sums = jnp.stack([jax.lax.stop_gradient(rows) * count, count], axis=1)
    return jax.ops.segment_sum(sums, dataset, datasets).T
