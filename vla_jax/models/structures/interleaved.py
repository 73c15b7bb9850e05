"""The VLM sees the window, step after step, and is read at each.

A policy does not read the window anew at every step: the VLM's cache is part of its history, and
only the new step goes through. In RoboVLMs' own layout the window is read anew each time, as
RoboVLMs does.

Legend: b batch · w window · k tokens of a step before the text · c columns read of a step
n columns of a step · d width
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import ModelConfig
from vla_jax.models import layers_apart
from vla_jax.models.backbones.base import Backbone
from vla_jax.models.structures import splicing
from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.history import History, append_step
from vla_jax.models.structures.splicing import Sequence, is_padded
from vla_jax.types import ArrayT, Observation, Prediction, pytree


@pytree
@dataclass(frozen=True)
class Reading:
    """A sequence that the VLM has read as far as it goes.

    Attributes:
        cache: of the backbone, w n slots.
        picked: the hidden states read of the last w steps.
        read: False where they are of padding.
    """

    cache: Any
    picked: Float[ArrayT, "*b w c d"]
    read: Bool[ArrayT, "*b w c"]


@pytree
@dataclass(frozen=True)
class ReadHistory(History):
    """The tokens of the last steps' cameras and state, and the VLM's reading of them.

    Attributes:
        reading: as far as the VLM has come.
    """

    reading: Reading


class Interleaved(Structure):
    """One causal sequence holds the steps of the window, each with its own instruction."""

    description = "the VLM sees the window, step after step, and is read at each"
    joint = True
    robovlms_name = "pre"

    @classmethod
    def refusals(cls, config: ModelConfig, backbone: Backbone) -> list[str]:
        """Also a VLM whose tokens see those behind them."""
        problems = super().refusals(config, backbone)
        ahead = backbone.looks_ahead
        if ahead and not is_padded(config):
            problems.append(
                f"{config.backbone.name} + interleaved: {ahead.what}, and a step those after it, "
                f"which there are none of when the policy runs; {ahead.remedy}, or "
                "structure.parity.act_insert 'padded_column' for what RoboVLMs does"
            )
        return problems

    def sequence(
        self, tokens: Float[Array, "b w k d"], valid: Bool[Array, "b w"], observation: Observation
    ) -> Sequence:
        """Sequences of a window each, r = b: step after step."""
        steps = super().sequence(tokens, valid, observation)
        return splicing.join(steps, valid, is_padded(self.config))

    def empty_history(self, batch: int) -> History:
        """The history before the first step of an episode."""
        c, s, past = self.config, self.config.structure, super().empty_history(batch)
        # A cache has no room for the padding that RoboVLMs keeps, so the window is read anew.
        if is_padded(c):
            return past
        # A step: its images, its text, its action tokens.
        inserted = s.latent * self.has_action_token(c)
        count = inserted or splicing.read_count(
            s.readout, s.text_len, self.step_tokens, self.layout
        )
        dtype = jnp.dtype(c.dtype)
        # A cache cannot grow, so it has room for the longest window.
        slots = s.window * (self.step_tokens + s.text_len + inserted)
        reading = Reading(
            cache=self.vlm.apply({}, batch, slots, method="empty_cache"),
            picked=jnp.zeros((batch, s.window, count, self.vlm.width), dtype),
            read=jnp.zeros((batch, s.window, count), bool),
        )
        return ReadHistory(past.features, past.valid, reading)

    def step(
        self, observation: Observation, history: History, key: PRNGKeyArray | None = None
    ) -> tuple[Prediction, History]:
        """The VLM reads the new step; see the base class."""
        if not isinstance(history, ReadHistory):
            return super().step(observation, history, key)
        history = self._read_on(observation, history)
        features = self.pool(history.reading.picked, history.reading.read, history.valid)
        prediction = self.head.predict(
            features, history.valid, key, last=True, guide=observation.guide
        )
        return prediction, history

    def _read_on(self, observation: Observation, history: ReadHistory) -> ReadHistory:
        """The VLM reads the new step; where the window is full, it reads what is left anew."""
        tokens, exists = self.encode(observation), splicing.step_mask(observation)
        # In a full window the oldest step drops out, and the positions of all that stays change.
        full, old = history.valid.all(axis=1), history.reading
        past = history.append(tokens, exists)
        b, w = past.valid.shape
        # The oldest has gone; with `slide` more of them go, so that the next steps find room.
        leaves = full[:, None] & (jnp.arange(w) < self.config.structure.slide - 1)
        valid = past.valid & ~leaves
        window = self.sequence(past.features, valid, observation)
        newest = self.sequence(tokens, exists, observation)
        # Bound methods of submodules cannot enter a branch of jax's.
        run = layers_apart.loop_methods(self.backbone)

        def read(sequence: Sequence, cache: Any) -> tuple[Any, Array]:
            hidden, cache = run("extend", sequence.tokens, cache)
            # Both branches of the `cond` must give the history's types.
            picked = splicing.take(hidden, sequence.columns).astype(old.picked.dtype)
            return cache, picked.reshape(b, -1, *old.picked.shape[2:])

        def anew() -> Reading:
            # From an empty cache: the slots of the steps that left are not to be seen.
            cache, picked = read(window, jax.tree.map(jnp.zeros_like, old.cache))
            return Reading(cache, picked, window.read.reshape(old.read.shape))

        def further() -> Reading:
            cache, picked = read(newest, old.cache)
            is_read = append_step(old.read, newest.read.reshape(b, 1, -1))
            return Reading(cache, append_step(old.picked, picked), is_read)

        # One row that is full makes all rows read anew: a batch shares one branch.
        reading = layers_apart.stacked(jax.lax.cond(full.any(), anew, further))
        return ReadHistory(past.features, valid, reading)
