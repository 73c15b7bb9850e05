"""Settings that no structure can work with, whatever its input, aim and memory."""

from vla_jax.config import ModelConfig
from vla_jax.models.backbones.base import Backbone

# What can be read of a step where its images are no part of the sequence.
_READABLE = {"crossed": ("action", "text"), "encoded": ("action",)}


def problems(config: ModelConfig, backbone: Backbone) -> list[str]:
    """Problems of a config, one line each.

    Args:
        config: the model part.
        backbone: the config's, with its complete architecture.
    """
    s, issues = config.structure, []
    if not 1 <= s.slide <= s.window:
        issues.append(f"structure.slide: {s.slide} is not within 1..window, 1..{s.window}")
    legal = _READABLE.get(backbone.LAYOUT.images)
    if legal and s.readout not in legal:
        issues.append(
            f"{config.backbone.name} + structure.readout {s.readout!r}: only what its sequence "
            f"holds can be read: {', '.join(legal)}"
        )
    if s.readout != "action" and config.head.down_sample == "none":
        issues.append(
            f"structure.readout {s.readout!r} gives a step many tokens: head.down_sample must "
            "be 'pooling' or 'resampler'"
        )
    return issues
