"""The structures: how history and action meet the VLM, and with what they combine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vla_jax.config import ModelConfig
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Layout

_STEPWISE = ("mlp", "diffusion", "flow")
_ALL = ("mlp", "lstm", "gpt2", "diffusion", "flow")


@dataclass(frozen=True)
class Structure:
    """One way to build a VLA on a VLM.

    Attributes:
        what: it does.
        heads: those it combines with.
        joint: one VLM sequence holds the window, so past images are kept and read again at every
            step; else it holds one step, and what is kept is the features.
        why: a head with a memory makes no sense there, if so.
    """

    what: str
    heads: tuple[str, ...]
    joint: bool
    why: str = ""


STRUCTURES: dict[str, Structure] = {
    "one_step": Structure(
        what="the VLM sees one step; there is no history",
        heads=_STEPWISE,
        joint=False,
        why="with one step there is nothing to remember "
        "(policy_head with window 1 computes the same)",
    ),
    "discrete": Structure(
        what="the VLM writes the actions of each step of the window as tokens",
        heads=("detokenizer",),
        joint=True,
    ),
    "interleaved": Structure(
        what="the VLM sees the window, step after step, and is read at each",
        heads=_ALL,
        joint=True,
    ),
    "policy_head": Structure(
        what="the VLM sees one step, the head the features of the window",
        heads=_ALL,
        joint=False,
    ),
    "video": Structure(
        what="the VLM sees the images of the whole window at once and acts at its last step",
        heads=_STEPWISE,
        joint=True,
        why="the window becomes a single feature, so there are no steps to remember",
    ),
}


def refusal(structure: str, head: str) -> str:
    """Why a structure does not take a head; "" when it does."""
    kind = STRUCTURES[structure]
    if head in kind.heads:
        return ""
    if head == "detokenizer":
        return "it reads tokens that the VLM writes, which only the discrete structure has"
    if structure == "discrete":
        return "the VLM itself writes the actions, so no other head is needed"
    return kind.why


def refusals(config: ModelConfig) -> list[str]:
    """Why backbone, structure and head of a config do not combine, with what would."""
    s, head = config.structure, config.head
    kind, problems = STRUCTURES[s.kind], []
    if reason := refusal(s.kind, head.kind):
        legal = ", ".join(kind.heads)
        problems.append(f"{s.kind} + {head.kind}: {reason}; {s.kind} takes {legal}")
    name = config.backbone.name
    refused = refused_by(name)
    if s.kind in refused:
        legal = ", ".join(kind for kind in STRUCTURES if kind not in refused)
        problems.append(f"{name} + {s.kind}: {refused[s.kind]}; {name} takes {legal}")
    problems += _layout_refusals(config)
    if s.kind == "one_step" and s.window != 1:
        problems.append(f"structure.window: one_step has no history: 1, not {s.window}")
    if s.kind == "discrete":
        if s.latent != 1 or s.readout != "action" or head.down_sample != "none":
            problems.append(
                "discrete reads the VLM's own tokens: structure.latent 1, structure.readout "
                "'action' and head.down_sample 'none', nothing else"
            )
        if s.parity.act_insert != "per_row":
            problems.append(
                "discrete writes behind the prompt, padding or not: "
                "structure.parity.act_insert 'per_row'"
            )
        if config.sentence.dim:
            problems.append("discrete has no features to predict a sentence from: sentence.dim 0")
        if head.bins < 2 or head.low >= head.high:
            problems.append("head: bins must be at least 2 and low below high")
    elif s.readout != "action" and head.down_sample == "none":
        problems.append(
            f"structure.readout {s.readout!r} gives a step many tokens: head.down_sample must be "
            "'pooling' or 'resampler'"
        )
    if not 1 <= s.slide <= s.window:
        problems.append(f"structure.slide: {s.slide} is not within 1..window, 1..{s.window}")
    if head.kind in ("gpt2", "diffusion", "flow") and head.hidden * s.latent % head.heads:
        problems.append(
            f"head.heads: {head.heads} does not divide the width, hidden {head.hidden} x latent "
            f"{s.latent}"
        )
    return problems


def refused_by(backbone: str) -> dict[str, str]:
    """Structures that a backbone cannot take -> why."""
    file, _ = BACKBONES[backbone]
    reasons: dict[str, str] = dict(getattr(file, "REFUSED", {}))
    if file.LAYOUT.images != "spliced":
        reason = "its images are not part of the sequence, so one sequence holds one step"
        reasons = {"interleaved": reason, "video": reason, **reasons}
    return reasons


def _layout_refusals(config: ModelConfig) -> list[str]:
    s, name = config.structure, config.backbone.name
    images, problems = BACKBONES[name][0].LAYOUT.images, []
    if images != "spliced" and s.kind == "discrete" and s.window != 1:
        problems.append(
            f"{name} + discrete: its images are not part of the sequence, so structure.window "
            f"must be 1, not {s.window}"
        )
    legal = {"crossed": ("action", "text"), "encoded": ("action",)}.get(images)
    if legal and s.readout not in legal:
        problems.append(
            f"{name} + structure.readout {s.readout!r}: only what its sequence holds can be read: "
            + ", ".join(legal)
        )
    return problems


def layout_of(config: ModelConfig) -> Layout:
    """Where images and actions enter: the backbone's, or RoboVLMs' for its checkpoints."""
    file, _ = BACKBONES[config.backbone.name]
    padded = config.structure.parity.act_insert == "padded_column"
    return getattr(file, "ORIGINAL_LAYOUT", file.LAYOUT) if padded else file.LAYOUT


def marks(config: ModelConfig) -> int:
    """Tokens of the backbone's own before, and as many behind, those of an image."""
    return getattr(BACKBONES[config.backbone.name][0], "MARKS", 0)


def image_count(config: ModelConfig, arch: Mapping[str, Any]) -> int:
    """Tokens of an image in the sequence, its marks included."""
    resampled = config.structure.resampler
    if resampled:
        return resampled + 2 * marks(config)
    return BACKBONES[config.backbone.name][0].image_tokens(arch)
