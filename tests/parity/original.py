"""RoboVLMs' configs and batches in our terms."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from vla_jax.config import HeadConfig, ModelConfig, resolve
from vla_jax.convert.robovlms import source as robovlms
from vla_jax.models.heads import HEADS
from vla_jax.types import Actions, Observation

# `pred_action_discrete` takes the best id of all; the golden tokenizer's vocabulary has 600 ids of
# which 4 are special, and 10 more stay free.
TOKEN_END = 600 - 4 - 10


def model_config(original: Mapping[str, Any], backbone: str, arch: dict[str, Any]) -> ModelConfig:
    """What a RoboVLMs config.json (or, if empty, an HF model) comes to, by `convert`'s own rules.

    Here the layout is the original's, padding and all, and so is the choice of action tokens.
    """
    raw = base.get_config().to_dict()
    raw = robovlms.to_config(original, raw) if original else raw
    raw["data"]["datasets"] = ({"spec": "golden", "dir": "golden", "weight": 1.0},)
    model, discrete = raw["model"], raw["model"]["head"]["kind"] == "detokenizer"
    model.update({"dtype": "float32", "remat": "none", "dropout": False})
    model["backbone"] = {"name": backbone, "hf_dir": "", "arch": arch}
    insert = "per_row" if discrete else "padded_column"
    model["structure"].update({"text_len": 4, "parity": {"act_insert": insert}})
    model["head"].update(
        {"parity": {"vocabulary": "all"}, "token_end": TOKEN_END if discrete else 0}
    )
    if not original:
        model["structure"].update({"cameras": ("primary",), "window": 1})
    return resolve(raw).model


def head_config(kind: str, **changes: Any) -> HeadConfig:
    """The options of a head; what is not given stays at its default, other heads' are left out."""
    cls = HEADS[kind].OPTIONS
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(kind=kind, **{name: x for name, x in changes.items() if name in names})


def image(x: np.ndarray) -> np.ndarray:
    """Channels first -> last."""
    return np.moveaxis(x, -3, -1)


def observation(images: dict[str, Any], text: np.ndarray, mask: np.ndarray) -> Observation:
    """With every frame real."""
    observed = {k: np.ones(v.shape[:2], bool) for k, v in images.items()}
    full = Observation(
        images=images, image_mask=observed, text=text.astype(np.int32), text_mask=mask
    )
    return jax.tree.map(jnp.asarray, full)


def cameras(
    io: Mapping[str, np.ndarray], primary: str, wrist: str, step: int | None = None
) -> dict[str, np.ndarray]:
    """The images of a batch or of one control step."""
    results = {"primary": io[primary], "wrist": io.get(wrist)}
    rows = slice(None) if step is None else slice(step, step + 1)
    return {name: image(x[:, rows]) for name, x in results.items() if x is not None}


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
