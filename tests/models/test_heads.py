"""Properties all heads share, and that the sampling ones draw from what they were shown."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import tiny
from vla_jax import rules
from vla_jax.models.action_tokenizer import ActionTokenizer
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import HeadSizes, largest, pool_tokens
from vla_jax.models.heads.diffusion import signal_levels
from vla_jax.models.losses import NO_LABEL, masked_mean, token_loss
from vla_jax.train import trace
from vla_jax.types import Actions

W, M, D = 4, 2, 8
CONTINUOUS = [name for name, head in HEADS.items() if head.reads == "features"]
KEY = jax.random.key(3)


@functools.cache
def make(kind: str, **changes: Any):
    """A head, its parameters (none neutral) and `predict`, compiled."""
    settings: dict[str, Any] = {"structure.window": W, "structure.latent": M, **changes}
    config = tiny.config("policy_head", kind, **settings)
    s = config.structure
    head = HEADS[kind](config.head, HeadSizes(s.window, s.latent, s.chunk, 7))
    actions = Actions(jnp.zeros((1, W, tiny.CHUNK, 7)), jnp.ones((1, W, tiny.CHUNK), bool))
    args = (features(batch=1), jnp.ones((1, W), bool), actions, KEY, 0.1)
    shapes = jax.eval_shape(lambda key: head.init(key, *args, method="loss"), jax.random.key(0))
    params = tiny.drawn(shapes["params"], seed=0)

    def predict(x, valid, last=False, key=KEY):
        return head.apply({"params": params}, x, valid, key, last, method="predict")

    return head, params, jax.jit(predict, static_argnames="last")


def features(batch: int = 2, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(batch, W, M, D)), jnp.float32)


def close(one: Any, two: Any, tolerance: float = 1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), one, two)


@pytest.fixture(scope="module", params=CONTINUOUS)
def made(request):
    return request.param, *make(request.param)


def test_shapes_and_streaming(made):
    """A window at once, its newest step alone, and step after step give the same."""
    *_, predict = made
    x, valid = features(), jnp.ones((2, W), bool)
    full = predict(x, valid)
    assert full.arm.shape == (2, W, tiny.CHUNK, 6)
    assert full.gripper.shape == (2, W, tiny.CHUNK)
    assert np.abs(full.arm).max() <= 1
    assert np.abs(full.arm[:, 0] - full.arm[:, 1]).max() > 1e-4
    past, observed = jnp.zeros_like(x), jnp.zeros((2, W), bool)
    for t in range(W):
        past = jnp.concatenate([past[:, 1:], x[:, t : t + 1]], axis=1)
        observed = jnp.concatenate([observed[:, 1:], jnp.ones((2, 1), bool)], axis=1)
        newest = predict(past, observed, True)
        close(newest, jax.tree.map(lambda y, t=t: y[:, t : t + 1], full))


def test_steps_that_do_not_exist_do_not_matter(made):
    *_, predict = made
    x, valid = features(), jnp.ones((2, W), bool).at[:, :2].set(False)
    other = x.at[:, :2].set(7.0)
    single, two = predict(x, valid), predict(other, valid)
    close(*(jax.tree.map(lambda y: y[:, 2:], p) for p in (single, two)), tolerance=1e-6)


def test_rows_are_independent(made):
    """A permutation of the batch permutes the outputs (of samples: from noise of their own)."""
    kind, *_, predict = made
    x, valid = features(batch=3), jnp.ones((3, W), bool)
    if kind in ("diffusion", "flow"):
        pytest.skip("covered by the toy target: rows start from different noise")
    order = jnp.array([2, 0, 1])
    close(predict(x[order], valid), jax.tree.map(lambda y: y[order], predict(x, valid)))


def test_later_steps_do_not_reach_back(made):
    *_, predict = made
    x, valid = features(), jnp.ones((2, W), bool)
    changed = predict(x.at[:, -1].add(1.0), valid)
    full = predict(x, valid)
    close(*(jax.tree.map(lambda y: y[:, :-1], p) for p in (full, changed)), tolerance=1e-6)
    assert np.abs(full.arm[:, -1] - changed.arm[:, -1]).max() > 1e-4


@pytest.mark.parametrize("kind", ["lstm", "gpt2", "diffusion", "flow"])
def test_the_past_matters(kind):
    _, _, predict = make(kind)
    x, valid = features(), jnp.ones((2, W), bool)
    changed = predict(x.at[:, 0].add(1.0), valid)
    assert np.abs(predict(x, valid).arm[:, -1] - changed.arm[:, -1]).max() > 1e-5


def test_the_mlp_has_no_memory():
    _, _, predict = make("mlp")
    x, valid = features(), jnp.ones((2, W), bool)
    order = jnp.array([3, 1, 0, 2])
    close(predict(x[:, order], valid), jax.tree.map(lambda y: y[:, order], predict(x, valid)))


@pytest.mark.parametrize("kind", ["mlp", "lstm", "gpt2"])
def test_what_only_older_steps_would_say_is_not_computed(kind):
    """At the newest step alone, the trunks' products, and all of an MLP's, are those of a step."""
    _, params, predict = make(kind)
    x, valid = features(), jnp.ones((2, W), bool)
    every, newest = (
        trace.count(jax.make_jaxpr(functools.partial(predict, last=last))(x, valid)).total
        for last in (False, True)
    )
    spared = params if kind == "mlp" else params["output"]
    kernels = [leaf for path, leaf in rules.flatten(spared).items() if path.endswith("kernel")]
    a_step = 2 * len(x) * sum(kernel.size for kernel in kernels)
    print(f"{kind}: {every} operations at every step, {newest} at the newest")
    assert every - newest == (W - 1) * a_step


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_samples_follow_what_was_shown(kind):
    """One feature always means the same chunk; the other means one of two opposite chunks."""
    changes = {
        "structure.window": 1,
        "structure.latent": 1,
        "head.hidden": 32,
        "head.sampling_steps": 10,
    }
    head, params, _ = make(kind, **changes)
    contexts = jnp.eye(2, D)[:, None, None]  # [2, w, m, d]
    rng = np.random.default_rng(1)
    target = jnp.asarray(rng.uniform(0.4, 0.8, (tiny.CHUNK, 6)), jnp.float32)
    target = target * jnp.array([1, -1, 1, -1, 1, -1])

    def shown(which: jax.Array, sign: jax.Array) -> Actions:
        sign = jnp.where(which == 0, 1.0, sign)
        arm = sign[:, None, None] * target
        opened = jnp.broadcast_to((sign > 0)[:, None, None], (*arm.shape[:2], 1))
        chunk = jnp.concatenate([arm, opened], axis=-1)[:, None]
        return Actions(chunk, jnp.ones(chunk.shape[:3], bool))

    def loss(params, key):
        first, two, three = jax.random.split(key, 3)
        which = jax.random.bernoulli(first, 0.5, (64,)).astype(jnp.int32)
        actions = shown(which, jax.random.rademacher(two, (64,)).astype(jnp.float32))
        args = (contexts[which], jnp.ones((64, 1), bool), actions, three, 0.1)
        return head.apply({"params": params}, *args, method="loss")[0]

    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, 600))

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            total, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), total

        keys = jax.random.split(jax.random.key(0), 600)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses

    params, losses = train(params)
    assert losses[-100:].mean() < 0.5 * losses[:20].mean()

    def sample(which: int, key):
        x = jnp.repeat(contexts[which : which + 1], 200, axis=0)
        valid = jnp.ones((200, 1), bool)
        return head.apply({"params": params}, x, valid, key, method="predict")

    sample = jax.jit(sample, static_argnums=0)
    single = sample(0, jax.random.key(5))
    assert np.abs(single.arm[:, 0] - target).mean() < 0.1
    assert (single.gripper > 0).mean() > 0.98
    two = sample(1, jax.random.key(6))
    up = (two.gripper[:, 0] > 0).all(-1)
    assert 0.25 < up.mean() < 0.75
    sign = jnp.where(up, 1.0, -1.0)[:, None, None]
    distance = np.abs(two.arm[:, 0] - sign * target).mean((1, 2))
    assert np.median(distance) < 0.1
    # The same key draws the same sample, another key another.
    np.testing.assert_array_equal(two.arm, sample(1, jax.random.key(6)).arm)
    assert np.abs(two.arm - sample(1, jax.random.key(7)).arm).max() > 0.1


@pytest.mark.slow
def test_rows_average_to_the_loss():
    for kind in CONTINUOUS:
        head, params, _ = make(kind)
        mask = jnp.ones((2, W, tiny.CHUNK), bool).at[0, 0].set(False)
        args = (features(), jnp.ones((2, W), bool), Actions(tiny.act(2, W).chunk, mask), KEY, 0.1)
        run = jax.jit(lambda p, head=head, args=args: head.apply(p, *args, method="loss"))
        total, parts = run({"params": params})
        weights = mask.sum((1, 2))
        assert parts["rows"] @ weights / weights.sum() == pytest.approx(float(total), rel=1e-5)


@pytest.mark.slow
def test_unsupervised_actions_do_not_matter():
    for kind in CONTINUOUS:
        head, params, _ = make(kind)
        valid, mask = jnp.ones((2, W), bool), jnp.ones((2, W, tiny.CHUNK), bool)
        mask = mask.at[:, :, 1].set(False)
        chunk = jnp.zeros((2, W, tiny.CHUNK, 7))

        @jax.jit
        def loss(chunk, mask, head=head, params=params, valid=valid):
            args = (features(), valid, Actions(chunk, mask), KEY, 0.1)
            return head.apply({"params": params}, *args, method="loss")[0]

        changed = chunk.at[:, :, 1].set(0.0 if kind in ("diffusion", "flow") else 0.9)
        np.testing.assert_allclose(loss(chunk, mask), loss(changed, mask), rtol=1e-6)
        assert loss(chunk, jnp.zeros_like(mask)) == 0


def test_cosine_schedule():
    """Nichol and Dhariwal: alpha bar falls from almost 1 to almost 0, as cos^2."""
    levels = signal_levels(100)
    assert np.all(np.diff(levels) < 0)
    assert 0.999 < levels[0] < 1
    assert 0 < levels[-1] < 1e-5
    t = (50 / 100 + 0.008) / 1.008
    expected = np.cos(t * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert levels[49] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("tokens", "latents"), [(5, 1), (5, 2), (7, 3), (3, 3), (2, 3)])
def test_pooling_is_adaptive(tokens, latents):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 1, tokens + 2, D)).astype(np.float32)
    read = np.arange(tokens + 2) < tokens  # two tokens of padding behind
    pool = jax.jit(pool_tokens, static_argnums=2)
    got = pool(x, np.broadcast_to(read, x.shape[:3]), latents)
    for i in range(latents):
        begin, end = i * tokens // latents, -(-(i + 1) * tokens // latents)
        np.testing.assert_array_equal(got[:, :, i], x[:, :, begin:end].max(2))


def test_gradients_go_to_the_first_of_the_largest():
    x = jnp.array([[[1.0], [3.0], [3.0], [2.0]]])
    np.testing.assert_array_equal(jax.grad(lambda x: largest(x).sum())(x)[0, :, 0], [0, 1, 0, 0])
    # -inf stands where nothing is read.
    read = jnp.array([[[False, True, True, True]]])
    gradient = jax.jit(jax.grad(lambda x: pool_tokens(x[None], read, 2).sum()))(x)
    # Of three tokens the spans are the first two and the last two.
    np.testing.assert_array_equal(gradient[0, :, 0], [0, 1, 1, 0])


def test_pooling_nothing_gives_zeros():
    got = pool_tokens(jnp.ones((1, 2, 3, D)), jnp.zeros((1, 2, 3), bool), 2)
    np.testing.assert_array_equal(got, np.zeros((1, 2, 2, D)))


def test_token_loss_by_hand():
    tokenizer = ActionTokenizer(end=12, bins=4)  # ids 8 ... 11
    labels = np.array([[NO_LABEL, 8, 9, 11, 3], [NO_LABEL, 10, 10, 8, NO_LABEL]])
    logits = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    logits[0, 1, 8] = logits[1, 3, 8] = 9.0  # one arm token and one gripper token right
    total, metrics = jax.jit(lambda x, y: token_loss(x, y, tokenizer, 3))(logits, labels)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, columns = np.nonzero(labels != NO_LABEL)
    expected = -scores[rows, columns, labels[rows, columns]].mean()
    assert total == pytest.approx(expected, rel=1e-5)
    guess = logits.argmax(-1)
    arm = [(0, 1), (0, 2), (1, 1), (1, 2)]
    gripper = [(0, 3), (1, 3)]
    for name, places in (("acc_arm", arm), ("acc_gripper", gripper)):
        right = np.mean([guess[p] == labels[p] for p in places])
        assert metrics[name] == pytest.approx(right)
    assert metrics["acc_gripper"] >= 0.5


def test_nothing_supervised_is_no_loss():
    labels = jnp.full((1, 3), NO_LABEL)
    run = jax.jit(lambda x, y: token_loss(x, y, ActionTokenizer(12, 4), 7))
    total, metrics = run(jnp.ones((1, 3, 12)), labels)
    assert total == 0
    assert all(np.isfinite(x).all() for x in metrics.values())
    assert masked_mean(jnp.ones(3), jnp.zeros(3, bool)) == 0


def test_ids_count_down_from_the_end():
    """RoboVLMs' published vectors: Kosmos-2's tokenizer, 256 bins."""
    tokenizer = ActionTokenizer(63985)
    values = [-1, -0.999, -0.5, 0, 0.5, 0.999, 1, 2, -3]
    ids = [63984, 63984, 63921, 63857, 63793, 63730, 63729, 63729, 63984]
    middles = [-0.99607843, -0.99607843, -0.50196078, 0, 0.50196078, 0.99607843, 0.99607843]
    assert tokenizer.encode(np.array(values)).tolist() == ids
    assert tokenizer.encode(jnp.array(values, jnp.float32)).tolist() == ids
    np.testing.assert_allclose(tokenizer.decode(np.array(ids[:7])), middles, atol=1e-8)
    grid = np.linspace(-1, 1, 10001)
    assert np.abs(grid - tokenizer.decode(tokenizer.encode(grid))).max() <= 1 / 255 + 1e-9
    assert tokenizer.is_action(np.array([63728, 63729, 63984, 63985])).tolist() == [0, 1, 1, 0]
