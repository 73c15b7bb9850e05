"""Losses of the continuous heads.

Legend: b batch · w window · f chunk · a action dimension (arm + 1 gripper)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.types import Actions, Prediction


def masked_mean(x: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> Float[Array, ""]:
    """Mean over the entries `mask` selects; 0 when it selects none."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def huber(error: Float[Array, "..."]) -> Float[Array, "..."]:
    """Huber with delta 1: quadratic up to 1, linear beyond."""
    size = jnp.abs(error)
    return jnp.where(size <= 1.0, 0.5 * size * size, size - 0.5)


def binary_cross_entropy(
    logits: Float[Array, "..."], labels: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Cross-entropy of labels in [0, 1] against logits, without overflow."""
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def action_loss(
    prediction: Prediction, actions: Actions, gripper_weight: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Huber on the arm plus weighted cross-entropy on the gripper (RoboVLMs' continuous loss).

    Both are means over the chunk elements that `actions.mask` selects, in float32.

    Returns:
        The loss and its parts: rows (the loss of each window, [b]), loss_arm, loss_gripper,
        acc_gripper (share of right open/closed decisions), l1_arm (mean absolute error in
        normalised units).
    """
    arm = prediction.arm.astype(jnp.float32) - actions.chunk[..., :-1]
    logits, label = prediction.gripper.astype(jnp.float32), actions.chunk[..., -1]
    mask = actions.mask
    each_arm, each_gripper = huber(arm).mean(-1), binary_cross_entropy(logits, label)
    loss_arm, loss_gripper = masked_mean(each_arm, mask), masked_mean(each_gripper, mask)
    each = each_arm + gripper_weight * each_gripper
    metrics = {
        "rows": jax.vmap(masked_mean)(each, mask),
        "loss_arm": loss_arm,
        "loss_gripper": loss_gripper,
        "acc_gripper": masked_mean(((logits > 0) == (label > 0.5)).astype(jnp.float32), mask),
        "l1_arm": masked_mean(jnp.abs(arm).mean(-1), mask),
    }
    return loss_arm + gripper_weight * loss_gripper, metrics
