"""LeRobot's pi0 and pi0.5: openpi's torch port, with a config and processors of LeRobot's.

Source: lerobot 0.6.1 `policies/pi0`, `policies/pi05`.
"""

from collections.abc import Mapping
from typing import Any

from vla_jax.config import ConfigError, ModelConfig
from vla_jax.convert.lerobot import processors
from vla_jax.convert.lerobot.processors import Steps
from vla_jax.convert.openpi.names import torch_rows
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models import weights as w

# Where LeRobot looks PaliGemma's words up.
VLM = "google/paligemma-3b-pt-224"
# Before the names of the torch port; openpi's own files have none.
PREFIX = "model."
# Gemmas that LeRobot builds: (width, MLP, layers, heads, key heads, numbers a head) -> name.
GEMMAS = {
    (1024, 4096, 18, 8, 1, 256): "gemma_300m",
    (2048, 16384, 18, 8, 1, 256): "gemma_2b",
}
# What it builds around them whatever the config: SigLIP's width, layers, heads, MLP and side of a
# patch; words.
FIXED = (1152, 27, 16, 4304, 14), 257152
# Of actions that count from the state and of those that do not; the latter's is LeRobot's default.
_RELATIVE, _ABSOLUTE = "joint", "gripper"


def kind(config: ModelConfig) -> str:
    """LeRobot's name of the policy; "" = it is neither.

    Args:
        config: the model's.
    """
    e = config.expert
    if (config.backbone.name, config.structure.kind) != ("paligemma", "expert"):
        return ""
    # These are SmolVLA's ways, for which the torch port has no code.
    if e.joint_every != 1 or e.causal or e.scaled_prefix or e.layers:
        return ""
    return {(False, "expert"): "pi0", (True, "none"): "pi05"}.get((e.adaptive, e.state), "")


def rows(config: ModelConfig, arch: Mapping[str, Any]) -> list[w.Weight]:
    """Every tensor of model.safetensors but the expert's head, which is not used."""
    return w.prefixed(torch_rows(config, arch), PREFIX, "")


def settings(config: ModelConfig, arch: Mapping[str, Any]) -> dict[str, Any]:
    """What of LeRobot's config.json our config says, but for what all its policies have.

    Raises:
        ConfigError: LeRobot cannot build a model of these sizes, or has no such prompt.
    """
    e, s, text, vision = config.expert, config.structure, arch["text_config"], arch["vision_config"]
    head: Any = config.head
    shared = [text[k] for k in ("num_hidden_layers", "num_attention_heads")]
    shared += [text["num_key_value_heads"], text["head_dim"]]
    sizes = (text["hidden_size"], text["intermediate_size"], *shared), (e.width, e.hidden, *shared)
    tower = tuple(vision[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    tower = (*tower, vision["intermediate_size"], vision["patch_size"]), text["vocab_size"]
    if not set(sizes) <= set(GEMMAS) or tower != FIXED:
        raise ConfigError(
            f"LeRobot builds pi0 and pi0.5 of {sorted(GEMMAS.values())} and a tower, words of "
            f"{FIXED} alone; this one has {sizes[0]}, its expert {sizes[1]}, the others {tower}"
        )
    if e.prompt not in ("pi0", "pi05") or (e.prompt == "pi05" and not e.adaptive):
        raise ConfigError(f"model.expert.prompt: LeRobot's {kind(config)} has none like {e.prompt}")
    return {
        "type": kind(config),
        "paligemma_variant": GEMMAS[sizes[0]],
        "action_expert_variant": GEMMAS[sizes[1]],
        "image_resolution": [vision["image_size"]] * 2,
        "empty_cameras": 0,
        "tokenizer_max_length": s.text_len,
        "num_inference_steps": head.sampling_steps,
    }


def relative(units: PolicyUnits | None, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What LeRobot's config says of actions that count from the state.

    It chooses them by their names: an action is left out whose name has a joint's to exclude in it.

    Args:
        units: the checkpoint's.
        origin: the config that was imported; {} = none.
    """
    mask = units.relative if units else ()
    if not any(mask):
        return {"use_relative_actions": False}
    joints = "relative_exclude_joints", "action_feature_names"
    if origin.get("use_relative_actions") and all(origin.get(key) for key in joints):
        return {"use_relative_actions": True, **{key: origin[key] for key in joints}}
    # A mask may be shorter than an action, and what lies behind it stays absolute.
    padded = (*mask, *[False] * (units.dim - len(mask))) if units else ()
    return {
        "use_relative_actions": True,
        "relative_exclude_joints": [] if all(padded) else [_ABSOLUTE],
        "action_feature_names": [
            f"{_RELATIVE if counts else _ABSOLUTE}_{i}" for i, counts in enumerate(padded)
        ],
    }


def before(settings: Mapping[str, Any], prompt: str, vlm: str) -> Steps:
    """The steps before the policy, in their order.

    Args:
        settings: LeRobot's config, complete.
        prompt: `model.expert.prompt`; with pi05 the scaled state is part of it.
        vlm: where the words are looked up.
    """
    text: Steps = {"smolvla_new_line_processor": {}}
    if settings["type"] == "pi0":
        text = {"pi0_new_line_processor": {}}
    if prompt == "pi05":
        text = {"pi05_prepare_state_tokenizer_processor_step": {}}
    return {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        processors.RELATIVE: {
            "enabled": settings["use_relative_actions"],
            "exclude_joints": settings.get("relative_exclude_joints", [_ABSOLUTE]),
            "action_names": settings.get("action_feature_names"),
        },
        processors.SCALES: {},
        **text,
        "tokenizer_processor": processors.words(
            vlm, settings["tokenizer_max_length"], "max_length"
        ),
        "device_processor": processors.device(settings),
    }
