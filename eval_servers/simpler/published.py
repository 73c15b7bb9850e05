"""The published real-robot results, and how well a ranking in simulation agrees with them.

Source of the numbers: the tables of Li et al., "Evaluating Real-World Robot Manipulation Policies
in Simulation", CoRL 2024, as SimplerEnv's simpler_env/utils/metrics.py states them.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Sequence

import numpy as np

LEAST = 4  # policies below which a ranking says nothing

_RANKED = ("rt-2-x", "rt-1-converged", "rt-1-15pct", "rt-1-x", "rt-1-begin", "octo-base")
_BRIDGED = ("rt-1-x", "octo-base", "octo-small")


def _row(policies: Sequence[str], *rates: float) -> Dict[str, float]:
    return {policy: rates[i] for i, policy in enumerate(policies)}


# Task -> policy -> success rate on the real robot.
REAL: Dict[str, Dict[str, float]] = {
    "google_robot_pick_coke_can": _row(_RANKED, 0.907, 0.853, 0.920, 0.760, 0.133, 0.293),
    "google_robot_move_near": _row(_RANKED, 0.733, 0.633, 0.583, 0.450, 0.017, 0.350),
    "google_robot_open_drawer": _row(_RANKED, 0.333, 0.815, 0.704, 0.519, 0.000, 0.148),
    "google_robot_close_drawer": _row(_RANKED, 0.630, 0.926, 0.889, 0.741, 0.000, 0.519),
    "google_robot_place_apple_in_closed_top_drawer": _row(
        _RANKED, 0.074, 0.185, 0.185, 0.407, 0.000, 0.000
    ),
    "widowx_spoon_on_towel": _row(_BRIDGED, 0.000, 0.333, 0.417),
    "widowx_carrot_on_plate": _row(_BRIDGED, 0.000, 0.250, 0.083),
    "widowx_stack_cube": _row(_BRIDGED, 0.000, 0.000, 0.125),
    "widowx_put_eggplant_in_basket": _row(_BRIDGED, 0.000, 0.250, 0.400),
}


class Agreement(NamedTuple):
    """How a simulated ranking agrees with the real one.

    Attributes:
        policies: that both have, in the table's order.
        mmrv: mean maximum rank violation: 0 is best.
        pearson: correlation of the rates.
    """

    policies: List[str]
    mmrv: float
    pearson: float


def agreement(simulated: Mapping[str, float], real: Mapping[str, float]) -> Agreement:
    """Compare rates of the same policies on one task, in one setting.

    Raises:
        ValueError: fewer than `LEAST` policies are in both.
    """
    shared = [policy for policy in real if policy in simulated]
    # With fewer policies two rankings agree too easily by chance.
    if len(shared) < LEAST:
        raise ValueError(
            "a ranking needs at least {} policies with a real-robot result, here {}: {}".format(
                LEAST,
                "is one" if len(shared) == 1 else "are {}".format(len(shared) or "none"),
                ", ".join(shared) or "the table has " + ", ".join(real),
            )
        )
    a, b = [simulated[name] for name in shared], [real[name] for name in shared]
    return Agreement(shared, mmrv(a, b), pearson(a, b))


def mmrv(simulated: Sequence[float], real: Sequence[float]) -> float:
    """Mean maximum rank violation: how large a real difference the simulation gets wrong.

    For every policy, the largest difference of real rates to one that the simulation ranks the
    other way; then the mean. The paper's equation 1.
    """
    s, r = np.asarray(simulated, np.float64), np.asarray(real, np.float64)
    # Pairs that both sides order the same way are no violation, however far apart the rates are.
    wrong = (s[:, None] > s[None]) != (r[:, None] > r[None])
    return float(np.mean(np.max(np.abs(r[:, None] - r[None]) * wrong, axis=1)))


def pearson(simulated: Sequence[float], real: Sequence[float]) -> float:
    """Correlation coefficient; 0 where one side is constant, 1 where both sides are the same."""
    s, r = (np.asarray(rates, np.float64) - np.mean(rates) for rates in (simulated, real))
    if np.array_equal(s, r):
        return 1.0
    # SimplerEnv's floor, which keeps constant rates from dividing by zero.
    return float(np.sum(s * r) / (np.sqrt(np.sum(s**2) * np.sum(r**2)) + 1e-8))
