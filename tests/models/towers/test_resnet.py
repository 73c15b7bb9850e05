"""OFA's ResNet: geometry, frozen statistics, the weight map. Parity: tests/parity, hf_ofa."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import arrays
from vla_jax.models.towers import resnet
from vla_jax.rules import flatten, unflatten

SPEC = resnet.ResNetSpec((1, 3, 2), stem=4)
PREFIX = "encoder.embed_images."


@pytest.fixture(scope="module")
def shapes():
    model = resnet.ResNet(SPEC)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 48, 3))))
    return {path: leaf.shape for path, leaf in flatten(tree["params"]).items()}


@pytest.fixture(scope="module")
def theirs(shapes):
    """Random weights under the original's names."""
    rng, named = np.random.default_rng(0), {}
    for row in resnet.weight_map(SPEC, PREFIX, ""):
        ours = {path: rng.normal(size=shapes[path]).astype(np.float32) for path in row.targets}
        named |= arrays.to_theirs(row, {k: v / v[0].size ** 0.5 for k, v in ours.items()})
    return {k: np.abs(v) + 0.5 if k.endswith("running_var") else v for k, v in named.items()}


@pytest.fixture(scope="module")
def flat(shapes, theirs):
    return arrays.to_ours(resnet.weight_map(SPEC, PREFIX, ""), shapes, theirs)


def test_the_map_covers_everything_and_comes_back_to_the_bit(flat, theirs):
    back = {}
    for row in resnet.weight_map(SPEC, PREFIX, ""):
        back |= arrays.to_theirs(row, flat)
    assert set(back) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(back[name], value)
    # torchvision's counting: the first block of a stage projects, the rest do not.
    assert PREFIX + "layer2.2.conv3.weight" in theirs
    assert PREFIX + "layer2.0.downsample.0.weight" in theirs
    assert PREFIX + "layer2.1.downsample.0.weight" not in theirs
    assert theirs[PREFIX + "layer3.0.conv2.weight"].shape == (16, 16, 3, 3)


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """[h, x, i], torch's [o, i, k, k] -> [h / stride, x / stride, o], by the definition."""
    side = kernel.shape[2]
    x = np.pad(x, ((side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), (0, 1))
    return np.einsum("yxikl,oikl->yxo", windows[::stride, ::stride], kernel)


def reference(x: np.ndarray, theirs) -> np.ndarray:
    def unit(x, conv, norm, stride):
        x = convolve(x, theirs[PREFIX + conv + ".weight"].astype(np.float64), stride)
        value = {k: theirs[f"{PREFIX}{norm}.{k}"] for k in ("running_mean", "running_var")}
        x = (x - value["running_mean"]) / np.sqrt(value["running_var"] + 1e-5)
        return x * theirs[f"{PREFIX}{norm}.weight"] + theirs[f"{PREFIX}{norm}.bias"]

    x = np.maximum(unit(x, "conv1", "bn1", 2), 0)
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))
    x = windows[::2, ::2].max((-1, -2))
    for stage, depth in enumerate(SPEC.depths, start=1):
        for block in range(depth):
            at, stride = f"layer{stage}.{block}.", 2 if stage > 1 and block == 0 else 1
            y = np.maximum(unit(x, at + "conv1", at + "bn1", 1), 0)
            y = np.maximum(unit(y, at + "conv2", at + "bn2", stride), 0)
            y = unit(y, at + "conv3", at + "bn3", 1)
            if block == 0:
                x = unit(x, at + "downsample.0", at + "downsample.1", stride)
            x = np.maximum(x + y, 0)
    return x


def test_equals_the_definition(flat, theirs):
    image = np.random.default_rng(1).normal(size=(32, 48, 3))
    params = jax.tree.map(jnp.asarray, unflatten(flat))
    run = jax.jit(resnet.ResNet(SPEC).apply)
    ours = run({"params": params}, jnp.asarray(image[None], jnp.float32))
    expected = reference(image, theirs)
    assert ours.shape == (1, 2, 3, SPEC.width)
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_statistics_are_frozen_and_all_else_trains(flat):
    image = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 32, 3)), jnp.float32)

    def loss(params):
        return (resnet.ResNet(SPEC).apply({"params": params}, image) ** 2).mean()  # type: ignore

    grads = flatten(jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, unflatten(flat))))
    for path, grad in grads.items():
        frozen = path.endswith(("/mean", "/var"))
        assert np.any(grad) != frozen, path
