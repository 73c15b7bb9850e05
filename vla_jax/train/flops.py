"""How fast a step could be: its operations, and what the devices could do in that time.

MFU (model FLOPs utilization) here is 3 x the matrix products and convolutions of one forward pass
(one forward, two for the backward pass; what rematerialization computes again does not count), over
the step's time, over the bf16 peak of all devices. Frozen parts count the same: the convention of
the field, and one number for all configs.
"""

import dataclasses
import logging
from typing import Any

import jax
from jax.sharding import Mesh

from vla_jax.config import Config
from vla_jax.models.caption_loss import caption_loss
from vla_jax.models.image import preprocess
from vla_jax.train import lora
from vla_jax.train.chips import CHIPS
from vla_jax.train.meter import Meter
from vla_jax.train.state import TrainState
from vla_jax.train.trace import count
from vla_jax.types import Batch

logger = logging.getLogger(__name__)
TRAINING = 3  # a training step's products, in forward passes


def of_step(model: Any, config: Config, template: TrainState, batch: Batch) -> float:
    """FLOPs of one training step by the convention above, over all devices.

    Args:
        model: see `step.make_train_step`.
        config: of the run.
        template: shapes of the state.
        batch: a global batch, or its shapes.
    """

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    def pixels(x: Any) -> Any:  # as the model's image tower takes them
        return jax.eval_shape(lambda image: preprocess(image, model.image), shape(x))

    # Resizing is made of matrix products too, which are not the model's work.
    images = {camera: pixels(x) for camera, x in batch.observation.images.items()}
    observation = dataclasses.replace(jax.tree.map(shape, batch.observation), images=images)
    captions = jax.tree.map(shape, batch.captions)

    def forward(params: Any, observation: Any, actions: Any, captions: Any, key: Any) -> Any:
        variables = {"params": lora.active(params, config.lora, train=True)}
        args = observation, actions, key, config.optim.gripper_weight
        losses = [model.apply(variables, *args, method="loss")[0]]
        if captions is not None:
            args = variables, preprocess(captions.images, model.image), captions
            losses.append(model.apply(*args, method=caption_loss)[0])
        return losses

    # Shapes without shardings, since the trace counts over all devices.
    args = jax.tree.map(shape, template.params), observation, jax.tree.map(shape, batch.actions)
    traced = jax.make_jaxpr(forward)(*args, captions, jax.random.key(0))
    return float(TRAINING * count(traced).total)


def peak(device: Any) -> float | None:
    """Bf16 operations a second that a device can do; None where no data sheet is known."""
    kinds = {chip.kind: chip.flops for chip in CHIPS.values()}
    return kinds.get(device.device_kind)


def expect(
    meter: Meter, model: Any, config: Config, template: TrainState, batch: Any, mesh: Mesh
) -> None:
    """Count the operations of a step for the MFU that the meter shows, and say so.

    Args:
        meter: of the run.
        model: as of `of_step`.
        config: as of `of_step`.
        template: as of `of_step`.
        batch: as of `of_step`.
        mesh: whose devices do it.
    """
    operations, device = of_step(model, config, template, batch), mesh.devices.flat[0]
    peak_flops = peak(device)
    meter.expect(operations, peak_flops)
    against = (
        f"{peak_flops / 1e12:g} TFLOP/s a device"
        if peak_flops
        else f"no known peak of a {device.device_kind}"
    )
    logger.info(
        "MFU: 3 x forward matmul FLOPs, %.4g TFLOPs a step, against %s", operations / 1e12, against
    )
