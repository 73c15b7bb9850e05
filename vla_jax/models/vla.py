"""A VLA: backbone x structure x head.

Legend: b batch · w window · h image height = width · t text columns · k tokens of a step's cameras
r sequences · n sequence · c columns read · m latents · d width · f chunk · a action dimension
u steps the head sees: w, or 1 of a video
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.config import ConfigError, ModelConfig
from vla_jax.models import sharding, streaming, structures
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Tokens
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import newest, pool_tokens
from vla_jax.models.image import ImageSpec
from vla_jax.models.losses import huber, masked_mean
from vla_jax.models.state_token import StateToken
from vla_jax.models.streaming import History
from vla_jax.models.structures import STRUCTURES, splicing
from vla_jax.models.structures.splicing import Sequence, widen
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.resampler import Perceiver
from vla_jax.types import Actions, Observation, Prediction


class VLA(nn.Module):
    """One model for every structure; `structures.STRUCTURES` says how they differ.

    A step is the sequence `<s> · images, last camera first · instruction · action tokens · </s>`,
    or the window is, step after step or with all its images at once. Hidden states at the action
    tokens (or others, see `readout`) are the features that the head turns into actions.
    """

    config: ModelConfig
    arch: Any

    @property
    def image(self) -> ImageSpec:
        """What the image tower takes."""
        return BACKBONES[self.config.backbone.name][0].image_spec(self.arch)

    def setup(self):
        c, s = self.config, self.config.structure
        dtype = jnp.dtype(c.dtype)
        file, module = BACKBONES[c.backbone.name]
        self.layout = structures.layout_of(c)
        self.backbone = module(self.arch, c.remat, dtype)
        if s.resampler:
            self.resampler = Perceiver(s.resampler, remat=c.remat, dtype=dtype)
        if s.proprio:
            width = min(file.width(self.arch), file.token_width(self.arch))
            self.state = StateToken(width, dtype)
        if has_action_token(c):
            # Zeros, as in the original: latents differ by their position alone.
            shape = (file.width(self.arch),)
            self.action_token = self.param("action_token", nn.initializers.zeros, shape)
        if c.head.down_sample == "resampler":
            self.pooler = Perceiver(s.latent, remat=c.remat, dtype=dtype)
        if c.sentence.dim:
            self.sentence = Dense((c.sentence.dim,), dtype=dtype)
        self.head = HEADS[c.head.kind][1](c.head, s, c.action_dim, dtype)

    def __call__(self, observation: Observation, key: PRNGKeyArray | None = None) -> Prediction:
        """Preprocessed window -> the chunk predicted at each of its steps (video: the last).

        Args:
            observation: of the window.
            key: for heads that draw samples.
        """
        if self.config.structure.kind == "discrete":
            return streaming.write_window(self, observation)
        features, valid = self.features(observation)
        return self.head.predict(features, valid, key)

    def supervised(self, actions: Actions) -> Actions:
        """Those of a window's steps that the loss looks at: all, or a video's last."""
        return newest(actions) if self.config.structure.kind == "video" else actions

    def loss(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Training loss and its parts: "rows" [b], of each window, and means over all actions."""
        *_, total, parts = self._measure(observation, actions, key, gripper_weight)
        return total, parts

    def evaluate(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array], Prediction]:
        """`loss`, and the prediction from the same pass of the VLM (discrete: teacher-forced)."""
        features, valid, total, parts = self._measure(observation, actions, key, gripper_weight)
        return total, parts, self.head.predict(features, valid, key)

    def _measure(self, observation: Observation, actions: Actions, key: Any, weight: float) -> Any:
        """Features, which steps exist, the loss, its parts."""
        features, valid = self.features(observation, actions)
        total, parts = self.head.loss(
            features, valid, self._targets(observation, actions), key, weight
        )
        if self.config.sentence.dim:
            if observation.sentence is None:
                raise ValueError("model.sentence.dim: the batch has no vectors of its instructions")
            # As RoboVLMs' CLIP-norm loss: smooth L1 of what the largest features say.
            found = self.sentence(features.max(axis=2)).astype(jnp.float32)
            error = huber(found - observation.sentence[:, None]).mean(-1)
            parts = {**parts, "text_l1": masked_mean(error, valid)}
            total = total + self.config.sentence.weight * parts["text_l1"]
        return features, valid, total, parts

    def step(
        self, observation: Observation, history: History, key: PRNGKeyArray | None = None
    ) -> tuple[Prediction, History]:
        """One control step: a window of length 1 and the history before it.

        Returns:
            The prediction at the new step ([b, 1, ...]) and the history with it appended.
        """
        return streaming.step(self, observation, history, key)

    def features(
        self, observation: Observation, actions: Actions | None = None
    ) -> tuple[Float[Array, "b u m d"], Bool[Array, "b u"]]:
        """What the head reads of every step of a window (video: of the last), and which exist.

        Args:
            observation: of the window.
            actions: what the discrete structure has written at each step.
        """
        valid, tokens = splicing.step_mask(observation), self.encode(observation)
        ids = None
        if self.config.structure.kind == "discrete" and actions is not None:
            ids = self.head.encode(actions)
        features = self.read(self.sequence(tokens, valid, observation, ids), valid)
        return features, valid[:, -features.shape[1] :]

    def encode(self, observation: Observation) -> Float[Array, "b w k d"]:
        """Tokens of every step's cameras and robot state, in sequence order."""
        images = [observation.images[camera] for camera in self.config.structure.cameras]
        b, w = images[0].shape[:2]
        if len({image.shape for image in images}) == 1:
            stacked = jnp.stack(images, axis=2)
            tokens = self.backbone.encode_images(stacked.reshape(-1, *stacked.shape[3:]))
        else:  # some towers see large images in tiles
            parts = [self.backbone.encode_images(x.reshape(b * w, *x.shape[2:])) for x in images]
            tokens = jnp.stack(parts, axis=1)
            tokens = tokens.reshape(-1, *tokens.shape[2:])
        if self.config.structure.resampler:
            marks = structures.marks(self.config)
            before, tokens, behind = jnp.split(tokens, [marks, tokens.shape[1] - marks], axis=1)
            tokens = jnp.concatenate([before, self.resampler(tokens), behind], axis=1)
        tokens = sharding.rows(tokens.reshape(b, w, len(images), *tokens.shape[1:]))
        # Each further camera is inserted at the same column, so the last one comes first.
        tokens = tokens[:, :, ::-1].reshape(b, w, -1, tokens.shape[-1])
        if not self.config.structure.proprio:
            return tokens
        state = self.state(observation.proprio)[:, :, None]
        return jnp.concatenate([tokens, widen(state, tokens.shape[-1])], axis=2)

    def sequence(
        self,
        tokens: Float[Array, "b w k d"],
        valid: Bool[Array, "b w"],
        observation: Observation,
        ids: Int[Array, "b w fa"] | None = None,
    ) -> Sequence:
        """The VLM's input and the columns to read: r = b w sequences, or b of the whole window."""
        s, (b, w, k, d) = self.config.structure, tokens.shape
        padded = s.parity.act_insert == "padded_column"
        text = sharding.rows(self.backbone.embed_text(observation.text))
        mask = observation.text_mask
        place = jnp.broadcast_to(splicing.places(s, k), (b, w, k))
        if s.kind == "video":
            state = int(s.proprio > 0)
            groups = (((k - state) // len(s.cameras),) * len(s.cameras)) + (1,) * state
            exist = jnp.broadcast_to(valid[..., None], place.shape)
            prefix, seen, place = (
                splicing.as_video(x, groups) for x in (tokens, exist[..., None], place[..., None])
            )
            seen, place = seen[..., 0], place[..., 0]
        else:
            prefix, seen = tokens.reshape(b * w, k, d), jnp.ones((b * w, k), bool)
            place = place.reshape(b * w, k)
            text, mask = (jnp.repeat(x, w, axis=0) for x in (text, mask))
        inserted = self.inserted(len(mask), ids, text)
        given, first = splicing.splice(
            text, mask, prefix, seen, place, inserted, self.layout, padded
        )
        count = inserted.shape[1]
        if s.readout != "action":
            k = prefix.shape[1] if given.images is None else 0
            columns, read = splicing.columns_of(s.readout, given.valid, first, k, self.layout)
            sequence = Sequence(given, columns, read | padded)
        else:
            # The column before each written token predicts it; the last one predicts the stop.
            written = s.kind == "discrete"
            columns = first - written + jnp.arange(count + written * self.layout.eos)
            sequence = Sequence(given, columns, jnp.ones(columns.shape, bool))
        if s.kind == "video" or not STRUCTURES[s.kind].joint or given.images is not None:
            return sequence
        return splicing.join(sequence, valid, padded)

    def inserted(
        self, rows: int, ids: Int[Array, "b w fa"] | None, text: Float[Array, "r t d"]
    ) -> Float[Array, "r m d"]:
        """What stands behind the instruction: written tokens, action tokens, or nothing."""
        if ids is not None:
            return self.backbone.embed_text(ids.reshape(rows, -1))
        if not has_action_token(self.config):
            return text[:, :0]
        token = widen(self.action_token.astype(text.dtype), text.shape[-1])
        return jnp.broadcast_to(token, (rows, self.config.structure.latent, len(token)))

    def read(self, sequence: Sequence, valid: Bool[Array, "b w"]) -> Float[Array, "b u m d"]:
        """Run the VLM and pick the features; of the discrete structure, scores of next tokens."""
        hidden = sharding.rows(self.hidden(sequence.tokens))
        picked = sharding.rows(splicing.take(hidden, sequence.columns))
        b, w = valid.shape[0], 1 if self.config.structure.kind == "video" else valid.shape[1]
        picked = picked.reshape(b, w, -1, picked.shape[-1])
        if self.config.structure.kind == "discrete":
            flat = picked.reshape(b, -1, picked.shape[-1])
            return sharding.rows(self.backbone.logits(flat)).reshape(*picked.shape[:3], -1)
        return self.pool(picked, sequence.read.reshape(picked.shape[:3]))

    def pool(
        self, picked: Float[Array, "b u c d"], read: Bool[Array, "b u c"]
    ) -> Float[Array, "b u m d"]:
        """The tokens read of every step -> what the head sees of it."""
        s, head = self.config.structure, self.config.head
        b, w = picked.shape[:2]
        if head.down_sample == "pooling":
            return pool_tokens(picked, read, s.latent)
        if head.down_sample == "resampler":
            flat = self.pooler(picked.reshape(b * w, *picked.shape[2:]), read.reshape(b * w, -1))
            return flat.reshape(b, w, *flat.shape[1:])
        return picked

    def hidden(self, tokens: Tokens) -> Float[Array, "r n d"]:
        """Hidden states: those that make logits where the VLM writes, else those heads read."""
        written = self.config.structure.kind == "discrete"
        run = None if written else getattr(self.backbone, "features", None)
        return (run or self.backbone)(tokens)

    def _targets(self, observation: Observation, actions: Actions) -> Any:
        if self.config.structure.kind == "discrete":
            at = observation.text_mask.sum(axis=1, keepdims=True) - self.layout.eos
            stop = jnp.take_along_axis(observation.text, at, axis=1)[:, : self.layout.eos]
            return self.head.labels(actions, stop)
        return self.supervised(actions)


def has_action_token(config: ModelConfig) -> bool:
    """Whether features are read at a learned token of their own."""
    return config.structure.readout == "action" and config.structure.kind != "discrete"


def prompt(config: ModelConfig) -> str:
    """Template of the text, with {instruction}: the backbone's own, or RoboVLMs' question."""
    file, _ = BACKBONES[config.backbone.name]
    if config.structure.kind != "discrete":
        return file.PROMPT
    chunk = config.structure.chunk
    actions = "action" if chunk == 1 else f"{chunk} step actions"
    question = f"What {actions} should the robot take to {{instruction}}?"
    return getattr(file, "QUESTION", "Input: {question}\nOutput:").format(question=question)


def ends(config: ModelConfig) -> tuple[str, str]:
    """What captions begin and end with; empty where the tokenizer adds what they need."""
    return getattr(BACKBONES[config.backbone.name][0], "ENDS", ("", ""))


def word_ids(model: VLA) -> int:
    """How many ids, from 0, may be words: all, less those that stand for actions."""
    c = model.config
    if c.structure.kind == "discrete":
        return c.head.token_end - c.head.bins
    return BACKBONES[c.backbone.name][0].vocab_size(model.arch)


def initial_params(model: VLA, key: Array) -> dict[str, Any]:
    """Random parameters as a plain nested dict; under `eval_shape` their shapes, without memory."""
    c, s, shape = model.config, model.config.structure, model.image.shape
    ones = jnp.ones((1, s.text_len), bool)
    observation = Observation(
        images={c: jnp.zeros((1, s.window, *shape, 3)) for c in s.cameras},
        image_mask={c: jnp.ones((1, s.window), bool) for c in s.cameras},
        text=ones.astype(jnp.int32),
        text_mask=ones,
        proprio=jnp.zeros((1, s.window, s.proprio)) if s.proprio else None,
        sentence=jnp.zeros((1, c.sentence.dim)),
    )
    actions = Actions(
        chunk=jnp.zeros((1, s.window, s.chunk, c.action_dim)),
        mask=jnp.ones((1, s.window, s.chunk), bool),
    )
    variables = model.init(key, observation, actions, jax.random.key(0), 0.0, method="loss")
    return dict(variables["params"])


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
    problems = problems or structures.refusals(config)
    if problems:
        raise ConfigError("model:\n  " + "\n  ".join(problems))
    file, _ = BACKBONES[config.backbone.name]
    if arch is None:
        arch = file.arch(config.backbone.arch)
    if reason := getattr(file, "refusal", lambda *_: "")(arch, config.structure):
        raise ConfigError(f"model:\n  {config.backbone.name} + {config.structure.kind}: {reason}")
    if config.structure.kind == "discrete":
        end = config.head.token_end or file.token_end(arch)
        if not config.head.bins < end <= file.vocab_size(arch):
            raise ConfigError(
                f"model:\n  head.token_end {end}, head.bins {config.head.bins}: action ids must "
                f"lie within the vocabulary of {file.vocab_size(arch)} and leave room for words"
            )
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, token_end=end))
    return VLA(config, arch)
