"""The printed table of parity figures."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    quantity: str
    error: float
    tolerance: float
    scale: float

    @property
    def relative(self) -> float:
        """Error in units of the largest expected value."""
        return self.error / self.scale if self.scale else self.error

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)


def compare(quantity: str, got: Any, expected: Any, tolerance: float) -> Row:
    """Max abs error in float64; a shape mismatch is an infinite error."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        return Row(f"{quantity} {got.shape} != {expected.shape}", np.inf, tolerance, 0.0)
    error = float(np.abs(got - expected).max()) if got.size else 0.0
    return Row(quantity, error, tolerance, float(np.abs(expected).max()))


def render(rows: list[tuple[str, Row]], waiting: dict[str, str]) -> str:
    """One line a quantity, then the folders that cannot be run yet."""
    width = max([len(case) for case, _ in rows], default=10)
    lines = [
        f"{'case':<{width}}  {'quantity':<72} {'max abs error':>13} {'tolerance':>10}"
        f" {'relative':>9}"
    ]
    for case, row in rows:
        mark = "" if row.passed else "  FAILED"
        lines.append(
            f"{case:<{width}}  {row.quantity:<72} {row.error:>13.2e} {row.tolerance:>10.0e}"
            f" {row.relative:>9.1e}{mark}"
        )
    cases = len({case for case, _ in rows})
    lines.append(f"{cases} cases, {len(rows)} quantities, {len(waiting)} folders not runnable yet")
    for reason in sorted(set(waiting.values())):
        names = sorted(k for k, v in waiting.items() if v == reason)
        lines.append(f"  {len(names):>3} {reason}: {' '.join(names)}")
    return "\n".join(lines)


def relative(found: Any, expected: Any) -> float:
    """Largest difference over the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-9))
