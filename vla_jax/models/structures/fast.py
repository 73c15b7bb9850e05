"""The VLM writes a chunk as FAST tokens behind its prompt (pi0-FAST): `discrete`, head `fast`.

The sequence is `images · prompt · answer`. The data pipeline writes the answers to train on; in
control the VLM goes on from its prompt, a token a pass, with its keys and values kept.

Legend: b batch · k tokens of cameras and state · t text columns · n columns of an answer
q columns of a sequence · d width · v vocabulary · f chunk · a action dimension
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vla_jax.config import ModelConfig
from vla_jax.models import layers_apart, sharding
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Backbone, Layout, Tokens
from vla_jax.models.heads.fast import Fast, answer_loss
from vla_jax.models.image import ImageSpec
from vla_jax.models.state_token import StateToken
from vla_jax.models.structures import splicing
from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.history import History
from vla_jax.models.structures.splicing import is_padded, widen
from vla_jax.types import Actions, Observation, Prediction

_BLACK = (0.0, 0.0, 0.0)
# Forms of the prompt that say the robot's state; with others it becomes a token.
WITH_STATE = ("pi05", "pi0fast")


class _Answer(NamedTuple):
    """What the loop of `write` carries.

    Attributes:
        cache: of the VLM, which has read all words but the last.
        word: [b], the last one.
        ids: [b, n] written so far.
        progress: of each chunk.
        ended: [b].
        key: of the choices still to come.
        number: of words written.
    """

    cache: Any
    word: Any
    ids: Any
    progress: Any
    ended: Any
    key: Any
    number: Any


class FastTokens(Structure):
    """One step at a time, without a memory."""

    description = "the VLM writes the chunk as FAST tokens behind its prompt"
    gives = "tokens"
    joint = False

    @classmethod
    def refuse_backbone(cls, backbone: type[Backbone]) -> str | None:
        """The reason to refuse backbones whose images are not part of the sequence."""
        if backbone.LAYOUT.images == "spliced":
            return None
        return "its images are not part of the sequence, behind which the answer is written"

    @classmethod
    def refusals(cls, config: ModelConfig, backbone: Backbone) -> list[str]:
        """Problems of settings that a policy which writes has no use for."""
        s, fast, problems = config.structure, config.fast, []
        if s.window != 1:
            problems.append(f"structure.window: FAST tokens have no history: 1, not {s.window}")
        if s.resampler or s.latent != 1 or s.readout != "action":
            problems.append(
                "head fast reads the VLM's own tokens: structure.resampler 0, structure.latent 1 "
                "and structure.readout 'action', nothing else"
            )
        if config.head.down_sample != "none" or config.sentence.dim or is_padded(config):
            problems.append(
                "head fast has no features: head.down_sample 'none', sentence.dim 0 and "
                "structure.parity.act_insert 'per_row'"
            )
        if fast.prompt in WITH_STATE and not s.proprio:
            problems.append(
                f"fast.prompt {fast.prompt!r} has the robot's state in it, which needs "
                "structure.proprio numbers, not 0; 'pi0' does without"
            )
        if fast.length < 1 or fast.blank < 0 or fast.temperature < 0:
            problems.append("fast: length must be positive, blank and temperature not negative")
        if ahead := backbone.looks_ahead:
            problems.append(
                f"{config.backbone.name} + head fast: {ahead.what}, so none could be predicted; "
                f"{ahead.remedy}"
            )
        parity = fast.parity
        if parity.skipped_position and (parity.vocabulary != "all" or not backbone.FOR_EXPERT):
            problems.append(
                "fast.parity.skipped_position needs fast.parity.vocabulary 'all' and a backbone "
                "of openpi's, paligemma"
            )
        end, size = cls._token_end(config, backbone), cls._size(config)
        if not size < end <= backbone.vocab_size:
            problems.append(
                f"fast.token_end {end}: the ids of {size} FAST tokens must lie within the "
                f"vocabulary of {backbone.vocab_size} and leave room for words"
            )
        return problems

    @classmethod
    def complete(cls, config: ModelConfig, backbone: Backbone) -> ModelConfig:
        """The config with the id behind the last one that stands for a FAST token."""
        end = cls._token_end(config, backbone)
        return dataclasses.replace(config, fast=dataclasses.replace(config.fast, token_end=end))

    @classmethod
    def _token_end(cls, config: ModelConfig, backbone: Backbone) -> int:
        return config.fast.token_end or backbone.fast_token_end

    @classmethod
    def _size(cls, config: ModelConfig) -> int:
        # Before a run starts no tokenizer has been read.
        return config.fast.code["fast"]["vocab_size"] if config.fast.code else 1

    @classmethod
    def prompt_form(cls, config: ModelConfig) -> str:
        """The form that the originals write it in; see `vla_jax.data.language.prompts`."""
        return config.fast.prompt

    @classmethod
    def has_action_token(cls, config: ModelConfig) -> bool:
        """False: its action tokens are words of the VLM."""
        del config
        return False

    @classmethod
    def written(cls, config: ModelConfig) -> int:
        """Columns of an answer."""
        return config.fast.length

    @property
    def layout(self) -> Layout:
        """Where images and answers stand."""
        backbone = BACKBONES[self.config.backbone.name]
        return backbone.ANSWER_LAYOUT or backbone.LAYOUT

    @property
    def image(self) -> ImageSpec:
        """What the image tower takes, resized as openpi's data pipeline does if that is wanted."""
        spec = super().image
        if self.config.fast.images == "backbone":
            return spec
        return dataclasses.replace(spec, fit="letterbox", resample="bilinear", background=_BLACK)

    @property
    def word_ids(self) -> int:
        """The number of ids below those that stand for FAST tokens; the rest are no words."""
        return self.config.fast.token_end - self._size(self.config)

    @property
    def has_state_token(self) -> bool:
        """Whether the robot's state is a token rather than a part of the prompt."""
        return self.config.structure.proprio > 0 and self.config.fast.prompt not in WITH_STATE

    def setup(self):
        """Backbone, head and perhaps the token of the state."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.backbone = BACKBONES[c.backbone.name](self.arch, c.remat, dtype)
        self.head = Fast(c.head, self.sizes, dtype, c.fast)
        if self.has_state_token:
            self.state = StateToken(min(self.backbone.width, self.backbone.token_width), dtype)

    def __call__(self, observation: Observation, key: PRNGKeyArray | None = None) -> Prediction:
        """A chunk that the VLM has written, of a window of one step."""
        ids = self.write(observation, jax.random.key(0) if key is None else key)
        return self.head.prediction(self.head.read(ids))

    def loss(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Cross-entropy of every answer, the mean over its tokens, then over the answers."""
        del key, gripper_weight
        if actions.written is None:
            raise ValueError("model.fast: the batch has no answers")
        scores = self.scores(observation, actions.written)
        return answer_loss(scores, actions.written, actions.mask.any((1, 2)))

    def evaluate(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array], Prediction]:
        """`loss`, and what is written; answers that are no chunk count as one of zeros."""
        total, parts = self.loss(observation, actions, key, gripper_weight)
        prediction = self(observation, key)
        is_lost = jnp.isnan(prediction.arm).any((1, 2, 3))
        # One NaN would make the figures of the whole split NaN; 0 is the middle of the range.
        filled = jax.tree.map(lambda x: jnp.nan_to_num(x, nan=0.0), prediction)
        return total, {**parts, "unreadable": is_lost.mean(dtype=jnp.float32)}, filled

    def supervised(self, actions: Actions) -> Actions:
        """All of a chunk, or none: behind an episode's end its last action is written again."""
        any_number = jnp.broadcast_to(actions.mask.any(-1, keepdims=True), actions.mask.shape)
        return dataclasses.replace(actions, mask=any_number)

    def scores(self, observation: Observation, written: Int[Array, "b n"]) -> Float[Array, "b n v"]:
        """Scores of every word of the answers, given those before it (teacher forcing)."""
        # An id of -1, behind an answer's end, would look up the last row of the table.
        tokens, first = self.spliced(observation, jnp.maximum(written, 0))
        # The column before each word predicts it.
        columns = first - 1 + jnp.arange(written.shape[1])
        hidden = sharding.rows(self.backbone(tokens, columns=columns))
        return sharding.rows(self.backbone.logits(hidden))

    def encode(self, observation: Observation) -> Float[Array, "b k d"]:
        """Tokens of the cameras, the first one first, of black images, and of the state."""
        images = [observation.images[c][:, 0] for c in self.config.structure.cameras]
        # A black pixel in the units of the tower.
        spec = self.image
        black = -jnp.asarray(spec.mean, images[0].dtype) / jnp.asarray(spec.std, images[0].dtype)
        blank = jnp.broadcast_to(black, images[0].shape)
        pixels = jnp.stack([*images, *[blank] * self.config.fast.blank], axis=1)
        tokens = self.backbone.encode_images(pixels.reshape(-1, *pixels.shape[2:]))
        tokens = tokens.reshape(len(pixels), -1, tokens.shape[-1])
        if not self.has_state_token:
            return tokens
        if observation.proprio is None:
            raise ValueError("model.structure.proprio: the observation has no state")
        state = widen(self.state(observation.proprio), tokens.shape[-1])
        return jnp.concatenate([tokens, state], axis=1)

    def spliced(
        self, observation: Observation, ids: Int[Array, "b n"]
    ) -> tuple[Tokens, Int[Array, "b 1"]]:
        """The VLM's input with these words behind every prompt, and the column of the first."""
        tokens = self.encode(observation)
        b, k, _ = tokens.shape
        state, images = int(self.has_state_token), len(self.config.structure.cameras)
        # `splicing.places` knows the cameras of the config alone, and black images stand behind
        # them.
        each = jnp.arange(k - state) % ((k - state) // (images + self.config.fast.blank))
        place = jnp.broadcast_to(jnp.append(each, jnp.full(state, -1)), (b, k))
        text = sharding.rows(self.backbone.embed_text(observation.text))
        written = self.backbone.embed_text(ids)
        # Missing cameras are black, and seen, as openpi has it.
        exist = jnp.ones((b, k), bool)
        return self.splice(text, observation.text_mask, tokens, exist, place, written)

    def write(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "b n"]:
        """What the VLM answers; n is `fast.length`.

        Either an answer's first words are given and each token is one that can still become a
        whole chunk, which ends it; or all is the VLM's choice, as openpi has it, and goes on until
        every row has written its end.
        """
        guided = self.config.fast.parity.vocabulary == "chunks"
        b, code = len(observation.text), self.head.code
        # Every answer opens with the same words: to have them written would cost a pass each, and
        # could go wrong.
        begun = jnp.array([code.opening if guided else ()] * b, jnp.int32)
        prompt, first = self.spliced(observation, begun)
        last = first - 1 + begun.shape[1]
        # What stands behind an answer, the end tokens of some prompts, is not read.
        n, count = prompt.embeds.shape[1], self.config.fast.length - begun.shape[1]
        visible = prompt.valid & (jnp.arange(n) <= last)
        run = layers_apart.loop_methods(self.backbone)
        # A cache cannot grow inside of a loop, so it has room for the longest answer.
        cache = run("empty_cache", b, n + count)
        hidden, cache = run("extend", prompt._replace(valid=visible), cache)
        # Behind a chunk stands its end; openpi has zeros behind what was written.
        blank = jnp.full((b, count), code.stop if guided else 0, jnp.int32)
        start = _Answer(
            cache, jnp.zeros(b, jnp.int32), blank, code.begin(b), jnp.zeros(b, bool), key, 0
        )
        following = self._following_token if guided else self._following_word
        # Words that cannot be chosen are not scored: of PaliGemma's table that is nearly all.
        ids = self.head.ids if guided else None

        def choose(answer: Any, hidden: Any) -> Any:
            key, step_key = jax.random.split(answer.key)
            word, answer = following(run("logits", hidden, ids), answer, step_key)
            word = word.astype(jnp.int32)
            written = answer.ids.at[:, answer.number].set(word)
            return answer._replace(word=word, ids=written, key=key, number=answer.number + 1)

        def goes_on(answer: Any) -> Array:
            # All rows share the loop, which therefore ends with the longest answer among them.
            return (answer.number < count) & ~answer.ended.all()

        def write_one(answer: Any) -> Any:
            word = run("embed_text", answer.word[:, None])
            token = Tokens(word, jnp.ones((b, 1), bool), jnp.full((b, 1), -1))
            hidden, cache = run("extend", token, answer.cache, **self._shift)
            return choose(answer._replace(cache=cache), hidden)

        # The last word is chosen and not read any more.
        first = choose(start, splicing.take(hidden, last))
        written = jax.lax.while_loop(goes_on, write_one, first).ids
        return jnp.concatenate([begun, written], axis=1)

    @property
    def _shift(self) -> dict[str, int]:
        # Other backbones' `extend` has no such option.
        return {"shift": 1} if self.config.fast.parity.skipped_position else {}

    def _following_token(
        self, scores: Float[Array, "b 1 v"], answer: Any, key: PRNGKeyArray
    ) -> tuple[Int[Array, "b"], Any]:
        """The id that comes next in a chunk, its end where the chunk is whole."""
        code = self.head.code
        token, may = self.head.choose(scores[:, 0], answer.progress, key)
        moved = code.follow(answer.progress, token)
        # A row that has ended goes along until all have, and must not lose what it has.
        progress = jax.tree.map(lambda x, old: jnp.where(may, x, old), moved, answer.progress)
        ended = ~code.may_follow(progress).any(1)
        word = jnp.where(may, code.token_end - 1 - token, code.stop)
        return word, answer._replace(progress=progress, ended=ended)

    def _following_word(
        self, scores: Float[Array, "b 1 v"], answer: Any, key: PRNGKeyArray
    ) -> tuple[Int[Array, "b"], Any]:
        """The id that comes next, whatever it means."""
        word = self.head.draw(scores, key)[:, 0]
        return word, answer._replace(ended=answer.ended | (word == self.head.code.stop))

    def empty_history(self, batch: int) -> History:
        """An empty history, as no step is remembered."""
        # Callers expect arrays with a batch axis even where nothing is remembered.
        return History(jnp.zeros((batch, 1, 0, 0)), jnp.zeros((batch, 1), bool))

    def step(
        self, observation: Observation, history: History, key: PRNGKeyArray | None = None
    ) -> tuple[Prediction, History]:
        """A chunk for what is seen now, NaN where the answer is none."""
        return self(observation, key), history
