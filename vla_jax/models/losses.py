"""Losses of actions as numbers and of actions as tokens.

Legend: b batch · w window · f chunk · v vocabulary
a action dimension: the arm, and a gripper, if there is one
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models.action_tokenizer import ActionTokenizer
from vla_jax.types import Actions, Prediction

# Label of a column that is not supervised.
NO_LABEL = -100


def masked_mean(x: Float[Array, "*b"], mask: Bool[Array, "*b"]) -> Float[Array, ""]:
    """Mean over the entries `mask` selects; 0 when it selects none."""
    # `where` and not a product: what stands on padding may be NaN.
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def row_means(x: Float[Array, "b ..."], mask: Bool[Array, "b ..."]) -> Float[Array, "b"]:
    """`masked_mean` of every row by itself."""
    return jax.vmap(masked_mean)(x, mask)


def huber(error: Float[Array, "..."]) -> Float[Array, "..."]:
    """Huber with delta 1: quadratic up to 1, linear beyond."""
    size = jnp.abs(error)
    return jnp.where(size <= 1.0, 0.5 * size * size, size - 0.5)


def binary_cross_entropy(
    logits: Float[Array, "..."], labels: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Cross-entropy of labels in [0, 1] against logits, without overflow."""
    # The exponent is never positive, whatever the sign of the logit.
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def action_loss(
    prediction: Prediction, actions: Actions, gripper_weight: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Huber on the arm plus weighted cross-entropy on the gripper (RoboVLMs' continuous loss).

    Both are means over the chunk elements that `actions.mask` selects, in float32. Predictions
    without a gripper have the first part alone, over all dimensions.

    Returns:
        The loss and its parts: rows (the loss of each window, [b]), loss_arm, l1_arm (mean absolute
        error in normalized units); with a gripper loss_gripper and acc_gripper (share of right
        open/closed decisions).
    """
    size, mask = prediction.arm.shape[-1], actions.mask
    # Cast before the difference: between two close numbers in bfloat16 little but rounding is left.
    arm = prediction.arm.astype(jnp.float32) - actions.chunk[..., :size]
    # The mean over the arm's numbers makes the loss independent of how many there are.
    each_arm = huber(arm).mean(-1)
    loss_arm = masked_mean(each_arm, mask)
    metrics = {
        "rows": row_means(each_arm, mask),
        "loss_arm": loss_arm,
        "l1_arm": masked_mean(jnp.abs(arm).mean(-1), mask),
    }
    if prediction.gripper is None:
        return loss_arm, metrics
    logits, label = prediction.gripper.astype(jnp.float32), actions.chunk[..., -1]
    each_gripper = binary_cross_entropy(logits, label)
    loss_gripper = masked_mean(each_gripper, mask)
    metrics |= {
        "rows": row_means(each_arm + gripper_weight * each_gripper, mask),
        "loss_gripper": loss_gripper,
        "acc_gripper": masked_mean(((logits > 0) == (label > 0.5)).astype(jnp.float32), mask),
    }
    return loss_arm + gripper_weight * loss_gripper, metrics


def sentence_loss(
    guess: Float[Array, "b u s"], sentence: Float[Array, "b s"], valid: Bool[Array, "b u"]
) -> Float[Array, ""]:
    """Huber between what each step that exists says of the instruction and its vector."""
    error = huber(guess.astype(jnp.float32) - sentence[:, None]).mean(-1)
    return masked_mean(error, valid)


def cross_entropy(logits: Float[Array, "*b v"], labels: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Cross-entropy of every label, in float32.

    Only the label's score is taken out: the logarithm of a whole softmax would be a second array of
    the vocabulary's size, in float32.
    """
    scores = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - chosen


def token_loss(
    logits: Float[Array, "*b c v"],
    labels: Int[Array, "*b c"],
    tokenizer: ActionTokenizer,
    action_dim: int,
    gripper: bool = True,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of tokens, the mean over the labels that are not `NO_LABEL`, in float32.

    Args:
        logits: scores of the token each column predicts.
        labels: those tokens. Action tokens come as whole actions along the last axis.
        tokenizer: which ids are actions.
        action_dim: tokens of one action.
        gripper: whether the last of them is a gripper.

    Returns:
        The loss and its parts, with RoboVLMs' names: loss_arm (the whole loss), acc_arm and, with
        a gripper, acc_gripper (share of action tokens predicted exactly), action_l1 (mean distance
        of the decoded values); and rows (the loss of each row, [b]).
    """
    supervised = labels != NO_LABEL
    # A negative label would index the vocabulary from its end.
    safe = jnp.where(supervised, labels, 0)
    each = cross_entropy(logits, safe)
    loss = masked_mean(each, supervised)
    # The labels decide, as what is predicted may be any word.
    is_action = tokenizer.is_action(labels)
    # Counting action labels, not columns, skips the stop tokens between the chunks.
    place = (jnp.cumsum(is_action, axis=-1) - 1) % action_dim
    chosen = jnp.argmax(logits, axis=-1)
    right = (chosen == labels).astype(jnp.float32)
    # Words that are no actions are decoded as an end of the range.
    distance = jnp.abs(tokenizer.decode(chosen) - tokenizer.decode(safe))
    metrics = {
        "rows": row_means(each, supervised),
        "loss_arm": loss,
        "acc_arm": masked_mean(right, is_action & (place < action_dim - gripper)),
        "action_l1": masked_mean(distance, is_action),
    }
    if gripper:
        metrics["acc_gripper"] = masked_mean(right, is_action & (place == action_dim - 1))
    return loss, metrics
