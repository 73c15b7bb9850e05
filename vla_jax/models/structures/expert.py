"""An action expert beside the VLM's layers (pi0, pi0.5, SmolVLA).

The VLM reads cameras and prompt once, every token seeing every other; the expert's layers attend to
its keys and values while the actions are denoised.

Legend: b batch · p tokens of the VLM · n words of an answer · v vocabulary · d width · f chunk
w padded width
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.config import ModelConfig
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Backbone
from vla_jax.models.heads.expert_flow import ExpertFlow
from vla_jax.models.heads.fast import answer_loss
from vla_jax.models.image import ImageSpec
from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.history import History
from vla_jax.models.towers.decoder import Cache, Result
from vla_jax.models.towers.expert import Expert as Tower
from vla_jax.models.towers.expert import (
    ExpertSpec,
    Modulations,
    blocks_mask,
    expert_spec,
    positions_after,
)
from vla_jax.models.towers.layers import Dense
from vla_jax.types import Actions, Observation, Prediction

_BLACK = (0.0, 0.0, 0.0)


class Expert(Structure):
    """One step at a time, without a memory; actions are samples."""

    description = "an expert of its own width reads the VLM's layers and denoises the actions"
    gives = "expert"
    gives_reason = "the expert itself makes the actions, so it takes the head that denoises"
    joint = False

    @classmethod
    def refuse_backbone(cls, backbone: type[Backbone]) -> str | None:
        """The reason to refuse backbones whose decoder cannot be read layer by layer."""
        if backbone.FOR_EXPERT:
            return None
        return "its language model does not hand out keys and values for an expert"

    @classmethod
    def refusals(cls, config: ModelConfig, backbone: Backbone) -> list[str]:
        """Problems: more than one step, a readout, or no state where one enters."""
        s, e, problems = config.structure, config.expert, []
        if s.window != 1:
            problems.append(f"structure.window: expert has no history: 1, not {s.window}")
        if s.resampler or s.latent != 1 or s.readout != "action":
            problems.append(
                "expert reads all tokens of the VLM: structure.resampler 0, structure.latent 1 and "
                "structure.readout 'action', nothing else"
            )
        if config.sentence.dim:
            problems.append("expert has no features to predict a sentence from: sentence.dim 0")
        if e.state != "none" and not s.proprio:
            problems.append(f"expert.state {e.state!r} needs structure.proprio numbers, not 0")
        if e.prompt in ("pi05", "pi0fast") and not s.proprio:
            problems.append(
                f"expert.prompt {e.prompt!r} has the robot's state in it, which needs "
                "structure.proprio numbers, not 0; 'pi0' does without"
            )
        if e.fast_weight < 0 or (e.fast_weight and config.fast.length < 1):
            problems.append("expert.fast_weight must not be negative, fast.length positive")
        if max(s.proprio, config.action_dim) > e.padded:
            problems.append(
                f"expert.padded: {e.padded} is less than the {s.proprio} numbers of the state or "
                f"the {config.action_dim} of an action"
            )
        try:
            cls.expert_spec(config, backbone)
        except ValueError as error:
            problems.append(str(error))
        return problems

    @classmethod
    def expert_spec(cls, config: ModelConfig, backbone: Backbone) -> ExpertSpec:
        """The expert's structural facts, of its settings and the VLM's."""
        e = config.expert
        text = backbone.text_spec
        return expert_spec(text, e.width, e.hidden, e.adaptive, e.layers, e.joint_every)

    @classmethod
    def prompt_form(cls, config: ModelConfig) -> str:
        """The form that the originals write it in; see `vla_jax.data.language.prompts`."""
        return config.expert.prompt

    @classmethod
    def written(cls, config: ModelConfig) -> int:
        """Columns of an answer, where the VLM learns to write beside the expert."""
        return config.fast.length if config.expert.fast_weight else 0

    @classmethod
    def complete(cls, config: ModelConfig, backbone: Backbone) -> ModelConfig:
        """The config with the id behind the last one that stands for a FAST token."""
        end = config.fast.token_end or backbone.fast_token_end
        return dataclasses.replace(config, fast=dataclasses.replace(config.fast, token_end=end))

    @classmethod
    def has_action_token(cls, config: ModelConfig) -> bool:
        """False: its actions are tokens of the expert."""
        del config
        return False

    @property
    def image(self) -> ImageSpec:
        """What the image tower takes, resized as the original's data pipeline does."""
        # The expert was trained on images resized its own way, which need not be the backbone's.
        spec, way = super().image, self.config.expert.images
        if way == "backbone":
            return spec
        resample = {"openpi": "bilinear", "lerobot": "linear_aliased"}[way]
        return dataclasses.replace(
            spec, fit="letterbox", resample=resample, background=_BLACK, corner=way == "lerobot"
        )

    def setup(self):
        """Backbone, expert and head."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.backbone = BACKBONES[c.backbone.name](self.arch, c.remat, dtype)
        self.expert = Tower(self.expert_spec(c, self.backbone), c.remat, dtype)
        options: Any = c.head  # of this head's class, as `legality` takes no other
        self.head = ExpertFlow(options, self.sizes, dtype, c.expert)
        if c.expert.state == "prefix":
            self.state = Dense((self.backbone.width,), dtype=dtype)

    def __call__(self, observation: Observation, key: PRNGKeyArray | None = None) -> Prediction:
        """A sampled chunk, of a window of one step."""
        if key is None:
            raise ValueError("expert: actions are samples, which need a key")
        # Noise has the padded width: the model denoises its padding as well.
        shape = (len(observation.text), self.config.structure.chunk, self.config.expert.padded)
        start = jax.random.normal(key, shape)
        return self.head.prediction(self.sample(observation, start))

    def loss(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error of the velocity at one random time; the gripper as the arm.

        With `expert.fast_weight` also the cross-entropy of the chunk's FAST tokens.
        """
        del gripper_weight
        assert key is not None
        noise, time = self.head.draw(key, len(observation.text))
        weight = self.config.expert.fast_weight
        if not weight:
            error, _ = self.errors(observation, actions, noise, time)
            return self.head.flow_loss(error, actions)
        if actions.written is None:
            raise ValueError("model.expert.fast_weight: the batch has no answers")
        prefix, scores = self.prefix_and_answer(observation, actions.written)
        error, _ = self.errors(observation, actions, noise, time, prefix)
        flow, parts = self.head.flow_loss(error, actions)
        words, more = answer_loss(scores, actions.written, actions.mask.any((1, 2)))
        rows = parts["rows"] + weight * more["rows"]
        return flow + weight * words, {**parts, **more, "rows": rows}

    def evaluate(
        self,
        observation: Observation,
        actions: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array], Prediction]:
        """`loss`, and a sample."""
        total, parts = self.loss(observation, actions, key, gripper_weight)
        return total, parts, self(observation, key)

    def errors(
        self,
        observation: Observation,
        actions: Actions,
        noise: Float[Array, "b f w"],
        time: Float[Array, "b"],
        prefix: Result | None = None,
    ) -> tuple[Float[Array, "b f"], Float[Array, "b f w"]]:
        """Squared errors of every action at given noise and times, and the velocities."""
        noisy, wanted = self.head.mix(self.head.values(actions), noise, time)
        result = self.prefix(observation) if prefix is None else prefix
        velocity = self.velocity(result.cache, observation.proprio, noisy, time)
        return self.head.errors(velocity, wanted), velocity

    def prefix(self, observation: Observation) -> Result:
        """The VLM on cameras and prompt: keys and values, no hidden states."""
        embeds, valid, mask = self.prefix_tokens(observation)
        # The expert reads keys and values of all layers, and no hidden state.
        none = jnp.zeros((len(valid), 0), jnp.int32)
        return self._insulated(self.backbone.read_prefix(embeds, valid, mask, none))

    def _insulated(self, result: Result) -> Result:
        if not self.config.expert.insulate:
            return result
        # Knowledge insulation (pi0.5): the velocity's gradient must not change the VLM.
        return Result(result.hidden, None, jax.lax.stop_gradient(result.cache))

    def prefix_and_answer(
        self, observation: Observation, written: Int[Array, "b n"]
    ) -> tuple[Result, Float[Array, "b n v"]]:
        """`prefix`, and the VLM's scores of every word of the answers, in one pass.

        The answers stand behind the prefix, which does not see them, and neither does the expert.
        """
        embeds, valid, mask = self.prefix_tokens(observation)
        (b, p), n = valid.shape, written.shape[1]
        words = self._words(jnp.maximum(written, 0))
        exists = jnp.concatenate([valid, written >= 0], axis=1)
        # A word sees the prefix and the words up to itself.
        visible = jnp.concatenate(
            [jnp.ones((n, p), bool), jnp.tril(jnp.ones((n, n), bool))], axis=1
        )
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, n)))
        mask = jnp.concatenate([mask, visible & exists[:, None]], axis=1)
        both = jnp.concatenate([embeds, words.astype(embeds.dtype)], axis=1)
        # The last token of a prefix, which padding may follow, predicts the first word.
        last = p - 1 - jnp.argmax(valid[:, ::-1], axis=1, keepdims=True)
        columns = jnp.concatenate(
            [last, jnp.broadcast_to(p + jnp.arange(n - 1), (b, n - 1))], axis=1
        )
        result = self.backbone.read_prefix(both, exists, mask, columns)
        scores, cache = self.backbone.logits(result.hidden), result.cache
        prefix = Cache(
            cache.keys[:, :, :p], cache.values[:, :, :p], valid, valid.sum(1, dtype=jnp.int32)
        )
        return self._insulated(Result(None, None, prefix)), scores

    def prefix_tokens(
        self, observation: Observation
    ) -> tuple[Float[Array, "b p d"], Bool[Array, "b p"], Bool[Array, "b p p"]]:
        """Cameras in their order, the prompt and perhaps the state; which exist; who sees whom."""
        images, exists = self.encode_cameras(observation)
        text = self._words(observation.text)
        parts, valid = [images, text], [exists, observation.text_mask]
        if self.config.expert.state == "prefix":
            parts.append(self.state(self._padded_state(observation)))
            valid.append(jnp.ones((len(text), 1), bool))
        embeds, valid = jnp.concatenate(parts, axis=1), jnp.concatenate(valid, axis=1)
        # The state, if it is there, begins a block of its own.
        starts = jnp.arange(embeds.shape[1]) >= images.shape[1] + text.shape[1]
        return embeds, valid, blocks_mask(starts) & valid[:, None]

    def _words(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        words = self.backbone.embed_text(ids)
        # SmolVLA was trained with its prefix scaled by this root.
        return words * self.backbone.width**0.5 if self.config.expert.scaled_prefix else words

    def encode_cameras(
        self, observation: Observation
    ) -> tuple[Float[Array, "b k d"], Bool[Array, "b k"]]:
        """Image tokens with the marks around each, the first camera first, and which are seen.

        The marks of a camera that is not there are.
        """
        e, cameras = self.config.expert, self.config.structure.cameras
        # All cameras pass the tower as one batch, camera after camera within a row.
        pixels = jnp.stack([observation.images[c][:, 0] for c in cameras], axis=1)
        b, count = pixels.shape[:2]
        tokens = self.backbone.encode_images(pixels.reshape(-1, *pixels.shape[2:]))
        if e.scaled_prefix:
            tokens = tokens * self.backbone.width**0.5
        # One flag an image, in the order of `pixels`.
        exists = jnp.concatenate([observation.image_mask[c] for c in cameras], axis=1).reshape(
            -1, 1
        )
        parts, valid = [tokens], [jnp.broadcast_to(exists, tokens.shape[:2])]
        # The second index is 2 because the first insertion has moved the tokens to 1.
        for ids, place in ((e.marks_before, 0), (e.marks_behind, 2)):
            marks = self.backbone.embed_text(jnp.array([ids], jnp.int32))
            shape = (b * count, len(ids))
            parts.insert(place, jnp.broadcast_to(marks, (*shape, marks.shape[-1])))
            valid.insert(place, jnp.ones(shape, bool))
        tokens, valid = jnp.concatenate(parts, axis=1), jnp.concatenate(valid, axis=1)
        return tokens.reshape(b, -1, tokens.shape[-1]), valid.reshape(b, -1)

    def velocity(
        self,
        cache: Cache,
        state: Array | None,
        noisy: Float[Array, "b f w"],
        time: Float[Array, "b"],
        level: Modulations | None = None,
    ) -> Float[Array, "b f w"]:
        """What the expert says of a noisy chunk.

        Args:
            cache: of `prefix`.
            state: [b, 1, s], the robot's, where the expert reads it.
            noisy: the chunk.
            time: 1 is noise, 0 the action.
            level: what adaptive norms make of the time, if that was made before.
        """
        x = self.head.tokens(noisy, time)
        chunk = x.shape[1]
        # The state sees itself alone; the first action begins a block of its own.
        starts = jnp.ones(chunk, bool) if self.config.expert.causal else jnp.arange(chunk) == 0
        if self.config.expert.state == "expert":
            assert state is not None
            x = jnp.concatenate([self.head.state_token(state[:, 0]), x], axis=1)
            starts = jnp.concatenate([jnp.ones(1, bool), starts])
        # Padding and missing cameras take no positions, so the actions follow the last real token.
        positions = positions_after(cache.valid, x.shape[1])
        # The state token, if any, stands first and predicts nothing.
        made = self.head.level(time) if level is None else level
        hidden = self.expert(x, cache, blocks_mask(starts), positions, made)
        return self.head.velocity(hidden[:, -chunk:])

    def sample(
        self, observation: Observation, start: Float[Array, "b f w"]
    ) -> Float[Array, "b f w"]:
        """Noise -> a chunk; the VLM runs once for all the steps."""
        cache, state = self.prefix(observation).cache, observation.proprio
        times = self.head.times
        # What depends on the time alone is made for all steps at once.
        level = self.head.level(times)
        modulations = None if level is None else self.expert.modulations(level)
        # Bound methods of submodules cannot enter a loop of jax's.
        model, variables = self.unbind()

        def velocity(x: Array, i: Array) -> Any:
            level_of_step = jax.tree.map(lambda leaf: leaf[i], modulations)
            time = jnp.full(x.shape[:1], times[i], jnp.float32)
            return model.apply(variables, cache, state, x, time, level_of_step, method="velocity")

        return self.head.integrate(start, velocity, observation.guide)

    def empty_history(self, batch: int) -> History:
        """An empty history, as no step is remembered."""
        # Callers expect arrays with a batch axis even where nothing is remembered.
        return History(jnp.zeros((batch, 1, 0, 0)), jnp.zeros((batch, 1), bool))

    def step(
        self, observation: Observation, history: History, key: PRNGKeyArray | None = None
    ) -> tuple[Prediction, History]:
        """A chunk for what is seen now."""
        return self(observation, key), history

    def _padded_state(self, observation: Observation) -> Float[Array, "b 1 w"]:
        # A robot may have fewer numbers of state than the projection was trained on.
        padding = self.config.expert.padded - self.config.structure.proprio
        assert observation.proprio is not None
        return jnp.pad(observation.proprio, [(0, 0), (0, 0), (0, padding)])
