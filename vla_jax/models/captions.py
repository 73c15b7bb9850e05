"""What a VLM was trained on before it was a VLA: text about an image, one token at a time.

Legend: b batch · h, x image height and width · t text columns · k tokens of the image · d width
v vocabulary
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
    start, backbone = model.layout.bos, model.backbone
    tokens = backbone.encode_images(images)
    text = backbone.embed_text(captions.text)
    embeds = jnp.concatenate([text[:, :start], tokens, text[:, start:]], axis=1)
    seen = jnp.broadcast_to(captions.has_image[:, None], tokens.shape[:2])
    mask = captions.text_mask
    hidden = backbone(embeds, jnp.concatenate([mask[:, :start], seen, mask[:, start:]], axis=1))
    # Text column j stands at j + k; the column before it predicts it.
    k, first = tokens.shape[1], max(start, 1)
    logits = backbone.logits(hidden[:, k + first - 1 : -1]).astype(jnp.float32)
    return _cross_entropy(logits, captions.text[:, first:], captions.target[:, first:])


def _cross_entropy(
    logits: Float[Array, "b t v"], labels: Array, target: Bool[Array, "b t"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    each = jax.nn.logsumexp(logits, axis=-1) - chosen
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    count = jnp.maximum(target.sum(dtype=jnp.float32), 1.0)
    loss, share = (jnp.where(target, x, 0.0).sum() / count for x in (each, right))
    return loss, {"loss_caption": loss, "acc_caption": share}
