"""The compiled program of a run: one optimizer step."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from vla_jax.config import Config
from vla_jax.models.image import ImageSpec
from vla_jax.train import lora
from vla_jax.train import mesh as meshes
from vla_jax.train.augment import augment
from vla_jax.train.optim import make_optimizer, make_schedule, moving_average
from vla_jax.train.split import merge
from vla_jax.train.state import TrainState
from vla_jax.types import Actions, Batch, Prediction

Metrics = dict[str, Array]
# (prediction, actions, gripper weight) -> (float32 scalar, its parts)
Loss = Callable[[Prediction, Actions, float], tuple[Array, Metrics]]


@runtime_checkable
class Model(Protocol):
    """What a step needs of a model; `vla_jax.models.vla` builds one."""

    @property
    def image(self) -> ImageSpec:
        """What its image tower takes."""
        ...

    def apply(self, variables: Any, observation: Any, *, rngs: Any = None) -> Any:
        """Preprocessed observation -> `Prediction`; an rng named "dropout" turns dropout on."""
        ...


def make_train_step(
    model: Model, loss: Loss, config: Config, mesh: Mesh, template: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step, compiled; the state's buffers are reused (donated).

    Args:
        model: applied in its own compute dtype to float32 or bfloat16 parameters.
        loss: in float32.
        config: of the run.
        mesh: of the run.
        template: carries the state's shardings, pinned on the way in and out.

    Returns:
        (state, batch) -> (state, metrics); metrics are float32 device scalars: "loss", its parts,
        "grad_norm" before clipping, "lr" used. Reading one waits for the step; keep a few steps'
        worth and read late.
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    schedule = make_schedule(config.optim, config.train.steps)

    def gradients(state: TrainState, batch: Batch) -> tuple[Any, Metrics]:
        # Accumulation would scan over micro-batches here. Split rows as reshape(b / n, n) and
        # swap: reshape(n, b / n) moves every image to another device.
        key = jax.random.fold_in(state.rng, state.step)
        rngs = {"dropout": key} if config.model.dropout else None
        observation = augment(
            batch.observation, batch.sample, config.seed, config.augment, model.image, train=True
        )

        def objective(trainable: Any) -> tuple[Array, Metrics]:
            params = merge(trainable, state.frozen)
            variables = {"params": lora.active(params, config.lora, train=True)}
            prediction = model.apply(variables, observation, rngs=rngs)
            return loss(prediction, batch.actions, config.optim.gripper_weight)

        (total, parts), grads = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        return grads, {**parts, "loss": total}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics |= {"grad_norm": optax.global_norm(grads), "lr": schedule(state.step)}
        trainable: Any = optax.apply_updates(state.trainable, updates)  # type: ignore[arg-type]
        after = TrainState(
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen,
            ema=moving_average(state.ema, trainable, state.step, config.optim.ema_decay),
            opt_state=opt_state,
            rng=state.rng,
        )
        return after, metrics

    shardings = jax.tree.map(lambda x: x.sharding, template)
    return jax.jit(
        step,
        in_shardings=(shardings, meshes.batch_sharding(mesh)),
        out_shardings=(shardings, meshes.replicated(mesh)),
        donate_argnums=0,
    )
