"""RoboVLMs' configs and batches in our terms."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from vla_jax.config import BackboneConfig, HeadConfig, ModelConfig, StructureConfig
from vla_jax.types import Actions, Observation

HEADS = {
    "FCDecoder": "mlp",
    "LSTMDecoder": "lstm",
    "GPTDecoder": "gpt2",
    "DiscreteDecoder": "detokenizer",
}
LAYERS = {"lstm": 4, "gpt2": 8}  # where the config does not say
# `pred_action_discrete` takes the best id of all; the golden tokenizer's vocabulary has 600 ids of
# which 4 are special, and 10 more stay free.
TOKEN_END = 600 - 4 - 10


def model_config(original: Mapping[str, Any], backbone: str, arch: dict[str, Any]) -> ModelConfig:
    """What a RoboVLMs config.json (or, with no act_head, an HF model) comes to."""
    return ModelConfig(
        backbone=BackboneConfig(backbone, "", arch),
        structure=_structure(original),
        head=head_config(original.get("act_head", {})),
        action_dim=7,
        dropout=False,
        dtype="float32",
        remat="none",
    )


def head_config(head: Mapping[str, Any]) -> HeadConfig:
    """RoboVLMs' `act_head`."""
    defaults = base.get_config().model.head.to_dict()
    kind = HEADS[head.get("type", "LSTMDecoder")]
    return HeadConfig(
        **{
            **defaults,
            "kind": kind,
            "hidden": head.get("hidden_size", 1024),
            "layers": head.get("num_layers", LAYERS.get(kind, 1)),
            "down_sample": head.get("down_sample", "none"),
            "bins": head.get("n_bin", 256),
            "low": float(head.get("min_action", -1)),
            "high": float(head.get("max_action", 1)),
            "token_end": TOKEN_END if kind == "detokenizer" else 0,
            "vocabulary": "all",
        }
    )


def _structure(original: Mapping[str, Any]) -> StructureConfig:
    head, window = original.get("act_head", {}), original.get("window_size", 1)
    history, kind = head.get("history_type", "post"), "policy_head"
    if head.get("action_space") == "discrete":
        kind = "discrete"
    elif history == "post" and window == 1 and head.get("type") == "FCDecoder":
        kind = "one_step"
    elif history != "post":
        kind = {"pre": "interleaved", "video": "video"}[history]
    down_sample = head.get("action_space") == "down_sample"
    return StructureConfig(
        kind=kind,
        window=window,
        chunk=original.get("fwd_pred_next_n", 1),
        latent=head.get("latent", 1),
        cameras=("primary", "wrist") if original.get("use_hand_rgb") else ("primary",),
        text_len=4,
        resampler=64 if original.get("use_vision_resampler") else 0,
        proprio=0,
        act_insert="per_row" if kind == "discrete" else "padded_column",
        readout=head.get("token_source", "all") if down_sample else "action",
    )


def image(x: np.ndarray) -> np.ndarray:
    """Channels first -> last."""
    return np.moveaxis(x, -3, -1)


def observation(images: dict[str, Any], text: np.ndarray, mask: np.ndarray) -> Observation:
    """With every frame real."""
    seen = {k: np.ones(v.shape[:2], bool) for k, v in images.items()}
    whole = Observation(images=images, image_mask=seen, text=text.astype(np.int32), text_mask=mask)
    return jax.tree.map(jnp.asarray, whole)


def cameras(
    io: Mapping[str, np.ndarray], primary: str, wrist: str, step: int | None = None
) -> dict[str, np.ndarray]:
    """The images of a batch or of one control step."""
    found = {"primary": io[primary], "wrist": io.get(wrist)}
    rows = slice(None) if step is None else slice(step, step + 1)
    return {name: image(x[:, rows]) for name, x in found.items() if x is not None}


def batch(io: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[Observation, Actions]:
    """`batch/*` of a golden folder; a video's labels get back the step they belong to."""
    images = cameras(io, "batch/rgb", "batch/hand_rgb")
    images = {name: images[name] for name in config.structure.cameras}
    chunk = io["batch/action_chunck"].astype(np.float32)
    mask = io.get("batch/chunck_mask", np.ones(chunk.shape[:-1], bool)).astype(bool)
    if chunk.ndim == 3:
        chunk, mask = chunk[:, None], mask[:, None]
    mask_of_text = io["batch/text_mask"].astype(bool)
    return (
        observation(images, io["batch/text"], mask_of_text),
        Actions(chunk=jnp.asarray(chunk), mask=jnp.asarray(mask)),
    )
