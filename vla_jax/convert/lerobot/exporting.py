"""Our SmolVLA -> a folder that LeRobot's policies, trainer and commands load."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ConfigError, ModelConfig, resolve
from vla_jax.convert import card, maps, output
from vla_jax.convert.formats.safetensors import Writer
from vla_jax.convert.hf.files import write_json
from vla_jax.convert.lerobot import names, processors
from vla_jax.convert.lerobot.importing import CONFIG, MODEL
from vla_jax.convert.store import Stored
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models import vla

log = logging.getLogger(__name__)
# What LeRobot's SmolVLA is made of; it reads sizes and words there.
VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
# Where the folder's own config does not say otherwise; the recipe is LeRobot's default. Without a
# device LeRobot takes the best that is there.
_DEFAULTS = {"device": None, "push_to_hub": False, "pad_language_to": "longest"}


def to_lerobot(
    stored: Stored,
    out: str | Path,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    done: Callable[[int], Any] = lambda count: None,
    vlm: str = "",
) -> maps.Outgoing:
    """A folder with LeRobot's config, weights and, where it has such units, processors.

    Args:
        stored: the checkpoint.
        out: the new folder.
        dtype: write everything in this type; None keeps each parameter's.
        overwrite: replace `out`.
        done: takes the bytes just written.
        vlm: name or folder of the VLM, as LeRobot is to find it; "" = the imported policy's, or
            SmolVLM2.

    Raises:
        ConfigError: the model is no SmolVLA, or none that LeRobot can build.
        WeightError: the checkpoint and the weight map differ.
        OutputError: `out` is taken.
    """
    config = resolve(stored.meta["config"])
    model: Any = vla.build(config.model)
    c = model.config
    if (c.backbone.name, c.structure.kind, c.expert.state) != ("smolvlm", "expert", "prefix"):
        raise ConfigError("this is no SmolVLA: smolvlm, expert, model.expert.state 'prefix'")
    units = _units(stored.meta, config.data.datasets[0].spec)
    settings = _settings(c, model.arch, stored.meta.get("origin", {}).get("config") or {}, vlm)
    settings["normalization_mapping"] = processors.mapping(units)
    outgoing = maps.outgoing(names.rows(model), stored.leaves, dtype)
    with output.whole(out, overwrite) as folder:
        with Writer(folder / MODEL, outgoing.shapes, outgoing.dtypes, None) as writer:
            for name, value in outgoing.repeated():
                writer.write(name, value)
                done(value.nbytes)
        write_json(folder / CONFIG, settings)
        why = processors.reason(units)
        if units and not why:
            processors.write(folder, settings, units)
        else:
            log.warning("no processors are written, which LeRobot then asks for: %s", why)
        card.write(folder / card.FILE, stored, card.LEROBOT)
    return outgoing


def _units(meta: Mapping[str, Any], spec: str) -> PolicyUnits | None:
    raw = meta["units"].get(spec)
    return PolicyUnits.from_json(raw) if raw else None


def _settings(
    model: ModelConfig, arch: Mapping[str, Any], origin: Mapping[str, Any], vlm: str
) -> dict[str, Any]:
    """LeRobot's config.json: what our config says, over the imported one."""
    e, s, text = model.expert, model.structure, arch["text_config"]
    head: Any = model.head
    width, side = text["hidden_size"], arch["vision_config"]["image_size"]
    made = names.hidden_of(e.width)
    if e.hidden != made:
        raise ConfigError(
            f"model.expert.hidden: LeRobot makes an expert of width {e.width} with {made}, "
            f"this one has {e.hidden}"
        )
    cameras = _cameras(s.cameras, side, origin)
    return {
        **_DEFAULTS,
        **origin,
        "type": "smolvla",
        "vlm_model_name": vlm or origin.get("vlm_model_name") or VLM,
        # The weights are all in this folder.
        "load_vlm_weights": False,
        "input_features": {
            **cameras,
            processors.FEATURES["state"]: {"type": "STATE", "shape": [s.proprio]},
        },
        "output_features": {
            processors.FEATURES["actions"]: {"type": "ACTION", "shape": [model.action_dim]}
        },
        "chunk_size": s.chunk,
        "n_action_steps": min(origin.get("n_action_steps", s.chunk), s.chunk),
        "max_state_dim": e.padded,
        "max_action_dim": e.padded,
        "resize_imgs_with_padding": [side, side],
        "tokenizer_max_length": s.text_len,
        "num_steps": head.sampling_steps,
        "add_image_special_tokens": bool(e.marks_before or e.marks_behind),
        "attention_mode": "cross_attn" if e.joint_every > 1 else "self_attn",
        "self_attn_every_n_layers": e.joint_every,
        "num_vlm_layers": text["num_hidden_layers"],
        "num_expert_layers": e.layers or -1,
        # LeRobot cuts the product to a whole number, which must not end one below the width.
        "expert_width_multiplier": _multiplier(e.width, width),
    }


def _cameras(names: tuple[str, ...], side: int, origin: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's names of our cameras, in their order: the imported policy's if it has as many."""
    found = {
        name: feature
        for name, feature in (origin.get("input_features") or {}).items()
        if feature["type"] == "VISUAL"
    }
    if len(found) == len(names):
        return found
    shape = [3, side, side]
    return {f"observation.images.{name}": {"type": "VISUAL", "shape": shape} for name in names}


def _multiplier(width: int, of: int) -> float:
    ratio = width / of
    return ratio if int(of * ratio) == width else (width + 0.5) / of
