"""Confidence intervals of success rates and of their differences; 95 % by default."""

from __future__ import annotations

import math
from typing import Tuple

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


def wilson(successes: int, episodes: int, z: float = Z95) -> Tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927, JASA 22:209).

    Returns:
        (low, high) in [0, 1]; (0, 1) for no episodes.
    """
    if not 0 <= successes <= episodes:
        raise ValueError("{} successes of {} episodes".format(successes, episodes))
    if episodes == 0:
        return 0.0, 1.0
    rate, z2 = successes / episodes, z * z
    # The center is drawn toward 1/2, most of all for few episodes.
    centre = rate + z2 / (2 * episodes)
    spread = z * math.sqrt(rate * (1 - rate) / episodes + z2 / (4 * episodes * episodes))
    scale = 1 + z2 / episodes
    # The bounds touch 0 and 1 exactly there; rounding must not push them past.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == episodes else (centre + spread) / scale
    return low, high


def difference(
    successes: int, episodes: int, base_successes: int, base_episodes: int, z: float = Z95
) -> Tuple[float, float]:
    """Interval of rate - base rate, independent episodes (Newcombe 1998, Stat Med 17:873, no 10).

    Returns:
        (low, high) in [-1, 1].
    """
    return _hybrid((successes, episodes), (base_successes, base_episodes), 0.0, z)


def paired_difference(
    both: int, only: int, base_only: int, neither: int, z: float = Z95
) -> Tuple[float, float]:
    """The same for episodes that both runs made (Newcombe 1998, Stat Med 17:2635, no 10).

    Episodes from the same initial state succeed or fail together, which narrows the interval.

    Args:
        both: episodes solved in both runs.
        only: solved in this run alone.
        base_only: solved in the base run alone.
        neither: solved in neither.
        z: normal quantile.
    """
    count = both + only + base_only + neither
    solved, base = both + only, both + base_only
    # Zero where one run solved all or nothing: then no correlation is defined.
    margins = solved * (count - solved) * base * (count - base)
    cross = both * neither - only * base_only
    if cross > 0:
        cross = max(cross - count / 2, 0)  # continuity correction
    correlation = cross / math.sqrt(margins) if margins else 0.0
    return _hybrid((solved, count), (base, count), correlation, z)


def _hybrid(
    run: Tuple[int, int], base: Tuple[int, int], correlation: float, z: float
) -> Tuple[float, float]:
    # Without episodes of one side every difference is possible.
    if not run[1] or not base[1]:
        return -1.0, 1.0
    low, high = wilson(*run, z=z)
    base_low, base_high = wilson(*base, z=z)
    rate, base_rate = run[0] / run[1], base[0] / base[1]

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    change = rate - base_rate
    down = reach(rate - low, base_high - base_rate)
    up = reach(high - rate, base_rate - base_low)
    return max(change - down, -1.0), min(change + up, 1.0)
