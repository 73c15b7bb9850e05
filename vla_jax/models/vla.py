"""A VLA: backbone x structure x head.

Legend: b batch · w window · h image height = width · t text columns · q image tokens of one camera
n sequence · m action tokens (latents) · d width
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.config import ConfigError, ModelConfig
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.heads import HEADS
from vla_jax.models.image import ImageSpec
from vla_jax.types import Observation, Prediction

STRUCTURES = ("policy_head",)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What a policy remembers of the steps so far, oldest first; the newest is at the end.

    Attributes:
        features: float [b, w, m, d], the backbone's action features of the last w steps.
        valid: bool [b, w], False where no step has been taken yet.
    """

    features: Any
    valid: Any


class VLA(nn.Module):
    """The policy-head structure: the VLM sees one step, the head sees the window.

    Every step of the window becomes one sequence
    `<s> · images, last camera first · instruction · action tokens · </s>`; the hidden states at
    the action tokens are the features of that step.
    """

    config: ModelConfig
    arch: Any

    @property
    def image(self) -> ImageSpec:
        """What the image tower takes."""
        return BACKBONES[self.config.backbone.name][0].image_spec(self.arch)

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        file, module = BACKBONES[c.backbone.name]
        self.layout = file.LAYOUT
        self.backbone = module(self.arch, c.remat, dtype)
        # Zeros, as in the original: latents differ by their position alone.
        self.action_token = self.param(
            "action_token", nn.initializers.zeros, (file.width(self.arch),)
        )
        _, head = HEADS[c.head.kind]
        self.head = head(c.head, c.structure, c.action_dim, dtype)

    def __call__(self, observation: Observation) -> Prediction:
        """Preprocessed window -> the chunk predicted at each of its steps."""
        return self.head(self.features(observation), step_mask(observation))

    def step(self, observation: Observation, history: History) -> tuple[Prediction, History]:
        """One control step: a window of length 1 and the history before it.

        Returns:
            The prediction at the new step ([b, 1, ...]) and the history with it appended.
        """
        features = self.features(observation)
        history = History(
            features=jnp.concatenate([history.features[:, 1:], features], axis=1),
            valid=jnp.concatenate([history.valid[:, 1:], step_mask(observation)], axis=1),
        )
        prediction = self.head(history.features, history.valid)
        return jax.tree.map(lambda x: x[:, -1:], prediction), history

    def features(self, observation: Observation) -> Float[Array, "b w m d"]:
        """Run the VLM on every step and pick the hidden states at the action tokens."""
        structure = self.config.structure
        images = [observation.images[camera] for camera in structure.cameras]
        b, w = images[0].shape[:2]
        stacked = jnp.stack(images, axis=2)
        tokens = self.backbone.encode_images(stacked.reshape(-1, *stacked.shape[3:]))
        tokens = tokens.reshape(b * w, len(images), *tokens.shape[1:])
        # Each further camera is inserted at the same column, so the last one comes first.
        tokens = tokens[:, ::-1].reshape(b * w, -1, tokens.shape[-1])

        text, valid, columns = self._instruction(observation)
        t = text.shape[1]
        text = jnp.broadcast_to(text[:, None], (b, w, *text.shape[1:])).reshape(b * w, t, -1)
        valid = jnp.broadcast_to(valid[:, None], (b, w, t)).reshape(b * w, t)
        columns = jnp.broadcast_to(columns[:, None], (b, w, structure.latent))
        columns = columns.reshape(b * w, -1) + tokens.shape[1]

        start = self.layout.bos
        embeds = jnp.concatenate([text[:, :start], tokens, text[:, start:]], axis=1)
        seen = jnp.ones(tokens.shape[:2], bool)
        valid = jnp.concatenate([valid[:, :start], seen, valid[:, start:]], axis=1)
        hidden = self.backbone(embeds, valid)
        picked = jnp.take_along_axis(hidden, columns[..., None], axis=1)
        return picked.reshape(b, w, structure.latent, -1)

    def _instruction(self, observation: Observation):
        """Text with the action tokens inserted.

        Returns:
            embeddings [b, t + m, d], their mask [b, t + m], columns of the action tokens [b, m].
        """
        structure, mask = self.config.structure, observation.text_mask
        b, t = mask.shape
        latent = structure.latent
        text = self.backbone.embed_text(observation.text)
        length = (
            jnp.full((b, 1), t)
            if structure.act_insert == "padded_column"
            else (mask.sum(axis=1, keepdims=True))
        )
        first = length - self.layout.eos
        columns = first + jnp.arange(latent)
        token = self.action_token.astype(text.dtype)
        actions = jnp.broadcast_to(token, (b, latent, text.shape[-1]))
        # Column j of the result comes from text j before the actions, from text j - m after them;
        # the actions themselves stand behind the text in the source, at t, t + 1, ...
        j = jnp.arange(t + latent)[None]
        source = jnp.where(j < first, j, jnp.where(j < first + latent, t + j - first, j - latent))
        embeds = jnp.concatenate([text, actions], axis=1)
        valid = jnp.concatenate([mask, jnp.ones((b, latent), bool)], axis=1)
        embeds = jnp.take_along_axis(embeds, source[..., None], axis=1)
        return embeds, jnp.take_along_axis(valid, source, axis=1), columns


def step_mask(observation: Observation) -> Bool[Array, "b w"]:
    """True where at least one camera has a real frame."""
    masks = list(observation.image_mask.values())
    return jnp.stack(masks).any(axis=0)


def empty_history(config: ModelConfig, arch: dict[str, Any], batch: int) -> History:
    """History before the first step of an episode."""
    file, _ = BACKBONES[config.backbone.name]
    s = config.structure
    shape = (batch, s.window, s.latent, file.width(arch))
    return History(
        features=jnp.zeros(shape, jnp.dtype(config.dtype)),
        valid=jnp.zeros((batch, s.window), bool),
    )


def initial_params(model: VLA, key: Array) -> dict[str, Any]:
    """Random parameters as a plain nested dict; under `eval_shape` their shapes, without memory."""
    file, _ = BACKBONES[model.config.backbone.name]
    s, shape = model.config.structure, file.image_spec(model.arch).shape
    ones = jnp.ones((1, s.text_len), bool)
    observation = Observation(
        images={c: jnp.zeros((1, s.window, *shape, 3)) for c in s.cameras},
        image_mask={c: jnp.ones((1, s.window), bool) for c in s.cameras},
        text=ones.astype(jnp.int32),
        text_mask=ones,
    )
    return dict(model.init(key, observation)["params"])


def build(config: ModelConfig, arch: dict[str, Any] | None = None) -> VLA:
    """The model of a config.

    Args:
        config: the model part of a resolved config.
        arch: the backbone's complete architecture; by default the released one with
            `config.backbone.arch` applied.

    Raises:
        ConfigError: naming every choice that does not exist or does not combine, with the legal
            ones.
    """
    problems = []
    if config.backbone.name not in BACKBONES:
        problems.append(f"backbone {config.backbone.name!r} is none of {sorted(BACKBONES)}")
    if config.structure.kind not in STRUCTURES:
        problems.append(f"structure {config.structure.kind!r} is none of {list(STRUCTURES)}")
    if config.head.kind not in HEADS:
        problems.append(f"head {config.head.kind!r} is none of {sorted(HEADS)}")
    if problems:
        raise ConfigError("model:\n  " + "\n  ".join(problems))
    if arch is None:
        arch = BACKBONES[config.backbone.name][0].arch(config.backbone.arch)
    return VLA(config, arch)
