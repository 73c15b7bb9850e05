"""All of a chunk in one pass of the VLM, every token seeing every other (OpenVLA-OFT).

    <s> · cameras, the first one first · state · instruction · a place for each number · </s>

The places hold zeros. The hidden state before a place says the number that belongs there, so that
the last token of the prompt says the first, as when a language model writes. The head makes actions
of these states, or of the scores of tokens at them.

Source: openvla-oft 213c5ff `modeling_prismatic.py`, with `modeling_llama.py` of its transformers.

Legend: b batch · k tokens before the prompt · c columns read · d width · v vocabulary
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.config import ModelConfig
from vla_jax.models import sharding
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Backbone, Tokens
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import Head
from vla_jax.models.state_token import StateToken
from vla_jax.models.structures import splicing
from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.discrete import token_problems, with_token_end
from vla_jax.models.structures.history import History
from vla_jax.models.structures.splicing import widen
from vla_jax.models.towers.decoder import bidirectional_mask
from vla_jax.types import Actions, Observation, Prediction


class Parallel(Structure):
    """One step at a time, without a memory."""

    description = "all numbers of a chunk are read in one pass of the VLM, each seeing all others"
    gives = "places"
    gives_reason = "every number of the chunk has a hidden state of its own, which it does not read"
    tells_language = True

    @classmethod
    def refuse_head(cls, head: type[Head]) -> str | None:
        """No reason where a head takes the states at the places or the scores of tokens there."""
        if head.reads == "tokens" and not head.counted:
            return "its tokens of a chunk vary in number, and there is a place for each number"
        if head.reads in (cls.gives, "tokens"):
            return None
        return head.reads_reason or cls.gives_reason

    @classmethod
    def refuse_backbone(cls, backbone: type[Backbone]) -> str | None:
        """The reason to refuse backbones whose tokens cannot all see each other."""
        if backbone.FOR_EXPERT:
            return None
        return "its language model cannot be read with every token seeing every other"

    @classmethod
    def refusals(cls, config: ModelConfig, backbone: Backbone) -> list[str]:
        """Problems: more than one step, another readout, or action ids that are no words."""
        s, problems = config.structure, []
        if s.window != 1:
            problems.append(f"structure.window: parallel has no history: 1, not {s.window}")
        plain = s.latent == 1 and s.readout == "action" and config.head.down_sample == "none"
        if s.resampler or not plain:
            problems.append(
                "parallel reads one hidden state for each number: structure.resampler 0, "
                "structure.latent 1, structure.readout 'action' and head.down_sample 'none', "
                "nothing else"
            )
        if splicing.is_padded(config):
            problems.append(
                "parallel places the numbers behind the prompt, padding or not: "
                "structure.parity.act_insert 'per_row'"
            )
        if config.sentence.dim:
            problems.append("parallel has no features to predict a sentence from: sentence.dim 0")
        # Where the ids of actions lie is only known of a config that is sound so far.
        if not problems and cls._writes(config):
            problems += token_problems(config, backbone)
        return problems

    @classmethod
    def complete(cls, config: ModelConfig, backbone: Backbone) -> ModelConfig:
        """The config, where tokens are read with the id behind the last one for an action."""
        return with_token_end(config, backbone) if cls._writes(config) else config

    @classmethod
    def _writes(cls, config: ModelConfig) -> bool:
        """Whether the numbers are read as tokens."""
        head = HEADS[config.head.kind]
        return head.reads == "tokens" and head.counted

    @classmethod
    def has_action_token(cls, config: ModelConfig) -> bool:
        """False: the places are zeros, which learn nothing."""
        del config
        return False

    @property
    def word_ids(self) -> int:
        """The number of ids that may be words: those below the actions', where there are any."""
        if not self._writes(self.config):
            return super().word_ids
        head: Any = self.config.head
        return head.token_end - head.bins

    def setup(self):
        """Backbone, head, and the state's token where one is read."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.backbone = BACKBONES[c.backbone.name](self.arch, c.remat, dtype)
        self.head = HEADS[c.head.kind](c.head, self.sizes, dtype)
        if c.structure.proprio:
            self.state = StateToken(self.backbone.width, dtype, "gelu")

    def features(
        self, observation: Observation, actions: Actions | None = None
    ) -> tuple[Float[Array, "b 1 c d"], Bool[Array, "b 1"]]:
        """Hidden states, or scores of tokens, of every number of the chunk."""
        del actions  # the places are empty in training too
        tokens, first = self.tokens(observation)
        count = self.config.structure.chunk * self.config.action_dim
        writes = self._writes(self.config)
        # Behind the last number the stop token can be read as well, which training looks at.
        columns = first - 1 + jnp.arange(count + self.layout.eos * writes)
        picked = sharding.rows(self.hidden(tokens, columns))
        if writes:
            picked = sharding.rows(self.backbone.logits(picked))
        return picked[:, None], jnp.ones((len(picked), 1), bool)

    def targets(self, observation: Observation, actions: Actions) -> Any:
        """The actions; of heads that read tokens their ids, and the stop token behind them."""
        if not self._writes(self.config):
            return actions
        args = observation.text, observation.text_mask, self.layout.eos
        return self.head.labels(actions, splicing.last_tokens(*args))

    def tokens(self, observation: Observation) -> tuple[Tokens, Array]:
        """The VLM's input, and the column of the first place."""
        text = sharding.rows(self.backbone.embed_text(observation.text))
        prefix = self.prefix(observation, text)
        b, k = prefix.shape[:2]
        place = jnp.broadcast_to(splicing.places(self.config.structure, k), (b, k))
        count = self.config.structure.chunk * self.config.action_dim
        # The original embeds the true actions in training and multiplies them by 0, which comes to
        # the same and hides what is asked for.
        empty = jnp.zeros((b, count, text.shape[-1]), text.dtype)
        exist = jnp.ones((b, k), bool)
        args = (text, observation.text_mask, prefix, exist, place, empty, self.layout)
        return splicing.splice(*args, padded=False)

    def prefix(
        self, observation: Observation, text: Float[Array, "b t d"]
    ) -> Float[Array, "b k d"]:
        """Tokens of all cameras in their order, then the state's."""
        s = self.config.structure
        pixels = jnp.stack([observation.images[c][:, 0] for c in s.cameras], axis=1)
        b, count = pixels.shape[:2]
        images = pixels.reshape(-1, *pixels.shape[2:])
        condition = ()
        if self.backbone.follows_language:
            # The cameras of a row lie side by side in the batch of images, so each vector is
            # repeated in place.
            condition = (jnp.repeat(self.language(observation, text), count, axis=0),)
        # Backbones whose towers follow nothing take the images alone.
        encode: Any = self.backbone.encode_images
        tokens = encode(images, *condition)
        tokens = sharding.rows(tokens.reshape(b, -1, tokens.shape[-1]))
        if not s.proprio:
            return tokens
        if observation.proprio is None:
            raise ValueError("model.structure.proprio: the observation has no state")
        state = widen(self.state(observation.proprio), tokens.shape[-1])
        return jnp.concatenate([tokens, state], axis=1)

    def language(
        self, observation: Observation, text: Float[Array, "b t d"]
    ) -> Float[Array, "b d"]:
        """What image towers are told of the instruction: the mean of the prompt's embeddings."""
        if self.config.structure.parity.padded_mean:
            return text.mean(axis=1)
        mask = observation.text_mask[..., None].astype(text.dtype)
        return (text * mask).sum(axis=1) / mask.sum(axis=1)

    def hidden(
        self, tokens: Tokens, columns: Int[Array, "b c"] | None = None
    ) -> Float[Array, "b _ d"]:
        """The VLM's last hidden states, of all or some tokens, every real one seeing all others."""
        # The backbone's own call builds a causal mask; this way in takes one from outside.
        mask = bidirectional_mask(tokens.valid)
        return self.backbone.read_prefix(tokens.embeds, tokens.valid, mask, columns).hidden

    def empty_history(self, batch: int) -> History:
        """An empty history, as no step is remembered."""
        # Callers expect arrays with a batch axis even where nothing is remembered.
        return History(jnp.zeros((batch, 1, 0, 0)), jnp.zeros((batch, 1), bool))

    def step(
        self, observation: Observation, history: History, key: Any = None
    ) -> tuple[Prediction, History]:
        """A chunk for what is seen now."""
        return self(observation, key), history
