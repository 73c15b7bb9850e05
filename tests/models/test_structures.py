"""Which tokens make a sequence, and that a stream of steps gives what the window gives."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import WIDTH
from tests.models import tiny
from vla_jax.models import legality, vla
from vla_jax.models.backbones.base import Layout, Tokens
from vla_jax.models.structures import splicing, video
from vla_jax.models.structures.splicing import Sequence

LAYOUT = Layout(bos=1, eos=1)


def tagged(tags, width: int = 1) -> jax.Array:
    """Embeddings that say which token they are."""
    return jnp.asarray(np.repeat(np.asarray(tags, np.float32)[..., None], width, axis=-1))


splice = jax.jit(splicing.splice, static_argnums=6, static_argnames="padded")


def test_splice_per_row_and_padded():
    text = tagged([[1, 2, 3, 4, 0, 0], [1, 2, 3, 5, 6, 4]])  # 1 = <s>, 4 = </s>, 0 = padding
    mask = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    tokens, observed = tagged([[11, 12]] * 2), jnp.ones((2, 2), bool)
    inserted = tagged([[21, 22]] * 2)
    place = jnp.asarray([[0, 1]] * 2)
    args = (text, mask, tokens, observed, place, inserted, LAYOUT)
    (embeds, valid, place, *_, inputs), first = splice(*args, padded=False)
    assert inputs is not None
    assert inputs.sum(1).tolist() == [5, 7]
    assert bool(inputs[0, :5].all())
    assert place.tolist() == [[-1, 0, 1] + [-1] * 7] * 2
    assert embeds[..., 0].astype(int).tolist() == [
        [1, 11, 12, 2, 3, 21, 22, 4, 0, 0],
        [1, 11, 12, 2, 3, 5, 6, 21, 22, 4],
    ]
    assert valid.sum(1).tolist() == [8, 10]
    assert first[:, 0].tolist() == [5, 7]
    (embeds, valid, *_, inputs), first = splice(*args, padded=True)
    assert inputs is not None
    assert inputs[:, :7].all()
    assert not inputs[:, 7:].any()
    assert embeds[0, :, 0].astype(int).tolist() == [1, 11, 12, 2, 3, 4, 0, 21, 22, 0]
    assert valid[0].astype(int).tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 1, 0]
    assert first[:, 0].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("readout", "tags"),
    [("vision", [11, 12]), ("text", [2, 3]), ("all", [1, 11, 12, 2, 3, 4])],
)
def test_columns_of_a_steps_own_tokens(readout, tags):
    text = tagged([[1, 2, 3, 4, 0, 0]])
    mask = jnp.asarray([[1, 1, 1, 1, 0, 0]], bool)
    observed, place = jnp.ones((1, 2), bool), jnp.asarray([[0, 1]])
    args = (tagged([[11, 12]]), observed, place, text[:, :0], LAYOUT, False)
    (embeds, valid, *_), first = splicing.splice(text, mask, *args)
    columns, read = splicing.columns_of(readout, valid, first, 2, LAYOUT)
    taken = splicing.take(embeds, columns)[0, :, 0][np.asarray(read[0])]
    assert taken.astype(int).tolist() == tags


@pytest.mark.parametrize("padded", [False, True])
def test_join_leaves_out_what_is_not_there(padded):
    # Two rows of three steps, three columns each, the last a pad; the first step of row 0 missing.
    tags = np.arange(1, 19).reshape(6, 3)
    valid = jnp.asarray(np.tile([1, 1, 0], (6, 1)), bool)
    columns = jnp.ones((6, 1), jnp.int32)
    place = jnp.asarray(np.tile([0, 1, -1], (6, 1)))
    array = jnp.asarray(tags % 3 == 1)  # the first column of each step
    tokens = Tokens(tagged(tags), valid, place, given=array)
    steps = Sequence(tokens, columns, jnp.ones((6, 1), bool))
    keep = jnp.asarray([[0, 1, 1], [1, 1, 1]], bool)
    text = splicing.join(steps, keep, padded)
    order = text.tokens.embeds[..., 0].astype(int).tolist()
    if padded:
        assert order[0][:6] == [4, 5, 6, 7, 8, 9]
        assert order[1] == list(range(10, 19))
    else:
        assert order[0][:4] == [4, 5, 7, 8]
        assert order[1][:6] == [10, 11, 13, 14, 16, 17]
        assert text.tokens.valid.sum(1).tolist() == [4, 6]
        valid = text.tokens.valid
        assert not bool((~valid[:, :-1] & valid[:, 1:]).any())  # no gaps
        assert text.tokens.place[0, :4].tolist() == [0, 1, 0, 1]
    # Marks and columns still belong to the same tokens.
    np.testing.assert_array_equal(text.tokens.given, text.tokens.embeds[..., 0] % 3 == 1)
    picked = splicing.take(text.tokens.embeds, text.columns)[..., 0].astype(int)
    assert picked[0, 1:].tolist() == [5, 8]
    assert picked[1].tolist() == [11, 14, 17]


def test_video_goes_camera_by_camera():
    tags = np.array([[[11, 12, 21], [13, 14, 22]]])  # two tokens of one camera, one of the other
    got = video.by_camera(tagged(tags), (2, 1))
    assert got[0, :, 0].astype(int).tolist() == [11, 12, 13, 14, 21, 22]


STREAMED = [
    pytest.param("one_step", "flow", marks=pytest.mark.slow),
    pytest.param("interleaved", "gpt2", marks=pytest.mark.slow),
    pytest.param("interleaved", "diffusion", marks=pytest.mark.slow),
    pytest.param("policy_head", "flow", marks=pytest.mark.slow),
    pytest.param("video", "mlp", marks=pytest.mark.slow),
    ("discrete", "detokenizer"),
]


@pytest.mark.parametrize(("structure", "head"), STREAMED)
def test_streaming_equals_recomputing_the_window(structure, head):
    """Also past the window's end, and where the window is not full yet."""
    config = tiny.config(structure, head)
    model, params = tiny.build(config)
    window, key = config.structure.window, jax.random.key(9)
    full = tiny.observe(window=window + 2)
    step = jax.jit(lambda o, h: model.apply({"params": params}, o, h, key, method="step"))
    apply = jax.jit(lambda o: model.apply({"params": params}, o, key))
    history = model.empty_history(2)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), history)
    for t in range(window + 2):
        got, history = step(tiny.steps(full, t, t + 1), history)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), history) == shapes
        begin = max(0, t + 1 - window)
        if structure == "discrete" and begin:
            continue  # what was written before the window began is in the stream's context
        current = tiny.steps(full, begin, t + 1)
        expected = apply(_left_padded(current, window))
        np.testing.assert_allclose(got.arm, expected.arm[:, -1:], atol=1e-5)
        np.testing.assert_allclose(got.gripper, expected.gripper[:, -1:], atol=1e-5)


@pytest.mark.slow
def test_a_window_that_slides_by_several_steps_goes_on_from_its_cache():
    """What has not left the window is read as if it were read anew, pads and all."""
    changes: dict[str, Any] = {"structure.slide": 2}
    model, params = tiny.build(tiny.config("interleaved", "lstm", **changes))
    window, recorded = model.config.structure.window, []
    full = tiny.observe(window=window + 4)
    step = jax.jit(lambda o, h: model.apply({"params": params}, o, h, method="step"))
    apply = jax.jit(lambda o: model.apply({"params": params}, o))
    history = model.empty_history(2)
    for t in range(window + 4):
        recorded = [*(recorded[2:] if len(recorded) == window else recorded), t]
        got, history = step(tiny.steps(full, t, t + 1), history)
        assert history.valid.sum(1).tolist() == [len(recorded)] * 2
        expected = apply(_left_padded(tiny.steps(full, recorded[0], t + 1), window))
        np.testing.assert_allclose(got.arm, expected.arm[:, -1:], atol=1e-5)
        np.testing.assert_allclose(got.gripper, expected.gripper[:, -1:], atol=1e-5)
    assert recorded[0] == 4  # two rereadings


def _left_padded(observation, window):
    missing = window - next(iter(observation.images.values())).shape[1]
    images = {
        c: jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)), constant_values=3.0)
        for c, x in observation.images.items()
    }
    masks = {c: jnp.pad(x, ((0, 0), (missing, 0))) for c, x in observation.image_mask.items()}
    return dataclasses.replace(observation, images=images, image_mask=masks)


def test_interleaved_sees_the_past_and_not_the_future():
    model, params = tiny.build(tiny.config("interleaved", "mlp"))
    run = jax.jit(lambda o: model.apply({"params": params}, o).arm)
    full = tiny.observe()
    base = run(full)
    for step, changes in ((0, [0, 1, 2]), (2, [2])):
        images = {c: x.at[:, step].add(0.5) for c, x in full.images.items()}
        moved = np.abs(run(dataclasses.replace(full, images=images)) - base).max((0, 2, 3))
        assert [i for i in range(3) if moved[i] > 1e-5] == changes


@pytest.mark.slow
def test_interleaved_does_not_depend_on_padding():
    """More padding columns, between the steps too, change nothing."""
    model, params = tiny.build(tiny.config("interleaved", "mlp"))
    run = jax.jit(lambda o: model.apply({"params": params}, o).arm)
    observation = tiny.observe(lengths=(5, 7))
    short = dataclasses.replace(
        observation, text=observation.text[:, :7], text_mask=observation.text_mask[:, :7]
    )
    np.testing.assert_allclose(run(observation), run(short), atol=1e-5)


@pytest.mark.slow
def test_a_window_of_one_is_one_step():
    """Interleaved, policy head and video agree with one_step there."""
    arms, changes = [], dict[str, Any]({"structure.window": 1})
    for structure in ("one_step", "interleaved", "policy_head", "video"):
        model, params = tiny.build(tiny.config(structure, "mlp", **changes))
        arms.append(
            jax.jit(lambda p, o, m=model: m.apply({"params": p}, o).arm)(
                params, tiny.observe(window=1)
            )
        )
    for arm in arms[1:]:
        np.testing.assert_allclose(arm, arms[0], atol=1e-5)


@pytest.mark.parametrize(
    "readout", [*(pytest.param(r, marks=pytest.mark.slow) for r in ("text", "vision")), "all"]
)
def test_readout_of_a_steps_own_tokens(readout):
    changes = {"structure.readout": readout, "head.down_sample": "pooling", "structure.latent": 2}
    model, params = tiny.build(tiny.config("policy_head", "mlp", **changes))
    assert "action_token" not in params
    run = jax.jit(lambda o: model.apply({"params": params}, o).arm)
    observation = tiny.observe(lengths=(5, 7))
    short = dataclasses.replace(
        observation, text=observation.text[:, :7], text_mask=observation.text_mask[:, :7]
    )
    np.testing.assert_allclose(run(observation), run(short), atol=1e-5)
    other = dataclasses.replace(observation, text=observation.text.at[:, 2].add(1))
    differs = np.abs(run(other) - run(observation)).max() > 1e-6
    assert differs == (readout != "vision")  # causal: images stand before the text


def test_resamplers():
    changes = {
        "structure.resampler": 3,
        "structure.readout": "all",
        "head.down_sample": "resampler",
        "structure.latent": 2,
    }
    model, params = tiny.build(tiny.config("interleaved", "mlp", **changes))
    assert params["resampler"]["queries"].shape == (3, WIDTH)
    assert params["pooler"]["queries"].shape == (2, WIDTH)
    assert model.empty_history(1).features.shape == (1, tiny.WINDOW, 6, WIDTH)
    out = jax.jit(lambda o: model.apply({"params": params}, o))(tiny.observe())
    assert out.arm.shape == (2, tiny.WINDOW, tiny.CHUNK, 6)


@pytest.mark.parametrize(
    ("structure", "cameras"),
    [
        ("policy_head", 2),
        ("interleaved", 1),
        pytest.param("video", 1, marks=pytest.mark.slow),
        ("video", 2),
    ],
)
def test_the_robots_state_is_a_token(structure, cameras):
    changes = {"structure.proprio": 4, "structure.cameras": tiny.CAMERAS[:cameras]}
    model, params = tiny.build(tiny.config(structure, "mlp", **changes))
    state = jnp.zeros((2, tiny.WINDOW, 4))
    observation = dataclasses.replace(tiny.observe(), proprio=state)
    other = dataclasses.replace(observation, proprio=state.at[:, -1].set(0.5))
    run = jax.jit(lambda o: model.apply({"params": params}, o).arm)
    moved = np.abs(run(other) - run(observation)).max((0, 2, 3))
    assert moved[-1] > 1e-5
    assert (moved[:-1] < 1e-6).all()


def test_discrete_writes_action_ids_one_by_one():
    """The cache gives the ids that recomputing the whole sequence for each token gives."""
    model, params = tiny.build(tiny.config("discrete", "detokenizer"))
    observation, window = tiny.observe(), tiny.WINDOW
    tokenizer = model.apply({"params": params}, method=lambda m: m.head.tokenizer)
    history = model.empty_history(2)
    step = jax.jit(lambda o, h: model.apply({"params": params}, o, h, method="step"))
    prediction: Any = None
    for t in range(window):
        prediction, history = step(tiny.steps(observation, t, t + 1), history)
    assert bool(tokenizer.is_action(history.ids).all())
    values = np.asarray(tokenizer.decode(history.ids[:, -1])).reshape(2, 1, tiny.CHUNK, 7)
    np.testing.assert_array_equal(prediction.arm, values[..., :-1])

    @jax.jit
    def scores(ids):
        def read(m):
            tokens, valid = m.encode(observation), splicing.step_mask(observation)
            sequence = m.sequence(tokens, valid, observation, ids)
            return m.scores(m.backbone(sequence.tokens, columns=sequence.columns), valid)

        return model.apply({"params": params}, method=read)

    ids = history.ids.at[:, -1].set(0)
    first = tokenizer.end - tokenizer.bins
    for i in range(ids.shape[-1]):
        best = scores(ids)[:, -1, i, first : tokenizer.end].argmax(-1) + first
        ids = ids.at[:, -1, i].set(best)
    np.testing.assert_array_equal(ids, history.ids)


def test_discrete_labels():
    model, params = tiny.build(tiny.config("discrete", "detokenizer"))
    actions = tiny.act()
    actions = dataclasses.replace(actions, mask=actions.mask.at[0, 1, 1].set(False))
    stop = jnp.array([[2], [2]])
    labels = model.apply({"params": params}, method=lambda m: m.head.labels(actions, stop))
    labels = np.asarray(labels)
    count = tiny.CHUNK * 7
    assert labels.shape == (2, tiny.WINDOW, count + 1)
    assert (labels[0, 1, 7:] == -100).all()  # the second action and the stop token after it
    assert (labels[0, 1, :7] != -100).all()
    assert (labels[1, :, -1] == 2).all()
    opened = np.asarray(actions.chunk[1, 0, :, -1]) > 0.5
    tokenizer = model.apply({"params": params}, method=lambda m: m.head.tokenizer)
    highest = tokenizer.end - tokenizer.bins
    expected = np.where(opened, highest, tokenizer.end - 1)
    np.testing.assert_array_equal(labels[1, 0, 6:count:7], expected)


def test_discrete_warns_of_a_policy_that_copies_its_own_chunks():
    """The chunks of the steps before hold the actions asked for; with one of either they do not."""
    (warning,) = legality.warnings(tiny.config("discrete", "detokenizer"))
    assert "learns to copy" in warning
    for name in ("structure.window", "structure.chunk"):
        changes: dict[str, Any] = {name: 1}
        assert not legality.warnings(tiny.config("discrete", "detokenizer", **changes))
    assert not legality.warnings(tiny.config("interleaved", "mlp"))


def test_prompt_and_words():
    continuous = tiny.config("policy_head", "lstm")
    assert vla.prompt(continuous).startswith("<grounding>")
    assert vla.build(continuous).word_ids == 128
    discrete = tiny.config("discrete", "detokenizer")
    text = vla.prompt(discrete).format(instruction="lift it")
    assert "What 2 step actions should the robot take to lift it?" in text
    assert vla.build(discrete).word_ids == 128 - 20


@pytest.mark.slow
def test_features_may_have_to_predict_the_sentence():
    """RoboVLMs' CLIP-norm loss: smooth L1 against the sentence's vector, over the steps."""
    settings = {"sentence.dim": 5, "sentence.dir": "clip", "structure.latent": 2}
    model, params = tiny.build(tiny.config("policy_head", "lstm", **settings))
    rng = np.random.default_rng(0)
    sentence = jnp.asarray(rng.normal(size=(2, 5)) * 2, jnp.float32)
    observation = dataclasses.replace(tiny.observe(), sentence=sentence)
    observed = {c: m.at[0, 0].set(False) for c, m in observation.image_mask.items()}
    observation = dataclasses.replace(observation, image_mask=observed)
    actions = tiny.act()

    def loss(params, seen=observation):
        args = (seen, actions, None, 0.1)
        return model.apply({"params": params}, *args, method="loss")

    total, parts = jax.jit(loss)(params)
    read = jax.jit(lambda p: model.apply({"params": p}, observation, method="features"))
    features, valid = read(params)
    kernel, bias = params["sentence"]["kernel"], params["sentence"]["bias"]
    error = np.asarray(features.max(2) @ kernel + bias - sentence[:, None])
    each = np.where(np.abs(error) <= 1, 0.5 * error**2, np.abs(error) - 0.5).mean(-1)
    assert parts["text_l1"] == pytest.approx(each[np.asarray(valid)].mean(), rel=1e-4)
    action = parts["loss_arm"] + 0.1 * parts["loss_gripper"]
    assert total == pytest.approx(float(action + 0.05 * parts["text_l1"]), rel=1e-5)
    grads = jax.jit(jax.grad(lambda p: loss(p)[1]["text_l1"]))(params)
    assert np.abs(grads["action_token"]).max() > 0
    with pytest.raises(ValueError, match="no vectors of its instructions"):
        jax.eval_shape(functools.partial(loss, seen=tiny.observe()), params)


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_columns_that_nothing_sees_are_left_out_and_change_nothing(monkeypatch, mask):
    small = tiny.config("policy_head", "mlp", "paligemma")
    arch = {**small.backbone.arch, "mask": mask}
    small = dataclasses.replace(small, backbone=dataclasses.replace(small.backbone, arch=arch))
    model, params = tiny.build(small)
    lengths, backbone = [], type(model.vlm)
    run = backbone.__call__

    def counted(self, tokens, *args, **more):
        lengths.append(tokens.valid.shape[1])
        return run(self, tokens, *args, **more)

    monkeypatch.setattr(backbone, "__call__", counted)
    observation = tiny.observe(size=28)

    def features() -> jax.Array:
        run = jax.jit(lambda p, o: model.apply({"params": p}, o, method="features")[0])
        return run(params, observation)

    # As the steps that run on a mesh, the only ones that leave columns out.
    with jax.set_mesh(jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))):
        short = features()
    monkeypatch.setattr(splicing, "shortened", lambda sequence, _: sequence)
    np.testing.assert_allclose(short, features(), atol=1e-5)
    assert lengths[0] == lengths[1] - (mask == "causal")
