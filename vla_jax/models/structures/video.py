"""The VLM sees the images of the whole window at once and acts at its last step.

Legend: b batch · w window · k tokens of a step before the text · d width · m latents
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from vla_jax.models import sharding
from vla_jax.models.heads.common import HeadSizes, newest
from vla_jax.models.structures import splicing
from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.splicing import Sequence
from vla_jax.types import Actions, Observation


class Video(Structure):
    """One sequence holds the images of every step, camera by camera, and one instruction."""

    description = "the VLM sees the images of the whole window at once and acts at its last step"
    one_step_reason = "the window becomes a single feature, so there are no steps to remember"
    joint = True
    robovlms_name = "video"

    @property
    def sizes(self) -> HeadSizes:
        """The head sees a single step."""
        return dataclasses.replace(super().sizes, steps=1)

    def supervised(self, actions: Actions) -> Actions:
        """Those of the last step."""
        return newest(actions)

    def sequence(
        self, tokens: Float[Array, "b w k d"], valid: Bool[Array, "b w"], observation: Observation
    ) -> Sequence:
        """Sequences of a window each, r = b; images of missing steps are masked."""
        s, (b, w, k, _) = self.config.structure, tokens.shape
        state = int(s.proprio > 0)
        # The state counts as one more camera, of a single token.
        groups = (((k - state) // len(s.cameras),) * len(s.cameras)) + (1,) * state
        text = sharding.rows(self.backbone.embed_text(observation.text))
        place = jnp.broadcast_to(splicing.places(s, k), (b, w, k))
        exist = jnp.broadcast_to(valid[..., None], place.shape)
        # All are sorted alike, so that each flag stays with its token.
        prefix, exist, place = (
            by_camera(x, groups) for x in (tokens, exist[..., None], place[..., None])
        )
        args = (text, observation.text_mask, prefix, exist[..., 0], place[..., 0])
        return self.read_out(*self.splice(*args), observation)

    def pool(
        self, hidden: Float[Array, "b c d"], read: Bool[Array, "b c"], valid: Bool[Array, "b w"]
    ) -> Float[Array, "b 1 m d"]:
        """Features of the last step."""
        return super().pool(hidden, read, valid[:, -1:])


def by_camera(tokens: Shaped[Array, "b w k d"], groups: tuple[int, ...]) -> Shaped[Array, "b wk d"]:
    """Tokens of the steps -> tokens of the window, camera by camera, each in order of time.

    Args:
        tokens: of every step.
        groups: how many of the k belong to each camera, in order.
    """
    b, w, _, d = tokens.shape
    parts: list[Any] = []
    start = 0
    for size in groups:
        # Time is the outer axis of a camera's tokens, so they come in order of time.
        parts.append(tokens[:, :, start : start + size].reshape(b, w * size, d))
        start += size
    return jnp.concatenate(parts, axis=1)
