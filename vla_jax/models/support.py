"""Which structure takes which head, as a table: `python -m vla_jax.models.support`."""

from vla_jax.models.backbones import BACKBONES
from vla_jax.models.heads import HEADS
from vla_jax.models.structures import STRUCTURES, refusal, refused_by


def table() -> str:
    """Markdown: a row for each structure, a column for each head, then the reason of every gap."""
    heads = list(HEADS)
    lines = ["| structure | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    reasons: dict[str, list[str]] = {}
    for name, structure in STRUCTURES.items():
        cells = []
        for head in heads:
            reason = refusal(name, head)
            cells.append("–" if reason else "✓")
            if reason:
                reasons.setdefault(reason, []).append(f"{name} + {head}")
        lines.append(f"| {name}: {structure.what} | " + " | ".join(cells) + " |")
    for name in BACKBONES:
        for structure, reason in refused_by(name).items():
            reasons.setdefault(reason, []).append(f"{name} + {structure}")
    lines += ["", *(f"- {', '.join(cells)}: {reason}." for reason, cells in reasons.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
