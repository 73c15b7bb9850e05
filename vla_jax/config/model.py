"""The options of the model: backbone x structure x head, and how they are computed."""

from dataclasses import dataclass
from typing import Any

from vla_jax.config.expert import ExpertConfig
from vla_jax.config.fast import FastConfig
from vla_jax.config.option import Options, group, option


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained VLM: which one, from where, and overrides of its HF config.json."""

    name: str = option("kosmos2", "The VLM: name of a file in vla_jax/models/backbones.")
    hf_dir: str = option(
        "",
        "Hugging Face folder (config.json, *.safetensors, tokenizer.json) that a new run starts "
        "from; '' starts from random weights.",
    )
    arch: dict[str, Any] = option({}, "Overrides of the VLM's config.json, with the same nesting.")


@dataclass(frozen=True)
class StructureParity:
    """What a structure does only to repeat a reference implementation."""

    act_insert: str = option(
        "per_row",
        "per_row puts the action token before each row's </s>, whatever the padding, so that a "
        "batch of one equals any other; padded_column is RoboVLMs' training layout.",
        "per_row",
        "padded_column",
    )
    padded_mean: bool = option(
        False,
        "parallel: what image towers are told of the instruction is a mean over its padding too, "
        "as in OpenVLA-OFT's training; in its inference there is none.",
    )


@dataclass(frozen=True)
class StructureConfig(Options):
    """How history and action meet the VLM."""

    kind: str = option(
        "policy_head",
        "one_step: no history. discrete: the VLM writes actions as tokens. interleaved: the VLM "
        "sees the window, image by image. policy_head: the VLM sees one step, the head the "
        "window. video: the VLM sees the window's images at once and acts at its last step.",
    )
    # This and the chunk are those of RoboVLMs' Kosmos-2 policy.
    window: int = option(16, "W, steps of history.", positive=True)
    chunk: int = option(10, "F, actions predicted at every step.", positive=True)
    latent: int = option(1, "Action tokens of a step.", positive=True)
    cameras: tuple[str, ...] = option(
        (),
        "Views the model takes; a dataset without one of them is an error. () = those that every "
        "dataset has (primary and wrist where no data are read).",
    )
    text_len: int = option(
        32, "Text columns, the prompt's included; a longer prompt is an error.", positive=True
    )
    readout: str = option(
        "action",
        "What the head reads of a step. action: the hidden states at its action tokens; text, "
        "vision, all: those of the step's own tokens (RoboVLMs' down_sample), no action token.",
        "action",
        "text",
        "vision",
        "all",
    )
    # RoboVLMs has `use_state`, but it never reaches its model.
    proprio: int = option(
        0, "Numbers of the robot's state, which become one token before the instruction; 0 = none."
    )
    slide: int = option(
        1,
        "Steps that leave a full interleaved window at once. 1: the oldest, so every later step "
        "reads the window anew; more: the VLM goes on with its cache that many steps between.",
    )
    resampler: int = option(
        0, "Tokens of a camera after a Perceiver resampler (RoboVLMs: 64); 0 = no resampler."
    )
    parity: StructureParity = group(StructureParity)


@dataclass(frozen=True)
class HeadConfig(Options):
    """How features become actions; each kind of head declares options of its own in its file."""

    kind: str = option("lstm", "The head: name of a file in vla_jax/models/heads.")
    down_sample: str = option(
        "none",
        "How a step's tokens become `latent` vectors. none: there are that many; pooling: the "
        "maximum over as many spans; resampler: a Perceiver.",
        "none",
        "pooling",
        "resampler",
    )
    gripper: str = option(
        "binary",
        "How a gripper, if model.gripper says there is one, is predicted. binary: open or closed. "
        "number: like the other numbers of an action, in the units of the data, which only the "
        "heads detokenizer, fast, expert_flow and l1 do (openpi, LeRobot, OpenVLA).",
        "binary",
        "number",
    )


@dataclass(frozen=True)
class SentenceConfig:
    """Auxiliary target: CLIP's vector of the instruction (RoboVLMs' use_clip_norm)."""

    dir: str = option("", "Hugging Face folder of that CLIP.")
    dim: int = option(
        0,
        "Size of the vector, which the features must predict beside the actions (768 with "
        "ViT-L/14); 0 = off.",
    )
    # RoboVLMs' default of clip_norm_ratio.
    weight: float = option(0.05, "Weight of this part in the loss.")


@dataclass(frozen=True)
class ModelConfig(Options):
    """Backbone x structure x head, and how they are computed."""

    backbone: BackboneConfig = group(BackboneConfig)
    structure: StructureConfig = group(StructureConfig)
    head: HeadConfig = group(HeadConfig, "vla_jax.models.heads:HEADS")
    sentence: SentenceConfig = group(SentenceConfig)
    action_dim: int = option(
        0,
        "Numbers of an action, a gripper's included; 0 = as many as the data's have (7 where no "
        "data are read).",
    )
    gripper: str = option(
        "",
        "last: the last number of an action commands a gripper, open or closed. none: all numbers "
        "are joints or motions alike. '' = as the datasets' specs say (last where no data are "
        "read).",
        "",
        "last",
        "none",
        older="last",
    )
    dropout: bool = option(True, "Whether the backbone's own dropout rates apply in training.")
    dtype: str = option(
        "bfloat16",
        "Type of the activations; parameters and the loss stay float32.",
        "float32",
        "bfloat16",
    )
    remat: str = option(
        "full", "What the backward pass computes again instead of keeping.", "full", "dots", "none"
    )
    expert: ExpertConfig = group(ExpertConfig)
    fast: FastConfig = group(FastConfig)

    @property
    def gripper_is_number(self) -> bool:
        """Whether the predicted gripper is a number like the others, in the data's units."""
        return self.head.gripper == "number"

    @property
    def has_gripper(self) -> bool:
        """Whether the last number of an action is a gripper."""
        return self.gripper != "none"
