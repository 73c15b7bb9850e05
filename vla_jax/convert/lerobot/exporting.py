"""Our SmolVLA, pi0 and pi0.5 -> a folder that LeRobot's policies, trainer and commands load."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ConfigError, ModelConfig, resolve
from vla_jax.convert import card, maps, output
from vla_jax.convert.formats.safetensors import Writer
from vla_jax.convert.hf.files import write_json
from vla_jax.convert.lerobot import names, pi, processors, smolvla
from vla_jax.convert.lerobot.importing import CONFIG, MODEL
from vla_jax.convert.openpi.exporting import write_torch
from vla_jax.convert.store import Stored
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models import vla

log = logging.getLogger(__name__)
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
            SmolVLM2, of which it reads sizes and words, or PaliGemma, of which it reads words.

    Raises:
        ConfigError: the model is none of the three, or none that LeRobot can build.
        WeightError: the checkpoint and the weight map differ.
        OutputError: `out` is taken.
    """
    config = resolve(stored.meta["config"])
    model: Any = vla.build(config.model)
    c, arch = model.config, model.arch
    origin = stored.meta.get("origin", {}).get("config") or {}
    units = _units(stored.meta, config.data.datasets[0].spec)
    is_pi = bool(pi.kind(c))
    # What comes later counts: our config before the imported one, and both before the defaults.
    settings = {**_DEFAULTS, **origin, **_settings(c, arch, origin, units)}
    if is_pi:
        settings |= pi.settings(c, arch) | pi.relative(units, origin)
        # A key of SmolVLA's alone.
        del settings["pad_language_to"]
        before = pi.before(settings, c.expert.prompt, vlm or pi.VLM)
        rows = pi.rows(c, arch)
    elif (c.backbone.name, c.structure.kind, c.expert.state) == ("smolvlm", "expert", "prefix"):
        settings |= {"vlm_model_name": vlm or origin.get("vlm_model_name") or smolvla.VLM}
        settings |= smolvla.settings(c, arch)
        before, rows = smolvla.before(settings), names.rows(model)
    else:
        raise ConfigError(
            "this is no SmolVLA (smolvlm, expert, model.expert.state 'prefix'), no pi0 and no "
            "pi0.5 (paligemma, expert, state 'expert', or adaptive and 'none')"
        )
    why = processors.reason(units, relative=is_pi)
    settings["normalization_mapping"] = processors.mapping(None if why else units)
    outgoing = maps.outgoing(rows, stored.leaves, dtype)
    with output.whole(out, overwrite) as folder:
        if is_pi:
            write_torch(folder / MODEL, outgoing, c.expert.width, done, pi.PREFIX)
        else:
            with Writer(folder / MODEL, outgoing.shapes, outgoing.dtypes, None) as writer:
                for name, value in outgoing.repeated():
                    writer.write(name, value)
                    done(value.nbytes)
        write_json(folder / CONFIG, settings)
        if units and not why:
            processors.write(folder, settings, units, before)
        else:
            log.warning("no processors are written, which LeRobot then asks for: %s", why)
        card.write(folder / card.FILE, stored, card.LEROBOT_PI if is_pi else card.LEROBOT)
    return outgoing


def _units(meta: Mapping[str, Any], spec: str) -> PolicyUnits | None:
    # Checkpoints of formats 1 and 2 have none.
    raw = meta.get("units", {}).get(spec)
    return PolicyUnits.from_json(raw) if raw else None


def _settings(
    model: ModelConfig,
    arch: Mapping[str, Any],
    origin: Mapping[str, Any],
    units: PolicyUnits | None,
) -> dict[str, Any]:
    """What every policy's config.json has: our config's, over the imported one's."""
    e, s = model.expert, model.structure
    cameras = _cameras(s.cameras, arch["vision_config"]["image_size"], origin)
    # A model that takes no state may have actions that count from one.
    size = s.proprio or (len(units.state.first) if units else 0)
    state = {processors.FEATURES["state"]: {"type": "STATE", "shape": [size]}} if size else {}
    return {
        "input_features": {**cameras, **state},
        "output_features": {
            processors.FEATURES["actions"]: {"type": "ACTION", "shape": [model.action_dim]}
        },
        "chunk_size": s.chunk,
        # LeRobot refuses to execute more actions than a chunk has.
        "n_action_steps": min(origin.get("n_action_steps", s.chunk), s.chunk),
        "max_state_dim": e.padded,
        "max_action_dim": e.padded,
    }


def _cameras(names: tuple[str, ...], side: int, origin: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's names of our cameras, in their order: the imported policy's if it has as many."""
    cameras = {
        name: feature
        for name, feature in (origin.get("input_features") or {}).items()
        # A camera that is never there changes nothing, so that ours has none.
        if feature["type"] == "VISUAL" and ".empty_camera_" not in name
    }
    if len(cameras) == len(names):
        return cameras
    shape = [3, side, side]
    return {f"observation.images.{name}": {"type": "VISUAL", "shape": shape} for name in names}
