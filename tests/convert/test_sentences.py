"""Instructions as CLIP vectors, against the tower written out in numpy."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from vla_jax.config import ConfigError
from vla_jax.convert.sentences import embed
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.weights import WeightError

WIDTH, HEADS, LAYERS, HIDDEN, VOCAB, COLUMNS, SIZE = 8, 2, 2, 12, 20, 9, 6
TEXTS = ["lift the red block", "push it", "lift the blue block"]


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "text_model.embeddings.token_embedding.weight": (VOCAB, WIDTH),
        "text_model.embeddings.position_embedding.weight": (COLUMNS, WIDTH),
        "text_model.final_layer_norm.weight": (WIDTH,),
        "text_model.final_layer_norm.bias": (WIDTH,),
        "text_projection.weight": (SIZE, WIDTH),
        "logit_scale": (),
        "vision_model.pre_layrnorm.weight": (3,),
    }
    for i in range(LAYERS):
        layer = f"text_model.encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (WIDTH, WIDTH)}
            shapes |= {f"{layer}self_attn.{name}.bias": (WIDTH,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (WIDTH,), f"{layer}{name}.bias": (WIDTH,)}
        shapes |= {f"{layer}mlp.fc1.weight": (HIDDEN, WIDTH), f"{layer}mlp.fc1.bias": (HIDDEN,)}
        shapes |= {f"{layer}mlp.fc2.weight": (WIDTH, HIDDEN), f"{layer}mlp.fc2.bias": (WIDTH,)}
    return {k: np.asarray(rng.normal(size=s) * 0.4, np.float32) for k, s in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": COLUMNS,
    }
    config = {"model_type": "clip", "projection_dim": SIZE, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(Tokenizer.build(TEXTS, VOCAB).to_json())
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


def norm(x: np.ndarray, p: dict[str, np.ndarray], name: str) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x: np.ndarray, p: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def reference(ids: np.ndarray) -> np.ndarray:
    """One sentence without padding; the last token is the end."""
    p = {k: v.astype(np.float64) for k, v in tensors().items()}
    n, table = len(ids), "text_model.embeddings."
    x = p[table + "token_embedding.weight"][ids] + p[table + "position_embedding.weight"][:n]
    for i in range(LAYERS):
        layer = f"text_model.encoder.layers.{i}."
        y = norm(x, p, layer + "layer_norm1")
        q, k, v = (
            linear(y, p, f"{layer}self_attn.{c}_proj").reshape(n, HEADS, -1).swapaxes(0, 1)
            for c in "qkv"
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(WIDTH // HEADS)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ v).swapaxes(0, 1).reshape(n, WIDTH)
        x = x + linear(mixed, p, layer + "self_attn.out_proj")
        y = linear(norm(x, p, layer + "layer_norm2"), p, layer + "mlp.fc1")
        x = x + linear(y / (1 + np.exp(-1.702 * y)), p, layer + "mlp.fc2")
    x = norm(x, p, "text_model.final_layer_norm")[-1] @ p["text_projection.weight"].T
    return x / np.linalg.norm(x)


def test_vectors_are_clips(folder):
    vectors = embed(folder, [*TEXTS, TEXTS[0]], SIZE)
    assert set(vectors) == set(TEXTS)
    tokenizer = Tokenizer.from_dir(folder)
    for text, got in vectors.items():
        ids, mask = tokenizer.encode(text, COLUMNS)
        np.testing.assert_allclose(got, reference(ids[mask]), atol=1e-5)
        assert np.linalg.norm(got) == pytest.approx(1, abs=1e-5)


def test_what_does_not_fit(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"768, but the vectors of .* have 6"):
        embed(folder, TEXTS, 768)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        embed(tmp_path / "nowhere", TEXTS, SIZE)
    result = tensors()
    del result["text_projection.weight"]
    save_file(result, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"text_projection\.weight"):
        embed(folder, TEXTS, SIZE)
