"""The VLM writes the actions of each step of the window as tokens (RoboVLMs' discrete policy).

Its head is no network but a code: `Detokenizer` turns chunks into token ids (`encode`), says which
ids the columns should predict (`labels`), picks ids from scores (`choose`) and reads them back
(`decode`).

Legend: b batch · w window · k tokens of a step before the text · n columns of a sequence
c columns that predict a token · v vocabulary · f a action tokens of a step
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from vla_jax.config import ModelConfig
from vla_jax.models import layers_apart, sharding
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Backbone, Tokens
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import Head
from vla_jax.models.structures import splicing
from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.fast import FastTokens
from vla_jax.models.structures.history import History, append_step
from vla_jax.models.structures.splicing import Sequence, is_padded
from vla_jax.types import Actions, ArrayT, Observation, Prediction, pytree


@pytree
@dataclass(frozen=True)
class Written(History):
    """The tokens of the last steps' cameras and state, and what was written there.

    Attributes:
        ids: of the tokens.
    """

    ids: Int32[ArrayT, "*b w fa"]

    def append(self, features: Array, valid: Array) -> "Written":
        """The history with one step more, whose ids are still 0."""
        # The ids are written into this slot once the step is decoded.
        blank = jnp.zeros_like(self.ids[:, :1])
        return Written(
            append_step(self.features, features),
            append_step(self.valid, valid),
            append_step(self.ids, blank),
        )


def with_token_end(config: ModelConfig, backbone: Backbone) -> ModelConfig:
    """The config with the id behind the last one that stands for an action."""
    head: Any = config.head  # the detokenizer's
    end = head.token_end or backbone.token_end
    return dataclasses.replace(config, head=dataclasses.replace(head, token_end=end))


def token_problems(config: ModelConfig, backbone: Backbone) -> list[str]:
    """Why the ids of actions do not fit the vocabulary; [] where they do."""
    head: Any = with_token_end(config, backbone).head
    words = backbone.vocab_size
    if head.bins < head.token_end <= words:
        return []
    return [
        f"head.token_end {head.token_end}, head.bins {head.bins}: action ids must lie within the "
        f"vocabulary of {words} and leave room for words"
    ]


class Discrete(Structure):
    """A step's chunk is written behind its prompt, and read with it by the steps after."""

    description = "the VLM writes the actions of each step of the window as tokens"
    gives = "tokens"
    gives_reason = "the VLM itself writes the actions, so no other head is needed"
    joint = True

    @classmethod
    def for_head(cls, head: type[Head]) -> type[Structure]:
        """Itself where a chunk is always as many tokens; else the VLM writes until it ends."""
        return cls if head.counted else FastTokens

    @classmethod
    def refuse_backbone(cls, backbone: type[Backbone]) -> str | None:
        """No backbone is refused: images outside the sequence only limit the window to 1."""
        del backbone
        return None

    @classmethod
    def refusals(cls, config: ModelConfig, backbone: Backbone) -> list[str]:
        """Problems of settings that a policy which writes has no use for."""
        s, head = config.structure, config.head
        problems = super().refusals(config, backbone)
        # Images outside the sequence belong to all of it, so a second step could not bring its own.
        if backbone.LAYOUT.images != "spliced" and s.window != 1:
            problems.append(
                f"{config.backbone.name} + discrete: its images are not part of the sequence, so "
                f"structure.window must be 1, not {s.window}"
            )
        if s.latent != 1 or s.readout != "action" or head.down_sample != "none":
            problems.append(
                "discrete reads the VLM's own tokens: structure.latent 1, structure.readout "
                "'action' and head.down_sample 'none', nothing else"
            )
        if is_padded(config):
            problems.append(
                "discrete writes behind the prompt, padding or not: "
                "structure.parity.act_insert 'per_row'"
            )
        if config.sentence.dim:
            problems.append("discrete has no features to predict a sentence from: sentence.dim 0")
        if ahead := backbone.looks_ahead:
            problems.append(
                f"{config.backbone.name} + discrete: {ahead.what}, so none could be predicted; "
                f"{ahead.remedy}"
            )
        # Only a config that is sound so far says where its action ids would lie.
        if problems or cls.refuse_head(HEADS[head.kind]):
            return problems
        return token_problems(config, backbone)

    @classmethod
    def complete(cls, config: ModelConfig, backbone: Backbone) -> ModelConfig:
        """The config with the id behind the last one that stands for an action."""
        return with_token_end(config, backbone)

    @classmethod
    def warnings(cls, config: ModelConfig) -> list[str]:
        """A warning where the chunks of earlier steps hold the answer."""
        s = config.structure
        if s.window == 1 or s.chunk == 1:
            return []
        return [
            f"model.structure: discrete with window = {s.window} and chunk = {s.chunk} sees in "
            "training the true chunks of the steps before, which hold the actions it is asked "
            "for, and learns to copy them; window = 1 sees none"
        ]

    @classmethod
    def prompt(cls, config: ModelConfig) -> str:
        """RoboVLMs' question, in the words around it that the backbone wants."""
        chunk = config.structure.chunk
        actions = "action" if chunk == 1 else f"{chunk} step actions"
        question = f"What {actions} should the robot take to {{instruction}}?"
        return BACKBONES[config.backbone.name].QUESTION.format(question=question)

    @classmethod
    def has_action_token(cls, config: ModelConfig) -> bool:
        """False: its action tokens are words of the VLM."""
        del config
        return False

    @property
    def word_ids(self) -> int:
        """The number of ids below those that stand for actions; the rest are no words."""
        head: Any = self.config.head
        return head.token_end - head.bins

    def __call__(self, observation: Observation, key: PRNGKeyArray | None = None) -> Prediction:
        """A window, step by step, given what was written before."""
        b, w = splicing.step_mask(observation).shape
        history, predictions = self.empty_history(b), []
        for i in range(w):
            # Each step must see what was written before it, so a window is run like an episode.
            step_fields = {
                name: jax.tree.map(lambda x, i=i: x[:, i : i + 1], getattr(observation, name))
                for name in ("images", "image_mask", "proprio")
            }
            prediction, history = self.step(
                dataclasses.replace(observation, **step_fields), history, key
            )
            predictions.append(prediction)
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *predictions)

    def targets(self, observation: Observation, actions: Actions) -> Int[Array, "b w c"]:
        """Labels of the columns read: the chunk's ids, and the prompt's last one as the stop."""
        args = observation.text, observation.text_mask, self.layout.eos
        return self.head.labels(actions, splicing.last_tokens(*args))

    def features(
        self, observation: Observation, actions: Actions | None = None
    ) -> tuple[Float[Array, "b w c v"], Bool[Array, "b w"]]:
        """Scores of next tokens, each given the true ones before it (teacher forcing)."""
        valid, tokens = splicing.step_mask(observation), self.encode(observation)
        ids = None if actions is None else self.head.encode(actions)
        sequence = self.sequence(tokens, valid, observation, ids)
        hidden = self.backbone(sequence.tokens, columns=sequence.columns)
        return self.scores(hidden, valid), valid

    def sequence(
        self,
        tokens: Float[Array, "b w k d"],
        valid: Bool[Array, "b w"],
        observation: Observation,
        ids: Int[Array, "b w fa"] | None = None,
    ) -> Sequence:
        """Sequences of a window each, r = b: step after step, with what is written there."""
        b, w = valid.shape
        if ids is None:
            ids = jnp.zeros((b, w, 0), jnp.int32)
        written = self.backbone.embed_text(ids.reshape(b * w, -1))
        spliced, first = self.splice_steps(tokens, observation, written)
        # The column before each written token predicts it; the last one predicts the stop.
        columns = first - 1 + jnp.arange(ids.shape[-1] + self.layout.eos)
        sequence = Sequence(spliced, columns, jnp.ones(columns.shape, bool))
        if spliced.images is not None:  # and so w = 1
            return sequence
        return splicing.join(sequence, valid, padded=False)

    def scores(
        self, hidden: Float[Array, "b m d"], valid: Bool[Array, "b w"]
    ) -> Float[Array, "b w c v"]:
        """Hidden states of the columns read, m = w c -> scores of next tokens."""
        hidden = sharding.rows(hidden)
        picked = hidden.reshape(*valid.shape, -1, hidden.shape[-1])
        # Dimension 0 must stay the rows of the batch, which the devices split.
        flat = picked.reshape(len(valid), -1, picked.shape[-1])
        return sharding.rows(self.backbone.logits(flat)).reshape(*picked.shape[:3], -1)

    def empty_history(self, batch: int) -> Written:
        """The history before the first step of an episode."""
        s, past = self.config.structure, super().empty_history(batch)
        ids = jnp.zeros((batch, s.window, s.chunk * self.config.action_dim), jnp.int32)
        return Written(past.features, past.valid, ids)

    def step(
        self, observation: Observation, history: Written, key: PRNGKeyArray | None = None
    ) -> tuple[Prediction, Written]:
        """Greedy decoding of the newest step's tokens: one pass over the prompt, one a token."""
        del key
        # The newest step has zeros for ids as yet: its columns exist, but the mask below hides
        # them.
        history = history.append(self.encode(observation), splicing.step_mask(observation))
        sequence = self.sequence(history.features, history.valid, observation, history.ids)
        b, n, _ = sequence.tokens.embeds.shape
        # The column before the newest step's first token is the last one known.
        last_column = sequence.columns.reshape(*history.valid.shape, -1)[:, -1, :1]
        visible = sequence.tokens.valid & (jnp.arange(n) <= last_column)
        # The blank ids behind that column would otherwise be read as actions.
        prompt = sequence.tokens._replace(valid=visible)
        run = layers_apart.loop_methods(self.backbone)

        def write(state: tuple[Any, Array], _: None) -> tuple[tuple[Any, Array], Array]:
            cache, hidden = state
            # Words that may not be written are not scored: their table is a tenth of the weights.
            chosen = self.head.choose(run("logits", hidden, self.head.ids))
            is_valid = jnp.ones((b, 1), bool)
            token = Tokens(run("embed_text", chosen), is_valid, jnp.full(is_valid.shape, -1))
            hidden, cache = run("extend", token, cache)
            return (cache, hidden), chosen[:, 0]

        # The cache has slots for the whole sequence: `extend` overwrites those of the hidden
        # columns.
        hidden, cache = run("extend", prompt, run("empty_cache", b, n))
        start = (cache, splicing.take(hidden, last_column))
        # Every pass picks the next token from the hidden state of the last, so n tokens take n
        # passes.
        _, ids = jax.lax.scan(write, start, None, length=history.ids.shape[-1])
        ids = ids.T.astype(jnp.int32)
        history = dataclasses.replace(history, ids=history.ids.at[:, -1].set(ids))
        return self.head.decode(ids[:, None]), history
