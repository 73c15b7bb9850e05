"""The policy-head structure and the LSTM head: layout, masks, streaming, dropout."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from tests.models import tiny
from vla_jax.config import ConfigError, StructureParity, resolve
from vla_jax.models import vla
from vla_jax.models.heads import HEADS
from vla_jax.types import Observation

WINDOW, CHUNK, TEXT = 3, 2, 9


@pytest.fixture(scope="module")
def config():
    raw = quickstart.get_config()
    raw.model.structure.update({"window": WINDOW, "chunk": CHUNK, "text_len": TEXT})
    raw.model.backbone.arch["vision_config"].update(
        {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "image_size": 32}
    )
    raw.model.backbone.arch["text_config"].update({"embed_dim": 16, "ffn_dim": 24})
    raw.model.head.update({"hidden": 16, "layers": 2})
    return resolve(raw).model


@pytest.fixture(scope="module")
def params(config):
    return tiny.build(config)[1]


def observe(batch: int = 2, window: int = WINDOW, seed: int = 0, lengths=(7, 9)) -> Observation:
    rng = np.random.default_rng(seed)
    shape = (batch, window, 32, 32, 3)
    images = {c: jnp.asarray(rng.normal(size=shape), jnp.float32) for c in ("primary", "wrist")}
    mask = np.arange(TEXT) < np.array(lengths[:batch])[:, None]
    ids = np.where(mask, rng.integers(5, 100, (batch, TEXT)), 1)
    return Observation(
        images=images,
        image_mask={c: jnp.ones((batch, window), bool) for c in images},
        text=jnp.asarray(ids, jnp.int32),
        text_mask=jnp.asarray(mask),
    )


def run(config, params, observation, **rngs):
    model, _ = tiny.build(config)
    if not rngs:
        return tiny.call(model, params, "__call__", observation)
    return jax.jit(lambda p, o: model.apply({"params": p}, o, rngs=rngs))(params, observation)


def test_shapes_and_ranges(config, params):
    out = run(config, params, observe())
    assert out.arm.shape == (2, WINDOW, CHUNK, 6)
    assert out.gripper.shape == (2, WINDOW, CHUNK)
    assert np.abs(out.arm).max() <= 1


def test_streaming_equals_the_window(config, params):
    observation = observe()
    full = run(config, params, observation)
    model, _ = tiny.build(config)
    step = functools.partial(tiny.call, model, params, "step")
    history = model.empty_history(2)
    for t in range(WINDOW):
        cut = {c: x[:, t : t + 1] for c, x in observation.images.items()}
        observed = {c: x[:, t : t + 1] for c, x in observation.image_mask.items()}
        changed = dataclasses.replace(observation, images=cut, image_mask=observed)
        out, history = step(changed, history)
        np.testing.assert_allclose(out.arm[:, 0], full.arm[:, t], atol=1e-5)
        np.testing.assert_allclose(out.gripper[:, 0], full.gripper[:, t], atol=1e-5)


def test_streaming_forgets_what_left_the_window(config, params):
    """After W more steps nothing of the first one is left."""
    model, _ = tiny.build(config)
    step = functools.partial(tiny.call, model, params, "step")
    outputs = []
    for first in (1, 2):
        history = model.empty_history(2)
        _, history = step(observe(window=1, seed=first), history)
        out: Any = None
        for seed in range(10, 10 + WINDOW):
            out, history = step(observe(window=1, seed=seed), history)
        outputs.append(out.arm)
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_left_padding_equals_a_shorter_history(config, params):
    observation = observe()
    observed = {c: m.at[:, 0].set(False) for c, m in observation.image_mask.items()}
    padded = run(config, params, dataclasses.replace(observation, image_mask=observed))
    cut = {c: x[:, 1:] for c, x in observation.images.items()}
    masks = {c: x[:, 1:] for c, x in observation.image_mask.items()}
    short = run(config, params, dataclasses.replace(observation, images=cut, image_mask=masks))
    np.testing.assert_allclose(padded.arm[:, 1:], short.arm, atol=1e-6)


def test_per_row_actions_do_not_depend_on_padding(config, params):
    """The same instruction with more padding columns, and in a batch with longer ones."""
    observation = observe()
    full = run(config, params, observation)
    trimmed = dataclasses.replace(
        observation, text=observation.text[:, :7], text_mask=observation.text_mask[:, :7]
    )
    alone = run(config, params, jax.tree.map(lambda x: x[:1], trimmed))
    np.testing.assert_allclose(full.arm[:1], alone.arm, atol=1e-6)


def test_padded_column_depends_on_padding(config, params):
    """The original's layout: the action token moves with the longest row."""
    structure = dataclasses.replace(config.structure, parity=StructureParity("padded_column"))
    config = dataclasses.replace(config, structure=structure)
    observation = observe()
    full = run(config, params, observation)
    trimmed = dataclasses.replace(
        observation, text=observation.text[:, :7], text_mask=observation.text_mask[:, :7]
    )
    alone = run(config, params, jax.tree.map(lambda x: x[:1], trimmed))
    assert np.abs(full.arm[:1] - alone.arm).max() > 1e-4


def test_pad_ids_do_not_matter(config, params):
    observation = observe()
    other = jnp.where(observation.text_mask, observation.text, 77)
    expected = run(config, params, observation)
    got = run(config, params, dataclasses.replace(observation, text=other))
    np.testing.assert_array_equal(got.arm, expected.arm)


def test_every_input_matters(config, params):
    observation = observe()
    base = run(config, params, observation)
    for camera in observation.images:
        images = {**observation.images, camera: observation.images[camera] + 0.5}
        changed = run(config, params, dataclasses.replace(observation, images=images))
        assert np.abs(changed.arm - base.arm).max() > 1e-4, camera
    text = observation.text.at[:, 3].add(1)
    changed = run(config, params, dataclasses.replace(observation, text=text))
    assert np.abs(changed.arm - base.arm).max() > 1e-4


@pytest.mark.parametrize("down_sample", [pytest.param("none", marks=pytest.mark.slow), "pooling"])
def test_several_latents(config, down_sample):
    structure = dataclasses.replace(config.structure, latent=3)
    head = dataclasses.replace(config.head, down_sample=down_sample)
    config = dataclasses.replace(config, structure=structure, head=head)
    _, params = tiny.build(config)
    assert run(config, params, observe()).arm.shape == (2, WINDOW, CHUNK, 6)
    assert params["head"]["layer0"]["input_kernel"].shape == (3 * 16, 4 * 3 * 16)


@pytest.mark.slow
def test_remat_changes_nothing(config, params):
    model = {r: vla.build(dataclasses.replace(config, remat=r)) for r in ("none", "full", "dots")}

    def gradient(remat):
        def loss(p):
            out: Any = model[remat].apply({"params": p}, observe())
            return (out.arm**2).sum() + (out.gripper**2).sum()

        return jax.jit(jax.grad(loss))(params)

    expected = gradient("none")
    for remat in ("full", "dots"):
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient(remat)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_dropout_only_with_an_rng(config, params):
    arch: dict[str, Any] = dict(config.backbone.arch)
    arch["text_config"] = {**arch["text_config"], "dropout": 0.3}
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, arch=arch))
    plain = run(config, params, observe())
    np.testing.assert_array_equal(plain.arm, run(config, params, observe()).arm)
    single = run(config, params, observe(), dropout=jax.random.key(1))
    two = run(config, params, observe(), dropout=jax.random.key(2))
    assert np.abs(single.arm - two.arm).max() > 1e-4


def test_illegal_choices_are_all_named(config):
    backbone = dataclasses.replace(config.backbone, name="kosmos3")
    head = dataclasses.replace(config.head, kind="lstn")
    with pytest.raises(ConfigError) as error:
        vla.build(dataclasses.replace(config, backbone=backbone, head=head))
    assert "'kosmos3' is none of ['flamingo', 'kosmos2'" in str(error.value)
    assert f"'lstn' is none of {sorted(HEADS)}" in str(error.value)


def test_unknown_architecture_key():
    raw = quickstart.get_config().model.backbone.arch.to_dict()
    raw["vision_config"]["hidden_sise"] = 3
    from vla_jax.models.backbones import kosmos2

    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        kosmos2.Kosmos2.arch(raw)
