"""OFA's own: relative positions, cameras on one grid, the decoder's cache, what is refused."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import tiny
from vla_jax.models.backbones import ofa
from vla_jax.models.caption_loss import caption_loss
from vla_jax.models.towers.encoder_decoder import EncoderDecoder, empty_cache
from vla_jax.models.towers.normformer import EncoderDecoderSpec, StackSpec
from vla_jax.models.towers.positions import FARTHEST, image_buckets, token_buckets
from vla_jax.types import Captions

STACK = StackSpec(layers=2, heads=2, hidden=12)
SPEC = EncoderDecoderSpec(
    vocab=20, width=8, encoder=STACK, decoder=STACK, activation="gelu", max_positions=12,
    token_buckets=4, image_buckets=4, side=2,
)  # fmt: skip
# Two cameras of four tokens, then the robot's state.
PLACE = jnp.array([0, 1, 2, 3, 0, 1, 2, 3, -1])


def both(m, images, seen, place, prompt, prompt_valid, written, valid):
    encoded = m.encoder(images, seen, place, m.embed(prompt), prompt_valid)
    return m.decoder(m.embed(written), valid, encoded).hidden


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, SPEC.vocab, (2, 3, 7))
    return {
        "images": jnp.asarray(rng.normal(size=(2, len(PLACE), SPEC.width)), jnp.float32),
        "seen": jnp.ones((2, len(PLACE)), bool),
        "place": PLACE,
        "prompt": jnp.asarray(ids[:, 0]),
        "prompt_valid": jnp.arange(7) < jnp.array([[4], [7]]),
        "written": jnp.asarray(ids[:, 1]),
        "valid": jnp.ones((2, 7), bool),
    }


@pytest.fixture(scope="module")
def params(inputs):
    """Parameters none of which is neutral: tables of relative positions start at zero."""
    model = EncoderDecoder(SPEC, "none")
    result = jax.jit(lambda: model.init(jax.random.key(0), *inputs.values(), method=both))()
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype) / 2, result)


@jax.jit
def _run(params, *values) -> Any:
    return EncoderDecoder(SPEC, "none").apply(params, *values, method=both)


def run(params, inputs, **changes) -> Any:
    return _run(params, *{**inputs, **changes}.values())


def test_buckets_of_distances():
    """Near ones exactly, far ones by their logarithm; values worked out by hand from the rule."""
    result = token_buckets(256)
    at = {d: int(result[d + FARTHEST]) for d in (0, 1, -1, 128, 129, 500, -500, 1023)}
    fraction = 127 * math.log(500 / 128) / math.log(1023 / 128)
    far = 128 + math.ceil(fraction)
    assert (at[0], at[1], at[-1], at[128], at[129]) == (255, 256, 254, 383, 384)
    assert (at[500], at[-500], at[1023]) == (255 + far, 255 - far, 510)
    assert (np.diff(result) >= 0).all()
    assert result.min() == 0


def test_buckets_of_image_tokens():
    array = np.asarray(image_buckets(PLACE, side=2, count=4))
    camera = [0] * 4 + [1] * 4 + [None]
    for i, j in np.ndindex(array.shape):
        if camera[i] is None and camera[j] is None:
            expected = 51
        elif camera[i] == camera[j]:
            rows, columns = int(PLACE[i]) // 2 - int(PLACE[j]) // 2, i % 2 - j % 2
            expected = (rows + 3) * 7 + columns + 3
        else:
            expected = 49 if i < j else 50
        assert array[i, j] == expected, (i, j)


@pytest.mark.slow
def test_cameras_are_told_apart_by_what_training_adds(params, inputs):
    """Exchanged, they give the same until the tables' last rows, which OFA leaves at 0, change."""
    exchanged = inputs["images"][:, [4, 5, 6, 7, 0, 1, 2, 3, 8]]
    tables = params["params"]["encoder"]["layers"]["image_bias"]
    released = jax.tree.map(lambda x: x, params)
    released["params"]["encoder"]["layers"]["image_bias"] = tables.at[:, -3:].set(0.0)
    same = run(released, inputs), run(released, inputs, images=exchanged)
    np.testing.assert_allclose(*same, atol=1e-5)
    assert np.abs(run(params, inputs) - run(params, inputs, images=exchanged)).max() > 1e-3
    # Within an image places count: its tokens in another order are another image.
    turned = inputs["images"][:, [1, 0, 2, 3, 4, 5, 6, 7, 8]]
    assert np.abs(same[0] - run(released, inputs, images=turned)).max() > 1e-3


@pytest.mark.slow
def test_unseen_images_and_padding_do_not_count(params, inputs):
    names = inputs["seen"].at[:, 4:8].set(False)
    changed = {
        "images": inputs["images"].at[:, 4:8].multiply(jnp.arange(SPEC.width)),
        "prompt": jnp.where(inputs["prompt_valid"], inputs["prompt"], 0),
    }
    expected = run(params, inputs, seen=names)
    np.testing.assert_allclose(run(params, inputs, seen=names, **changed), expected, atol=1e-5)
    assert np.abs(run(params, inputs, **changed) - run(params, inputs)).max() > 1e-3


@pytest.mark.slow
def test_cache_equals_recomputation(params, inputs):
    """First calls of different lengths, right-padded, then token by token."""
    lengths, full = np.array([1, 3]), run(params, inputs)

    def first(m, images, seen, place, prompt, prompt_valid, written, valid):
        encoded = m.encoder(images, seen, place, m.embed(prompt), prompt_valid)
        return m.decoder(m.embed(written), valid, encoded, empty_cache(SPEC, 2, 8))

    def further(m, written, cache):
        return m.decoder(m.embed(written), jnp.ones(written.shape, bool), None, cache)

    model: Any = EncoderDecoder(SPEC, "none")
    valid = jnp.arange(3) < lengths[:, None]
    values = {**inputs, "written": inputs["written"][:, :3], "valid": valid}.values()
    result = jax.jit(lambda *given: model.apply(params, *given, method=first))(*values)
    np.testing.assert_allclose(result.hidden[valid], full[:, :3][valid], atol=1e-5)
    extend = jax.jit(lambda ids, cache: model.apply(params, ids, cache, method=further))
    for step in range(4):
        column = lengths + step
        result = extend(inputs["written"][np.arange(2), column][:, None], result.cache)
        expected = full[np.arange(2), column]
        np.testing.assert_allclose(result.hidden[:, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="first tokens"):
        extend(inputs["written"][:, :1], empty_cache(SPEC, 2, 8))


@pytest.mark.slow
def test_gradients_reach_what_is_used_through_remat(params, inputs):
    """Recomputation changes no gradient; only what writes images gets none."""

    def grads(kind):
        def loss(p):
            output: Any = EncoderDecoder(SPEC, kind).apply(p, *inputs.values(), method=both)
            return jnp.sum(output**3)

        return jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params))

    unused = set()
    for (path, plain), (_, again) in zip(grads("none"), grads("full"), strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-3, atol=1e-3)
        if not np.abs(plain).max() > 0:
            unused.add(jax.tree_util.keystr(path[1:], simple=True, separator="/"))
    norms = {
        f"decoder/{n}/{p}" for n in ("image_place_norm", "code_norm") for p in ("scale", "bias")
    }
    assert unused == {"decoder/image_positions", "decoder/layers/image_bias", *norms}


def test_long_texts_are_refused(params, inputs):
    long = jnp.ones((2, 13), jnp.int32)
    for name, mask in (("prompt", "prompt_valid"), ("written", "valid")):
        with pytest.raises(ValueError, match="13 text columns, but the model has 12 positions"):
            run(params, inputs, **{name: long, mask: long > 0})


def test_architectures_are_refused():
    with pytest.raises(ValueError, match="normformer") as error:
        ofa.OFA.arch({"normformer": False, "image_size": 673, "resnet_type": "resnet17"})
    for part in ("673 pixels", "42 x 16", "'resnet17' is none of"):
        assert part in str(error.value)
    assert ofa.OFA(ofa.OFA.arch({"image_size": 672})).image_tokens == 42**2


@pytest.mark.slow
def test_tokens_without_a_place():
    """The robot's state is read, beside a resampler's latents."""
    changes = {"structure.resampler": 2, "structure.proprio": 3}
    model, params = tiny.build(tiny.config("policy_head", "mlp", backbone="ofa", **changes))
    observation = tiny.observe(window=1)
    read = jax.jit(lambda o: model.apply({"params": params}, o, method="features")[0])
    states = [jnp.full((2, 1, 3), value) for value in (0.0, 1.0)]
    single, other = (read(dataclasses.replace(observation, proprio=state)) for state in states)
    assert np.isfinite(single).all()
    assert np.abs(single - other).max() > 1e-4


@pytest.mark.slow
def test_answers_are_not_given_away():
    """What the model thinks of every possible answer sums to one: it has not read the given one."""
    model, params = tiny.build(tiny.config("policy_head", "mlp", backbone="ofa"))
    observation = tiny.observe(batch=1, window=1)
    image, ids = observation.images["primary"][:, 0], jnp.arange(model.vlm.vocab_size)
    target = jnp.arange(observation.text.shape[1])[None] == 4

    def likelihood(answer):
        text = observation.text.at[:, 4].set(answer)
        captions = Captions(
            image.astype(jnp.uint8), jnp.ones(1, bool), text, observation.text_mask, target
        )
        loss, _ = model.apply({"params": params}, image, captions, method=caption_loss)
        return jnp.exp(-loss)

    np.testing.assert_allclose(jax.jit(jax.vmap(likelihood))(ids).sum(), 1.0, atol=1e-4)
