"""What a structure is: the outermost module of a VLA, with the backbone and the head inside.

Legend: b batch · w window · h image height = width · t text columns · k tokens of a step's cameras
r sequences · n sequence · c columns read, or width of images · m latents · d width · f chunk
a action dimension · u steps the head sees: w, or 1
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import ModelConfig
from vla_jax.models import sharding, weights
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Backbone, Layout, Tokens
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import Head, HeadSizes, largest, pool_tokens
from vla_jax.models.image import ImageSpec
from vla_jax.models.losses import sentence_loss
from vla_jax.models.state_token import StateToken
from vla_jax.models.structures import settings, splicing
from vla_jax.models.structures.history import History
from vla_jax.models.structures.splicing import Sequence, is_padded, widen
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.resampler import Perceiver, perceiver_weights
from vla_jax.types import Actions, Observation, Prediction


class Structure(nn.Module):
    """Base class of the structures; one is a subclass in its own file and a line in `STRUCTURES`.

    What is here suits a VLM that sees one step at a time: a step is the sequence `<s> · images,
    last camera first · instruction · action tokens · </s>`, hidden states at the action tokens (or
    others, see `readout`) are the features that the head turns into actions, and a policy keeps
    the features of the last steps. A subclass overrides what differs: `sequence` and `pool` for
    another input of the VLM, `targets` for another aim, `step` and `empty_history` for another
    memory, `setup` for modules of its own (call `super().setup()` for the common ones), `loss`,
    `evaluate` and `__call__` for another way to train and to predict.

    Attributes:
        description: what it does, in one line.
        gives: what a head gets: "features" of the steps, or "tokens", scores of next tokens.
        gives_reason: why a head that reads something else is refused.
        one_step_reason: why a head that remembers steps is refused; None where it sees the window.
        tells_language: whether image towers that follow the instruction are told it.
        joint: whether one sequence of the VLM holds the window.
        robovlms_name: RoboVLMs' `history_type` for it; None where it has no such word.
    """

    config: ModelConfig
    arch: Any

    description: ClassVar[str] = ""
    gives: ClassVar[str] = "features"
    gives_reason: ClassVar[str] = ""
    one_step_reason: ClassVar[str | None] = None
    tells_language: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    robovlms_name: ClassVar[str | None] = None

    # ---- What can be asked of a config, before there is a model.

    @classmethod
    def for_head(cls, head: type[Head]) -> type["Structure"]:
        """The module it is with a head: itself, unless some heads take another input."""
        del head
        return cls

    @classmethod
    def refuse_head(cls, head: type[Head]) -> str | None:
        """Why it does not take a head; None when it does."""
        if head.reads != cls.gives:
            return head.reads_reason or cls.gives_reason
        return cls.one_step_reason if head.needs_steps else None

    @classmethod
    def refuse_backbone(cls, backbone: type[Backbone]) -> str | None:
        """Why it does not take a backbone, whatever its sizes; None when it does."""
        if cls.joint and backbone.LAYOUT.images != "spliced":
            return "its images are not part of the sequence, so one sequence holds one step"
        return None

    @classmethod
    def refusals(cls, config: ModelConfig, backbone: Backbone) -> list[str]:
        """Settings it cannot work with, one line each; `backbone` is the config's, complete."""
        return settings.problems(config, backbone)

    @classmethod
    def complete(cls, config: ModelConfig, backbone: Backbone) -> ModelConfig:
        """The config with what it leaves to the backbone filled in."""
        return config

    @classmethod
    def warnings(cls, config: ModelConfig) -> list[str]:
        """Choices that are legal and seldom meant, one sentence each."""
        return []

    @classmethod
    def prompt(cls, config: ModelConfig) -> str:
        """Template of the text, with {instruction}."""
        return BACKBONES[config.backbone.name].PROMPT

    @classmethod
    def prompt_form(cls, config: ModelConfig) -> str:
        """Name of the form of the prompt where a template does not do; "" where it does."""
        return BACKBONES[config.backbone.name].prompt_form(config.backbone.arch)

    @classmethod
    def written(cls, config: ModelConfig) -> int:
        """Columns of the texts that say a chunk, which it learns to write; 0 = it reads none."""
        del config
        return 0

    @classmethod
    def has_action_token(cls, config: ModelConfig) -> bool:
        """Whether features are read at a learned token of their own."""
        return config.structure.readout == "action"

    @classmethod
    def weight_map(cls, config: ModelConfig) -> list[weights.Weight]:
        """RoboVLMs' names of the parameters outside backbone and head."""
        token = weights.Weight("action_token", "action_token")
        rows = [token] if cls.has_action_token(config) else []
        if config.structure.resampler:
            rows += weights.prefixed(perceiver_weights(), "vision_resampler.", "resampler/")
        return rows

    # ---- The model; of these, the properties and `empty_history` need no parameters.

    @property
    def vlm(self) -> Backbone:
        """The backbone without parameters, for what its architecture alone decides."""
        c = self.config
        return BACKBONES[c.backbone.name](self.arch, c.remat, jnp.dtype(c.dtype), parent=None)

    @property
    def image(self) -> ImageSpec:
        """What the image tower takes."""
        return self.vlm.image_spec

    @property
    def layout(self) -> Layout:
        """Where images and actions enter: the backbone's way, or RoboVLMs' for its checkpoints."""
        backbone = BACKBONES[self.config.backbone.name]
        if is_padded(self.config):
            return backbone.ORIGINAL_LAYOUT or backbone.LAYOUT  # None: the two agree
        return backbone.LAYOUT

    @property
    def sizes(self) -> HeadSizes:
        """What the head is told of its input and output."""
        s = self.config.structure
        c = self.config
        return HeadSizes(s.window, s.latent, s.chunk, c.action_dim, c.has_gripper)

    @property
    def word_ids(self) -> int:
        """How many token ids, from 0, may be words."""
        return self.vlm.vocab_size

    @property
    def gripper_is_number(self) -> bool:
        """Whether the predicted gripper is a number like the others, not open above 0."""
        return self.config.gripper_is_number

    @property
    def step_tokens(self) -> int:
        """Tokens of a step's cameras and state in the sequence, k."""
        s, vlm = self.config.structure, self.vlm
        image = s.resampler + 2 * vlm.MARKS if s.resampler else vlm.image_tokens
        return len(s.cameras) * image + bool(s.proprio)  # the state is one token

    def setup(self):
        """The modules that every structure has."""
        c, s, dtype = self.config, self.config.structure, jnp.dtype(self.config.dtype)
        self.backbone = BACKBONES[c.backbone.name](self.arch, c.remat, dtype)
        width = self.backbone.width
        if s.resampler:
            self.resampler = Perceiver(s.resampler, remat=c.remat, dtype=dtype)
        if s.proprio:
            self.state: nn.Module = StateToken(min(width, self.backbone.token_width), dtype)
        if self.has_action_token(c):
            # Zeros, as in the original: latents differ by their position alone.
            self.action_token = self.param("action_token", nn.initializers.zeros, (width,))
        if c.head.down_sample == "resampler":
            self.pooler = Perceiver(s.latent, remat=c.remat, dtype=dtype)
        if c.sentence.dim:
            self.sentence = Dense((c.sentence.dim,), dtype=dtype)
        self.head = HEADS[c.head.kind](c.head, self.sizes, dtype)

    def __call__(self, observation: Observation, key: PRNGKeyArray | None = None) -> Prediction:
        """Preprocessed window -> the chunk at each step the head sees; `key` is for samples."""
        features, valid = self.features(observation)
        return self.head.predict(features, valid, key)

    def loss(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Training loss and its parts: "rows" [b], of each window, and means over all actions."""
        features, valid = self.features(observation, actions)
        return self._loss(features, valid, observation, actions, key, gripper_weight)

    def evaluate(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array], Prediction]:
        """`loss`, and the prediction from the same pass of the VLM."""
        features, valid = self.features(observation, actions)
        total, parts = self._loss(features, valid, observation, actions, key, gripper_weight)
        return total, parts, self.head.predict(features, valid, key)

    def _loss(
        self,
        features: Float[Array, "b u m d"],
        valid: Bool[Array, "b u"],
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        targets = self.targets(observation, actions)
        total, parts = self.head.loss(features, valid, targets, key, gripper_weight)
        if not self.config.sentence.dim:
            return total, parts
        if observation.sentence is None:
            raise ValueError("model.sentence.dim: the batch has no vectors of its instructions")
        # As RoboVLMs' CLIP-norm loss: smooth L1 of what the largest features say.
        guess = self.sentence(largest(features))
        parts = {**parts, "text_l1": sentence_loss(guess, observation.sentence, valid)}
        return total + self.config.sentence.weight * parts["text_l1"], parts

    def supervised(self, actions: Actions) -> Actions:
        """Those of a window's steps that the loss looks at."""
        return actions

    def targets(self, observation: Observation, actions: Actions) -> Any:
        """What the head's loss compares with."""
        del observation
        return self.supervised(actions)

    def features(
        self, observation: Observation, actions: Actions | None = None
    ) -> tuple[Float[Array, "b u m d"], Bool[Array, "b u"]]:
        """What the head reads of every step it sees, and which steps exist.

        `actions` are for structures whose VLM reads them in training.
        """
        del actions
        valid = splicing.step_mask(observation)
        sequence = self.sequence(self.encode(observation), valid, observation)
        hidden = self.backbone(sequence.tokens, for_head=True, columns=sequence.columns)
        features = self.pool(hidden, sequence.read, valid)
        return features, valid[:, -features.shape[1] :]

    def encode(self, observation: Observation) -> Float[Array, "b w k d"]:
        """Tokens of every step's cameras and robot state, in sequence order."""
        images = [observation.images[camera] for camera in self.config.structure.cameras]
        b, w = images[0].shape[:2]
        if len({image.shape for image in images}) == 1:  # then one pass of the tower serves all
            stacked = jnp.stack(images, axis=2)
            tokens = self.backbone.encode_images(stacked.reshape(-1, *stacked.shape[3:]))
        else:  # some towers see large images in tiles
            parts = [self.backbone.encode_images(x.reshape(b * w, *x.shape[2:])) for x in images]
            tokens = jnp.stack(parts, axis=1)
            tokens = tokens.reshape(-1, *tokens.shape[2:])
        if self.config.structure.resampler:
            marks = self.backbone.MARKS  # they stay: the resampler sees what is between them
            before, tokens, behind = jnp.split(tokens, [marks, tokens.shape[1] - marks], axis=1)
            tokens = jnp.concatenate([before, self.resampler(tokens), behind], axis=1)
        tokens = sharding.rows(tokens.reshape(b, w, len(images), *tokens.shape[1:]))
        # Each further camera is inserted at the same column, so the last one comes first.
        tokens = tokens[:, :, ::-1].reshape(b, w, -1, tokens.shape[-1])
        if not self.config.structure.proprio:
            return tokens
        if observation.proprio is None:
            raise ValueError("model.structure.proprio: the observation has no state")
        state = self.state(observation.proprio)[:, :, None]
        return jnp.concatenate([tokens, widen(state, tokens.shape[-1])], axis=2)

    def sequence(
        self, tokens: Float[Array, "b w k d"], valid: Bool[Array, "b w"], observation: Observation
    ) -> Sequence:
        """The VLM's input and the columns to read: here r = b w sequences, each of a step."""
        del valid
        return self.read_out(*self.splice_steps(tokens, observation), observation)

    def splice_steps(
        self,
        tokens: Float[Array, "b w k d"],
        observation: Observation,
        inserted: Float[Array, "r m _"] | None = None,
    ) -> tuple[Tokens, Array]:
        """`splicing.splice` of every step by itself, r = b w; `inserted` as in `splice`."""
        (b, w, k, d), s = tokens.shape, self.config.structure
        text = sharding.rows(self.backbone.embed_text(observation.text))
        text, mask = (jnp.repeat(x, w, axis=0) for x in (text, observation.text_mask))
        place = jnp.broadcast_to(splicing.places(s, k), (b * w, k))
        exist = jnp.ones((b * w, k), bool)
        return self.splice(text, mask, tokens.reshape(b * w, k, d), exist, place, inserted)

    def splice(
        self,
        text: Float[Array, "r t d"],
        mask: Bool[Array, "r t"],
        prefix: Float[Array, "r k c"],
        exist: Bool[Array, "r k"],
        place: Array,
        inserted: Float[Array, "r m _"] | None = None,
    ) -> tuple[Tokens, Array]:
        """`splicing.splice` in this model's layout; inserts the action tokens unless told else."""
        inserted = self.action_tokens(text) if inserted is None else inserted
        padded = is_padded(self.config)
        return splicing.splice(text, mask, prefix, exist, place, inserted, self.layout, padded)

    def action_tokens(self, text: Float[Array, "r t d"]) -> Float[Array, "r m d"]:
        """The learned tokens that stand behind each prompt, if features are read there."""
        if not self.has_action_token(self.config):
            return text[:, :0]
        token = widen(self.action_token.astype(text.dtype), text.shape[-1])
        return jnp.broadcast_to(token, (len(text), self.config.structure.latent, len(token)))

    def read_out(self, tokens: Tokens, first: Array, observation: Observation) -> Sequence:
        """Sequences with the columns that `structure.readout` names.

        Args:
            tokens: of `splice`.
            first: column of the first inserted token.
            observation: whose text they hold.
        """
        s = self.config.structure
        if s.readout == "action":
            columns = first + jnp.arange(s.latent)
            sequence = Sequence(tokens, columns, jnp.ones(columns.shape, bool))
            sees_end = self.joint or self.backbone.looks_ahead
            return sequence if sees_end else splicing.shortened(sequence, self.layout)
        k = tokens.valid.shape[1] - observation.text.shape[1]
        columns, read = splicing.columns_of(s.readout, tokens.valid, first, k, self.layout)
        return Sequence(tokens, columns, read | is_padded(self.config))  # RoboVLMs reads padding

    def pool(
        self, hidden: Float[Array, "*r c d"], read: Bool[Array, "*r c"], valid: Bool[Array, "b u"]
    ) -> Float[Array, "b u m d"]:
        """Hidden states -> what the head sees of every step.

        Args:
            hidden: of the columns read.
            read: which of them hold a token.
            valid: of as many steps as there are in `hidden`.
        """
        hidden = sharding.rows(hidden)
        picked = hidden.reshape(*valid.shape, -1, hidden.shape[-1])
        read = read.reshape(picked.shape[:3])
        s, head = self.config.structure, self.config.head
        b, w = picked.shape[:2]
        if head.down_sample == "pooling":
            return pool_tokens(picked, read, s.latent)
        if head.down_sample == "resampler":
            flat = self.pooler(picked.reshape(b * w, *picked.shape[2:]), read.reshape(b * w, -1))
            return flat.reshape(b, w, *flat.shape[1:])
        return picked

    # ---- Control, a step at a time.

    def empty_history(self, batch: int) -> Any:
        """What `step` takes before the first step of an episode; any pytree of arrays."""
        s, vlm = self.config.structure, self.vlm
        shape = (self.step_tokens, vlm.token_width) if self.joint else (s.latent, vlm.width)
        return History(
            features=jnp.zeros((batch, s.window, *shape), jnp.dtype(self.config.dtype)),
            valid=jnp.zeros((batch, s.window), bool),
        )

    def step(
        self, observation: Observation, history: Any, key: PRNGKeyArray | None = None
    ) -> tuple[Prediction, Any]:
        """One control step: a window of length 1 and the history before it.

        Returns:
            The prediction at the new step ([b, 1, ...]) and the history with it appended.
        """
        if self.joint:  # what is kept goes through the VLM again, with the new step
            history = history.append(self.encode(observation), splicing.step_mask(observation))
            sequence = self.sequence(history.features, history.valid, observation)
            hidden = self.backbone(sequence.tokens, for_head=True, columns=sequence.columns)
            features = self.pool(hidden, sequence.read, history.valid)
        else:
            history = history.append(*self.features(observation))
            features = history.features  # the head sees the steps before, too
        valid = history.valid[:, -features.shape[1] :]
        return self.head.predict(features, valid, key, last=True, guide=observation.guide), history
