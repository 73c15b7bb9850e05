"""What both kinds of towers are held to, against float64."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.parity.table import Row, compare

# In units of the largest value of a layer. SmolLM2's 11th is off by 6e-6 to 1.0e-5, as its largest
# value falls from 850 to 105 there while the rounding of the large ones stays; most by 1e-6.
TOLERANCE = 2e-5


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one file."""
    with np.load(path) as stored:
        return {key: stored[key] for key in stored.files}


def judge(
    folder: Path,
    kept: Row,
    found: Mapping[str, np.ndarray],
    narrow: Mapping[str, np.ndarray],
) -> list[str]:
    """Compares with reference.py's float64, and with torch's own distance from it.

    Args:
        folder: what reference.py filled.
        kept: how many tensors did not come back to the bit.
        found: our `hidden_0` ..., `last` and, of language models, `logits`, in float32.
        narrow: the same in bfloat16.

    Returns:
        Lines to print.

    Raises:
        AssertionError: something is further off than it may be.
    """
    exact = load(folder / "float64.npz")
    rows = {
        key: compare(key, found[key], expected, TOLERANCE * np.abs(expected).max())
        for key, expected in exact.items()
    }
    hidden = [row for key, row in rows.items() if key.startswith("hidden_")]
    worst = max(hidden, key=lambda row: row.relative)
    # The last quantity of all: the one of which torch's other precisions are kept.
    end = list(exact)[-1]
    scale, lines = np.abs(exact[end]).max(), [f"{folder.name}: {len(hidden)} hidden states"]
    ends = [row for key, row in rows.items() if not key.startswith("hidden_")]
    for row in (kept, worst, *ends):
        lines.append(f"{row.quantity:26} {row.error:.2e}, relative {row.relative:.2e}")
    reference = {p: load(folder / f"{p}.npz")["end"] for p in ("float32", "bfloat16")}
    distance = np.abs(reference["float32"] - exact[end]).max()
    lines.append(f"torch float32, {end:11} {distance:.2e}, relative {distance / scale:.2e}")
    means = {}
    for who, values in (("ours", narrow[end]), ("torch", reference["bfloat16"])):
        means[who] = float(np.abs(values - exact[end]).mean())
        same = (values.argmax(-1) == exact[end].argmax(-1)).mean()
        best = f", same best token {same:.1%}" if end == "logits" else ""
        lines.append(f"bfloat16, mean, {who:10} {means[who]:.2e}, relative "
                     f"{means[who] / scale:.2e}{best}")  # fmt: skip
    failed = [row for row in (kept, *rows.values()) if not row.passed]
    assert not failed, (failed, lines)
    # Rounding is luck to a degree; a wrong precision somewhere costs far more than this.
    assert means["ours"] < 1.5 * means["torch"], lines
    return lines
