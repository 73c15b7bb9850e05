"""Instructions as vectors of a CLIP text tower, made once before training."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vla_jax.config import ConfigError
from vla_jax.convert import maps
from vla_jax.convert.formats.safetensors import Safetensors
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.towers import clip_text
from vla_jax.rules import flatten, unflatten

_BATCH = 64


def embed(folder: str | Path, texts: Iterable[str], size: int) -> dict[str, Float[np.ndarray, "s"]]:
    """Distinct texts -> float32 unit vectors.

    Args:
        folder: Hugging Face folder of a CLIP (config.json, safetensors, tokenizer).
        texts: instructions, as they are in the data.
        size: of the vectors, as the model expects it.

    Raises:
        ConfigError: the folder holds no CLIP, or one of another size.
        WeightError: with the whole key report.
        TextLengthError: a text is longer than the tower reads.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.sentence.dir: {path} does not exist")
    config = json.loads(path.read_text(encoding="utf-8"))
    if "text_config" not in config and not config.get("model_type", "").startswith("clip"):
        raise ConfigError(f"model.sentence.dir: {path} is of no CLIP: {config.get('model_type')!r}")
    dim = config.get("projection_dim", 512)
    if dim != size:
        raise ConfigError(f"model.sentence.dim: {size}, but the vectors of {folder} have {dim}")
    # A text tower on its own has its settings at the top.
    spec = clip_text.text_spec(config.get("text_config", config))
    tower, tokenizer = clip_text.ClipText(spec, size), Tokenizer.from_dir(folder)
    params = _load(tower, folder)
    texts = sorted(set(texts))
    encoded = [tokenizer.encode(text.strip(), spec.max_positions) for text in texts]
    run = jax.jit(lambda ids, valid: tower.apply({"params": params}, ids, valid))
    vectors: dict[str, np.ndarray] = {}
    for start in range(0, len(texts), _BATCH):
        part = encoded[start : start + _BATCH]
        part = part + [part[-1]] * (_BATCH - len(part))  # one shape: one compilation
        ids, valid = (jnp.asarray(np.stack(x)) for x in zip(*part, strict=True))
        rows = np.asarray(run(ids, valid), np.float32)
        # Not strict: the rows that pad the last batch belong to no text.
        vectors.update(zip(texts[start : start + _BATCH], rows, strict=False))
    return vectors


def _load(tower: clip_text.ClipText, folder: str | Path) -> dict:
    # Any length will do, as no parameter's shape depends on it.
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: tower.init(jax.random.key(0), ids, ids == 0))["params"]
    ours = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    source = Safetensors(Path(folder).expanduser())
    leaves = maps.incoming(clip_text.weight_map(), ours, source, clip_text.IGNORE).leaves
    return unflatten({path: jnp.asarray(leaf.read(), jnp.float32) for path, leaf in leaves.items()})
