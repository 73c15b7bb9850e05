"""What a VLM was trained on before it was a VLA: text about an image, one token at a time.

Legend: b batch · h, x image height and width · t text columns · k tokens of the image · d width
v vocabulary
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.models import sharding
from vla_jax.models.losses import cross_entropy
from vla_jax.models.structures.splicing import splice
from vla_jax.types import Captions


def caption_loss(
    model: Any, images: Float[Array, "b h x 3"], captions: Captions
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the answers' tokens given image and question, the mean over them.

    The sequence is `<s> · image · text · </s>`, as in the action structures.

    Args:
        model: a bound `VLA`; call as `vla.apply(variables, images, captions, method=caption_loss)`.
        images: preprocessed, one a text.
        captions: the texts.

    Returns:
        The loss in float32 and its parts: loss_caption (itself) and acc_caption (share of the
        tokens that are the likeliest one). Both 0 when nothing is to be predicted.
    """
    layout, backbone = model.layout, model.backbone
    images = sharding.rows(backbone.encode_images(images))
    text, mask = sharding.rows(backbone.embed_text(captions.text)), captions.text_mask
    # A batch may mix texts with and without an image; what stands in for a missing one is masked.
    visible = jnp.broadcast_to(captions.has_image[:, None], images.shape[:2])
    place = jnp.broadcast_to(jnp.arange(images.shape[1]), visible.shape)
    # Captions have no action tokens, so nothing is inserted before `</s>`.
    none = text[:, :0]
    tokens, _ = splice(text, mask, images, visible, place, none, layout, padded=False)
    if layout.images == "encoded":  # the question is read, the answer is written
        asked = mask & ~captions.target
        tokens = tokens._replace(
            embeds=text, valid=mask, place=jnp.full(mask.shape, -1), prompt_valid=asked
        )
    # Text column j stands at j + k; the column before it predicts it.
    k, first = tokens.embeds.shape[1] - text.shape[1], max(layout.bos, 1)
    if tokens.given is not None:
        shift = ((0, 0), (k, 0))
        # What is to be predicted must not be among the tokens that see each other in both
        # directions.
        tokens = tokens._replace(given=tokens.given & ~jnp.pad(captions.target, shift))
    hidden = sharding.rows(backbone(tokens))
    logits = sharding.rows(backbone.logits(hidden[:, k + first - 1 : -1]))
    return _loss(logits, captions.text[:, first:], captions.target[:, first:])


def _loss(
    logits: Float[Array, "b t v"], labels: Array, target: Bool[Array, "b t"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    each = cross_entropy(logits, labels)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    # Without a single target the sums are 0 and so is the loss, instead of 0 / 0.
    count = jnp.maximum(target.sum(dtype=jnp.float32), 1.0)
    loss, accuracy = (jnp.where(target, x, 0.0).sum() / count for x in (each, right))
    return loss, {"loss_caption": loss, "acc_caption": accuracy}
