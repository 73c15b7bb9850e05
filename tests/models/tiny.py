"""A very small VLA for every structure and head, and inputs for it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from configs.tiny import ARCHS
from vla_jax.config import ModelConfig, resolve
from vla_jax.data.language.fast_text import AnswerWriter, FastText
from vla_jax.data.units.fast import FastTokenizer
from vla_jax.models import vla
from vla_jax.types import Actions, Observation

WINDOW, CHUNK, TEXT, SIZE = 3, 2, 9, 32
CAMERAS = ("primary", "wrist")
ANSWER = 20  # columns of a chunk in FAST tokens


def config(structure: str, head: str, backbone: str = "", **changes: Any) -> ModelConfig:
    """Dotted keys below `model` change it further."""
    raw = quickstart.get_config()
    stepwise = structure in ("one_step", "expert", "parallel") or head == "fast"
    window = 1 if stepwise else WINDOW
    # Kosmos-2 has no rotary positions, which an expert shares, and is causal.
    beside = {"expert": "paligemma", "parallel": "prismatic"}
    backbone = backbone or beside.get(structure, "kosmos2")
    raw.model.structure.update(
        {"kind": structure, "window": window, "chunk": CHUNK, "text_len": TEXT}
    )
    raw.model.backbone = {"name": backbone, "hf_dir": "", "arch": ARCHS[backbone]}
    raw.model.head.update({"kind": head, "hidden": 16, "layers": 1, "heads": 2, "bins": 20})
    raw.model.head.update({"sampling_steps": 4})
    raw.model.expert.update({"width": 16, "hidden": 16, "padded": 8, "prompt": "pi0"})
    raw.model.fast.update({"prompt": "pi0", "length": ANSWER, "images": "backbone"})
    raw.model.update_from_flattened_dict(changes)
    return resolve(raw).model


# What was built and compiled, by all that it depends on: tests of one process share it.
_BUILT: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = {}
_COMPILED: dict[tuple[int, Any, Any], tuple[Any, Any]] = {}


def build(model_config: ModelConfig, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """The model, and parameters none of which is neutral (gates and tokens start at zero)."""
    key = repr(model_config), seed
    if key not in _BUILT:
        _BUILT[key] = _build(model_config, seed)
    model, params = _BUILT[key]
    return model, jax.tree.map(lambda leaf: leaf, params)  # its dicts are the caller's to change


def call(model: Any, params: Any, method: Any, *args: Any) -> Any:
    """A method of a model, compiled once for all calls with arguments of the same shapes."""
    numbers = tuple(arg if isinstance(arg, float) else None for arg in args)
    key = id(model), method, numbers
    if key not in _COMPILED:

        def run(params: Any, args: Any) -> Any:
            args = [
                arg if number is None else number for arg, number in zip(args, numbers, strict=True)
            ]
            return model.apply({"params": params}, *args, method=method)

        _COMPILED[key] = model, jax.jit(run)  # the model is held, so that no other gets its id
    arrays = [None if isinstance(arg, float) else arg for arg in args]
    return _COMPILED[key][1](params, arrays)


def _build(model_config: ModelConfig, seed: int) -> tuple[Any, dict[str, Any]]:
    """In numpy: to compile what makes the real ones would take as long as the test itself."""
    model = vla.build(model_config)
    shapes = jax.eval_shape(lambda k: vla.initial_params(model, k), jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        x = 0.1 * rng.normal(size=leaf.shape) + (path[-1].key in ("scale", "var"))
        return jnp.asarray(x, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def drawn(shapes: Any, seed: int) -> Any:
    """Kernels about as large as initializers make them, of which none is neutral; in numpy."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        inputs = np.prod(leaf.shape[:-1]) if path[-1].key.endswith("kernel") else 1e4
        x = rng.normal(size=leaf.shape) / np.sqrt(inputs) + 0.1 * rng.normal(size=leaf.shape)
        return jnp.asarray(x + (path[-1].key in ("scale", "var")), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def observe(
    batch: int = 2, window: int = WINDOW, seed: int = 0, lengths=(7, 9), size: int = SIZE
) -> Observation:
    """Random images and texts of different lengths."""
    rng = np.random.default_rng(seed)
    shape = (batch, window, size, size, 3)
    images = {c: jnp.asarray(rng.normal(size=shape), jnp.float32) for c in CAMERAS}
    mask = np.arange(TEXT) < np.array(lengths[:batch])[:, None]
    ids = np.where(mask, rng.integers(5, 100, (batch, TEXT)), 1)
    return Observation(
        images=images,
        image_mask={c: jnp.ones((batch, window), bool) for c in images},
        text=jnp.asarray(ids, jnp.int32),
        text_mask=jnp.asarray(mask),
    )


def steps(observation: Observation, begin: int, end: int) -> Observation:
    """Part of a window."""
    return Observation(
        images={c: x[:, begin:end] for c, x in observation.images.items()},
        image_mask={c: x[:, begin:end] for c, x in observation.image_mask.items()},
        text=observation.text,
        text_mask=observation.text_mask,
    )


@functools.cache
def fast_text(end: int = 128) -> FastText:
    """FAST tokens of chunks of `CHUNK` actions, below an id."""
    rng = np.random.default_rng(5)
    chunks = np.sign(rng.normal(size=(400, CHUNK, 7))) * rng.uniform(0.2, 1, (400, 1, 7))
    return FastText(FastTokenizer.fit(chunks, 44), end, (7, 8), (9,), 2)


def write(model: Any, actions: Actions) -> Actions:
    """Labels with the texts that say their chunks."""
    writer = AnswerWriter(fast_text(), vla.written(model.config), True)
    written = np.stack([writer(chunk) for chunk in np.asarray(actions.chunk[:, -1])])
    return dataclasses.replace(actions, written=jnp.asarray(written))


def act(batch: int = 2, window: int = WINDOW, seed: int = 0) -> Actions:
    """Random labels, all supervised."""
    rng = np.random.default_rng(seed)
    chunk = rng.uniform(-1, 1, (batch, window, CHUNK, 7)).astype(np.float32)
    chunk[..., -1] = chunk[..., -1] > 0
    return Actions(jnp.asarray(chunk), jnp.ones((batch, window, CHUNK), bool))
