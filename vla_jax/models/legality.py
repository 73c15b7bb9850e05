"""What goes with what: the one place that judges backbone x structure x head.

The reasons stand with the things themselves: a structure says which heads and backbones it does
not take and which settings it cannot work with (`Structure.refuse_head`, `refuse_backbone`,
`refusals`), a head which of its own settings make no sense (`Head.refusals`).
"""

from collections.abc import Mapping
from typing import Any

from vla_jax.config import ConfigError, ModelConfig
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.heads import HEADS
from vla_jax.models.structures import STRUCTURES, find


def refusal(backbone: str, structure: str, head: str) -> str | None:
    """Why three choices do not combine, whatever their settings; None when they do."""
    # The head has a say in what a structure's name means: `discrete` is another module where the
    # tokens of a chunk vary in number.
    kind = find(structure, head)
    return kind.refuse_backbone(BACKBONES[backbone]) or kind.refuse_head(HEADS[head])


def problems(config: ModelConfig, arch: Mapping[str, Any] | None = None) -> list[str]:
    """All that keeps a model from being built, one line each, with what would be legal.

    Args:
        config: the model part of a resolved config.
        arch: the backbone's complete architecture; by default the released one with
            `config.backbone.arch` applied.
    """
    return _judge(config, arch)[0]


def warnings(config: ModelConfig) -> list[str]:
    """Choices of a legal config that are seldom meant, one sentence each."""
    return find(config.structure.kind, config.head.kind).warnings(config)


def completed(
    config: ModelConfig, arch: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """A legal config with all that it leaves open filled in, and the complete architecture.

    Raises:
        ConfigError: with all `problems`.
    """
    issues, complete = _judge(config, arch)
    if issues:
        raise ConfigError("model:\n  " + "\n  ".join(issues))
    backbone = BACKBONES[config.backbone.name](complete)
    return find(config.structure.kind, config.head.kind).complete(config, backbone), complete


def _judge(config: ModelConfig, arch: Mapping[str, Any] | None) -> tuple[list[str], dict[str, Any]]:
    """The problems, and the architecture where that is none of them."""
    # Unknown names come first: every later check looks them up in the tables.
    issues = _unknown(config)
    if issues:
        return issues, {}
    name, s, head = config.backbone.name, config.structure, config.head
    backbone, structure = BACKBONES[name], find(s.kind, head.kind)
    if reason := structure.refuse_head(HEADS[head.kind]):
        # The message says what would work, so nobody has to try the table out.
        legal = ", ".join(h for h in HEADS if not structure.refuse_head(HEADS[h]))
        issues.append(f"{s.kind} + {head.kind}: {reason}; {s.kind} takes {legal}")
    if reason := structure.refuse_backbone(backbone):
        kinds = {k: find(k, head.kind) for k in STRUCTURES}
        legal = ", ".join(k for k in kinds if not kinds[k].refuse_backbone(backbone))
        issues.append(f"{name} + {s.kind}: {reason}; {name} takes {legal}")
    # The head's own settings are judged even where it does not fit, so that one round of changes is
    # enough.
    issues += HEADS[head.kind].refusals(head, s)
    try:
        # A checkpoint brings its own architecture, which the config's changes are part of already.
        complete = backbone.arch(config.backbone.arch) if arch is None else dict(arch)
    except ValueError as error:
        # Without an architecture no backbone can be built that the structure could judge.
        return [*issues, str(error)], {}
    # Nothing is allocated here: what is asked of the module follows from its architecture alone.
    built = backbone(complete)
    if built.follows_language and not structure.tells_language:
        legal = ", ".join(k for k in STRUCTURES if STRUCTURES[k].tells_language)
        issues.append(
            f"{name} + {s.kind}: its image towers follow the instruction, of which {s.kind} tells "
            f"them nothing; {legal} does"
        )
    return [*issues, *structure.refusals(config, built)], complete


def _unknown(config: ModelConfig) -> list[str]:
    """Names that none of the tables has."""
    choices = (
        ("model.backbone.name:", config.backbone.name, sorted(BACKBONES)),
        ("model.structure.kind:", config.structure.kind, list(STRUCTURES)),
        ("model.head.kind:", config.head.kind, sorted(HEADS)),
    )
    return [f"{field} {n!r} is none of {legal}" for field, n, legal in choices if n not in legal]
