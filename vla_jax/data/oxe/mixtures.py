"""Named mixtures of datasets: the weight of one window of each.

A window's chance is its dataset's weight over the sum over all windows; octo and openvla call that
balanced weights. Source: octo `oxe_dataset_mixes.py`, openvla `mixtures.py`; where those name a
dataset twice, the first weight counts, there as here.
"""

import difflib
import logging
from collections.abc import Mapping
from typing import Literal

from vla_jax.data.oxe.franka import EXTERNAL
from vla_jax.data.oxe.registry import SPECS, get_spec

log = logging.getLogger(__name__)
Variant = Literal["openvla", "octo"]

# The published weights to the last digit; each is multiplied by its dataset's windows.
_RT_X = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "taco_play": 2.0,
    "jaco_play": 2.0,
    "berkeley_cable_routing": 3.0,
    "roboturk": 1.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 1.0,
    "toto": 1.0,
}
_FRANKA = {
    f"stanford_hydra_dataset{EXTERNAL}": 1.0,
    f"austin_buds_dataset{EXTERNAL}": 3.0,
    f"nyu_franka_play_dataset{EXTERNAL}": 3.0,
    f"maniskill_dataset{EXTERNAL}": 0.1,
    f"furniture_bench_dataset{EXTERNAL}": 0.1,
    f"cmu_franka_exploration_dataset{EXTERNAL}": 5.0,
    f"austin_sailor_dataset{EXTERNAL}": 1.0,
    f"austin_sirius_dataset{EXTERNAL}": 1.0,
    f"berkeley_rpt{EXTERNAL}": 1.0,
    f"kaist_nonprehensile{EXTERNAL}": 3.0,
    f"stanford_robocook{EXTERNAL}": 1.0,
    f"iamlab_cmu_pickup_insert{EXTERNAL}": 1.0,
    "utaustin_mutex": 1.0,
    "cmu_play_fusion": 1.0,
}
_SOUP = {
    **_RT_X,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "language_table": 0.1,
    f"stanford_hydra_dataset{EXTERNAL}": 2.0,
    f"austin_buds_dataset{EXTERNAL}": 1.0,
    f"nyu_franka_play_dataset{EXTERNAL}": 3.0,
    f"furniture_bench_dataset{EXTERNAL}": 0.1,
    f"ucsd_kitchen_dataset{EXTERNAL}": 2.0,
    f"austin_sailor_dataset{EXTERNAL}": 1.0,
    f"austin_sirius_dataset{EXTERNAL}": 1.0,
    f"dlr_edan_shared_control{EXTERNAL}": 1.0,
    f"iamlab_cmu_pickup_insert{EXTERNAL}": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}
_ORIG, _DATASET = {"bridge_orig": 1.0}, {"bridge_dataset": 1.0}
_RT_1 = {"fractal20220817_data": 1.0}
_DOOR = "nyu_door_opening_surprising_effectiveness"  # octo has it, its only camera is the wrist's
# Their order is kept: fractal, kuka, Bridge, the others.
_FIRST = {name: _RT_X[name] for name in ("fractal20220817_data", "kuka")}
_PLUS = {**_FIRST, **_ORIG, **_SOUP, "bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}
_OCTO_SOUP = {**_FIRST, **_DATASET, **_SOUP, _DOOR: 1.0, "bc_z": 0.2}
_OCTO_RT_X = {**_FIRST, **_DATASET, **_RT_X, _DOOR: 5.0}

MIXTURES: dict[str, dict[str, dict[str, float]]] = {
    "openvla": {
        "bridge": _ORIG,
        "rt_1": _RT_1,
        "bridge_rt_1": {**_ORIG, **_RT_1},
        "rtx": {**_FIRST, **_ORIG, **_RT_X},
        "rtx_franka": {**_FIRST, **_ORIG, **_RT_X, **_FRANKA},
        "oxe_magic_soup": {**_FIRST, **_ORIG, **_SOUP},
        "oxe_magic_soup_plus": _PLUS,
        "oxe_magic_soup_plus_minus": {
            **{name: _PLUS[name] for name in _PLUS if name not in ("language_table", "droid")},
            # Of the soups this one alone gives RT-1's data their full weight.
            **_RT_1,
        },
    },
    "octo": {
        "bridge": _DATASET,
        "rt_1": _RT_1,
        "rtx": _OCTO_RT_X,
        "rtx_franka": {**_OCTO_RT_X, **_FRANKA},
        "oxe_magic_soup": _OCTO_SOUP,
        "oxe_flex_act_soup": {
            **_OCTO_SOUP,
            f"berkeley_mvp{EXTERNAL}": 1.0,
            "gnm_dataset": 1.0,
            "aloha_static_dataset": 3.0,
            "aloha_mobile_dataset": 2.0,
            "dobbe": 1.0,
            "roboset": 0.5,
            "rh20t": 0.5,
        },
    },
}


def get_mixture(
    name: str, variant: Variant = "openvla", action: str | None = None
) -> dict[str, float]:
    """The datasets of a mixture and their weights.

    Args:
        name: of a mixture, or of a single dataset.
        variant: whose mixture; a name that only the other has is found there.
        action: keep only datasets of this action encoding; what is left out is logged, as a model
            has one kind of action.

    Raises:
        KeyError: naming the nearest and all legal names, or that nothing is left.
    """
    other = "octo" if variant == "openvla" else "openvla"
    # The right operand wins, so a name that both have is the variant's own.
    mixtures = MIXTURES[other] | MIXTURES[variant]
    if name in mixtures:
        weights = mixtures[name]
    elif name in SPECS:
        weights = {name: 1.0}
    else:
        raise KeyError(unknown_mixture(name, mixtures))
    if action is None:
        # A copy, as the tables are shared by all callers.
        return dict(weights)
    # Two encodings in one mixture would train one head on numbers of two meanings.
    selected = {n: w for n, w in weights.items() if get_spec(n, variant).action == action}
    if not selected:
        raise KeyError(f"no dataset of the mixture {name!r} has actions {action!r}")
    if len(selected) < len(weights):
        out = sorted(set(weights) - set(selected))
        log.warning("%s: left out, as their actions are not %s: %s", name, action, out)
    return selected


def unknown_mixture(name: str, mixtures: Mapping[str, object]) -> str:
    """The message about a name that is neither a mixture's nor a dataset's."""
    near = difflib.get_close_matches(name, [*mixtures, *SPECS], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"no mixture {name!r}; {hint}mixtures: {sorted(mixtures)}; or one dataset: {sorted(SPECS)}"
    )
