"""One control step at a time: what a policy remembers, and how it goes on from there.

Legend: b batch · w window · k tokens of a step before the text · c columns read of a step
n columns of a step · d width · m features of a step · f a action tokens of a step
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from vla_jax.models import structures
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Tokens
from vla_jax.models.structures import STRUCTURES, splicing
from vla_jax.types import Observation, Prediction


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """A sequence that the VLM has read as far as it goes (interleaved).

    Attributes:
        cache: of the backbone, w n slots.
        picked: [b, w, c, d], the hidden states read of the last w steps.
        read: bool [b, w, c], False where they are of padding.
    """

    cache: Any
    picked: Any
    read: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What a policy remembers of the steps so far, oldest first; the newest is at the end.

    Attributes:
        features: of the last w steps: [b, w, m, d], the features, where the VLM sees one step;
            [b, w, k, d], the tokens of cameras and state, where it sees the window.
        valid: bool [b, w], False where no step has been taken yet.
        ids: int32 [b, w, f a], the action tokens written at those steps; f a = 0 in structures
            that write none.
        reading: where the VLM goes on reading instead of starting again; else None.
    """

    features: Any
    valid: Any
    ids: Any
    reading: Reading | None = None

    def append(self, features: Array, valid: Array) -> "History":
        """With one step more at the end, and without the oldest; its ids are still 0."""
        return dataclasses.replace(
            self,
            features=_append(self.features, features),
            valid=_append(self.valid, valid),
            ids=_append(self.ids, jnp.zeros_like(self.ids[:, :1])),
        )


def _append(past: Array, new: Array) -> Array:
    return jnp.concatenate([past[:, 1:], new.astype(past.dtype)], axis=1)


def goes_on(config: Any) -> bool:
    """Whether a window is read on with a cache: interleaved, unless laid out as the original."""
    return config.kind == "interleaved" and config.parity.act_insert == "per_row"


def empty_history(model: Any, batch: int) -> History:
    """History of a `VLA` before the first step of an episode."""
    c, s = model.config, model.config.structure
    file, module = BACKBONES[c.backbone.name]
    joint, dtype = STRUCTURES[s.kind].joint, jnp.dtype(c.dtype)
    images = len(s.cameras) * structures.image_count(c, model.arch) + bool(s.proprio)
    kept, width = s.latent, file.width(model.arch)
    if joint:
        kept, width = images, file.token_width(model.arch)
    written = s.chunk * c.action_dim if s.kind == "discrete" else 0
    reading = None
    if goes_on(s):
        # A step: its images, its text, its action tokens.
        inserted = s.latent * (s.readout == "action")
        count = inserted or splicing.read_count(
            s.readout, s.text_len, images, structures.layout_of(c)
        )
        backbone = module(model.arch, c.remat, dtype)
        slots = s.window * (images + s.text_len + inserted)
        reading = Reading(
            cache=backbone.apply({}, batch, slots, method="empty_cache"),
            picked=jnp.zeros((batch, s.window, count, file.width(model.arch)), dtype),
            read=jnp.zeros((batch, s.window, count), bool),
        )
    return History(
        features=jnp.zeros((batch, s.window, kept, width), dtype),
        valid=jnp.zeros((batch, s.window), bool),
        ids=jnp.zeros((batch, s.window, written), jnp.int32),
        reading=reading,
    )


def step(
    model: Any, observation: Observation, history: History, key: Any
) -> tuple[Prediction, History]:
    """`VLA.step` of a bound model."""
    s, seen = model.config.structure, splicing.step_mask(observation)
    tokens, joint = model.encode(observation), STRUCTURES[s.kind].joint
    if goes_on(s):
        history = _read_on(model, observation, history, tokens, seen)
        assert history.reading is not None
        features = model.pool(history.reading.picked, history.reading.read)
        return model.head.predict(features, history.valid, key, last=True), history
    kept = tokens if joint else model.read(model.sequence(tokens, seen, observation), seen)
    history = history.append(kept, seen)
    if s.kind == "discrete":
        return _write(model, observation, history)
    features, valid = history.features, history.valid
    if joint:
        features = model.read(model.sequence(features, valid, observation), valid)
    valid = valid[:, -features.shape[1] :]
    return model.head.predict(features, valid, key, last=True), history


def _read_on(
    model: Any, observation: Observation, history: History, tokens: Array, seen: Bool[Array, "b 1"]
) -> History:
    """The VLM reads the new step; where the window is full, it reads what is left of it anew."""
    s, old = model.config.structure, history.reading
    assert old is not None
    full = history.valid.all(axis=1)
    history = history.append(tokens, seen)
    b, w = history.valid.shape
    # The oldest has gone; with `slide` more of them go, so that the next steps find room.
    leaves = full[:, None] & (jnp.arange(w) < s.slide - 1)
    history = dataclasses.replace(history, valid=history.valid & ~leaves)
    window = model.sequence(history.features, history.valid, observation)
    newest = model.sequence(tokens, seen, observation)
    # Bound methods of submodules cannot enter a branch of jax's.
    backbone, variables = model.backbone.unbind()

    def read(sequence: splicing.Sequence, cache: Any) -> tuple[Any, Array]:
        hidden, cache = backbone.apply(variables, sequence.tokens, cache, method="extend")
        picked = splicing.take(hidden, sequence.columns).astype(old.picked.dtype)
        return cache, picked.reshape(b, -1, *old.picked.shape[2:])

    def anew() -> Reading:
        cache, picked = read(window, jax.tree.map(jnp.zeros_like, old.cache))
        return Reading(cache, picked, window.read.reshape(old.read.shape))

    def further() -> Reading:
        cache, picked = read(newest, old.cache)
        kept = _append(old.picked, picked), _append(old.read, newest.read.reshape(b, 1, -1))
        return Reading(cache, *kept)

    reading = jax.lax.cond(full.any(), anew, further)
    return dataclasses.replace(history, reading=reading)


def _write(model: Any, observation: Observation, history: History) -> tuple[Prediction, History]:
    """Greedy decoding of the newest step's tokens, one pass over the prompt and one a token."""
    sequence = model.sequence(history.features, history.valid, observation, history.ids)
    b, n, _ = sequence.tokens.embeds.shape
    # The column before the newest step's first token is the last one known.
    known = sequence.columns.reshape(*history.valid.shape, -1)[:, -1, :1]
    seen = sequence.tokens.valid & (jnp.arange(n) <= known)
    prompt = sequence.tokens._replace(valid=seen)
    # Bound methods of submodules cannot enter a loop of jax's.
    backbone, variables = model.backbone.unbind()

    def run(method: str, *args: Any) -> Any:
        return backbone.apply(variables, *args, method=method)

    def write(state: tuple[Any, Array], _: None) -> tuple[tuple[Any, Array], Array]:
        cache, hidden = state
        chosen = model.head.choose(run("logits", hidden))
        one = jnp.ones((b, 1), bool)
        token = Tokens(run("embed_text", chosen), one, jnp.full(one.shape, -1))
        hidden, cache = run("extend", token, cache)
        return (cache, hidden), chosen[:, 0]

    hidden, cache = run("extend", prompt, run("empty_cache", b, n))
    start = (cache, splicing.take(hidden, known))
    _, ids = jax.lax.scan(write, start, None, length=history.ids.shape[-1])
    ids = ids.T.astype(jnp.int32)
    history = dataclasses.replace(history, ids=history.ids.at[:, -1].set(ids))
    return model.head.decode(ids[:, None]), history


def write_window(model: Any, observation: Observation) -> Prediction:
    """The discrete structure over a window: step by step, given what was written before."""
    b, w = splicing.step_mask(observation).shape
    history, predictions = empty_history(model, b), []
    for i in range(w):
        now = {
            name: jax.tree.map(lambda x, i=i: x[:, i : i + 1], getattr(observation, name))
            for name in ("images", "image_mask", "proprio")
        }
        prediction, history = step(model, dataclasses.replace(observation, **now), history, None)
        predictions.append(prediction)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *predictions)
