"""LeRobot's SmolVLA: its config and what stands before it."""

from collections.abc import Mapping
from typing import Any

from vla_jax.config import ConfigError, ModelConfig
from vla_jax.convert.lerobot import names, processors
from vla_jax.convert.lerobot.processors import Steps

# What SmolVLA is made of; LeRobot reads sizes and words there.
VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"


def settings(config: ModelConfig, arch: Mapping[str, Any]) -> dict[str, Any]:
    """What of LeRobot's config.json our config says, but for what all its policies have.

    Raises:
        ConfigError: LeRobot cannot build such an expert.
    """
    e, s, text = config.expert, config.structure, arch["text_config"]
    head: Any = config.head
    side, hidden = arch["vision_config"]["image_size"], names.hidden_of(e.width)
    if e.hidden != hidden:
        raise ConfigError(
            f"model.expert.hidden: LeRobot makes an expert of width {e.width} with {hidden}, "
            f"this one has {e.hidden}"
        )
    return {
        "type": "smolvla",
        # The weights are all in this folder.
        "load_vlm_weights": False,
        "resize_imgs_with_padding": [side, side],
        "tokenizer_max_length": s.text_len,
        "num_steps": head.sampling_steps,
        "add_image_special_tokens": bool(e.marks_before or e.marks_behind),
        "attention_mode": "cross_attn" if e.joint_every > 1 else "self_attn",
        "self_attn_every_n_layers": e.joint_every,
        "num_vlm_layers": text["num_hidden_layers"],
        # LeRobot's -1, like our 0, means as many as the VLM has.
        "num_expert_layers": e.layers or -1,
        # LeRobot cuts the product to a whole number, which must not end one below the width.
        "expert_width_multiplier": _multiplier(e.width, text["hidden_size"]),
    }


def before(settings: Mapping[str, Any]) -> Steps:
    """The steps before the policy, in their order."""
    words = processors.words(
        settings["vlm_model_name"], settings["tokenizer_max_length"], settings["pad_language_to"]
    )
    return {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        "smolvla_new_line_processor": {},
        "tokenizer_processor": words,
        "device_processor": processors.device(settings),
        processors.SCALES: {},
    }


def _multiplier(width: int, of: int) -> float:
    ratio = width / of
    return ratio if int(of * ratio) == width else (width + 0.5) / of
