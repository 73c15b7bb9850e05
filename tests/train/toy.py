"""A small model and batch with the call shape of the real ones, and parameter names like theirs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from vla_jax.config import Config, resolve
from vla_jax.models.image import ImageSpec
from vla_jax.rules import unflatten
from vla_jax.types import Actions, Batch, Observation, Prediction

DIM, HEADS, HEAD_DIM, HIDDEN, LAYERS, VOCAB = 16, 4, 4, 32, 2, 11
WINDOW, CHUNK, ACTION, SIZE = 3, 2, 7, 8
CAMERAS = ("primary", "wrist")


class Toy:
    """Vision and text to a causal mixing over the window to two heads; dropout when training."""

    image = ImageSpec(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))

    def __init__(self, measure: Any = None):
        self._measure = measure or loss

    def init(self, key: jax.Array) -> dict[str, Any]:
        shapes = {
            "backbone/vision/patch/kernel": (SIZE * SIZE * 3, DIM),
            "backbone/text/embedding": (VOCAB, DIM),
            "backbone/text/layers/attn/q/kernel": (LAYERS, DIM, HEADS, HEAD_DIM),
            "backbone/text/layers/attn/o/kernel": (LAYERS, HEADS, HEAD_DIM, DIM),
            "backbone/text/layers/attn/o/bias": (LAYERS, DIM),
            "backbone/text/layers/mlp/fc1/kernel": (LAYERS, DIM, HIDDEN),
            "backbone/text/layers/mlp/fc2/kernel": (LAYERS, HIDDEN, DIM),
            "backbone/text/layers/norm/scale": (LAYERS, DIM),
            "head/arm/kernel": (DIM, CHUNK * (ACTION - 1)),
            "head/gripper/kernel": (DIM, CHUNK),
        }
        # One draw for all: compiling a generator ten times takes longer than the tests do.
        ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
        pieces = jnp.split(0.2 * jax.random.normal(key, (ends[-1],)), ends[:-1])
        flat = {p: x.reshape(s) for (p, s), x in zip(shapes.items(), pieces, strict=True)}
        return unflatten(flat)

    def supervised(self, actions: Actions) -> Actions:
        return actions

    def apply(self, variables: Any, *args: Any, method: str, rngs: Any = None):
        observation, actions, _, gripper_weight = args
        prediction = self.predict(variables, observation, rngs)
        total, parts = self._measure(prediction, actions, gripper_weight)
        return (total, parts) if method == "loss" else (total, parts, prediction)

    def predict(self, variables: Any, observation: Observation, rngs: Any = None):
        backbone, head = variables["params"]["backbone"], variables["params"]["head"]
        pixels = observation.images[CAMERAS[0]] + observation.images[CAMERAS[1]]
        rows, window = pixels.shape[:2]
        x = pixels.reshape(rows, window, -1) @ backbone["vision"]["patch"]["kernel"]
        words = jnp.take(backbone["text"]["embedding"], observation.text, axis=0)
        x = x + (words * observation.text_mask[..., None]).sum(1)[:, None]
        if rngs:
            keep = jax.random.bernoulli(rngs["dropout"], 0.9, x.shape)
            x = jnp.where(keep, x / 0.9, 0.0)

        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            h = x / (1.0 + jnp.abs(x)) * (1.0 + p["norm"]["scale"])
            heads = jnp.cumsum(jnp.einsum("bwd,dhk->bwhk", h, p["attn"]["q"]["kernel"]), 1)
            x = x + jnp.einsum("bwhk,hkd->bwd", heads, p["attn"]["o"]["kernel"])
            x = x + p["attn"]["o"]["bias"]
            return x + jnp.tanh(x @ p["mlp"]["fc1"]["kernel"]) @ p["mlp"]["fc2"]["kernel"], None

        x, _ = jax.lax.scan(layer, x.astype(jnp.float32), backbone["text"]["layers"])
        arm = jnp.tanh(x @ head["arm"]["kernel"]).reshape(rows, window, CHUNK, ACTION - 1)
        return Prediction(arm, x @ head["gripper"]["kernel"])


def loss(prediction: Prediction, actions: Actions, gripper_weight: float):
    mask = actions.mask.astype(jnp.float32)
    count = mask.sum() + 1e-6
    arm = ((prediction.arm - actions.chunk[..., :-1]) ** 2).mean(-1)
    logit, label = jnp.asarray(prediction.gripper), actions.chunk[..., -1]
    gripper = jnp.maximum(logit, 0) - logit * label + jnp.log1p(jnp.exp(-jnp.abs(logit)))
    parts = {"loss_arm": (arm * mask).sum() / count, "loss_gripper": (gripper * mask).sum() / count}
    return parts["loss_arm"] + gripper_weight * parts["loss_gripper"], parts


def make_batch(number: int = 0, rows: int = 8, size: int = SIZE) -> Batch:
    """Rows number * rows ... of an endless random stream: each a function of its own number."""
    samples = [_row(n, size) for n in range(number * rows, (number + 1) * rows)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *samples)


def _row(n: int, size: int) -> Batch:
    rng = np.random.default_rng(n)
    chunk = rng.uniform(-1, 1, (WINDOW, CHUNK, ACTION)).astype(np.float32)
    chunk[..., -1] = rng.random((WINDOW, CHUNK)) < 0.7
    observed = np.arange(WINDOW) >= n % 2
    images = {
        c: rng.integers(0, 256, (WINDOW, size, size, 3), np.uint8) * observed[:, None, None, None]
        for c in CAMERAS
    }
    return Batch(
        Observation(
            images={c: x.astype(np.uint8) for c, x in images.items()},
            image_mask=dict.fromkeys(CAMERAS, observed),
            text=rng.integers(0, VOCAB, 5).astype(np.int32),
            text_mask=np.arange(5) < 4,
        ),
        Actions(chunk, rng.random((WINDOW, CHUNK)) < 0.8),
        sample=np.array([n >> 32, n & 0xFFFFFFFF], np.uint32),
        dataset=np.array(n % 2, np.int32),
    )


def make_config(**changes: Any) -> Config:
    """The base config with a dataset named and dotted keys changed."""
    raw: Any = base.get_config()
    raw.data.datasets = ({"spec": "toy", "dir": "toy", "weight": 1.0},)
    raw.optim.learning_rate, raw.optim.warmup_steps = 1e-2, 2
    raw.train.steps, raw.train.batch_size = 20, 8
    raw.augment.shift, raw.augment.brightness = {"primary": 1}, 0.1
    with raw.unlocked():
        raw.update_from_flattened_dict(changes)
    return resolve(raw)
