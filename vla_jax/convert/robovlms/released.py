"""Action units of the datasets RoboVLMs' released checkpoints were trained on.

A released .pt file has no statistics; these are the numbers of RoboVLMs' own
configs/data/oxe_dataset_stats (1 % and 99 % quantiles of the arm dimensions).
"""

from collections.abc import Mapping
from typing import Any

from vla_jax.config import ConfigError
from vla_jax.data.oxe import SPECS
from vla_jax.data.units.normalize import ActionSpec

_QUANTILES = {
    "bridge_orig": (
        (-0.02872725307941437, -0.04170349963009357, -0.026093858778476715,
         -0.08092105075716972, -0.09288699507713317, -0.20718276381492615),
        (0.028309678435325586, 0.040855254605412394, 0.040161586627364146,
         0.08192047759890528, 0.07792850524187081, 0.20382574498653397),
    ),
    "fractal20220817_data": (
        (-0.22453527510166169, -0.14820013284683228, -0.231589707583189,
         -0.3517994859844644, -0.4193011274933815, -0.43643461108207704),
        (0.17824687153100965, 0.14938379630446405, 0.21842354818179575,
         0.5892666035890578, 0.35272657424211445, 0.44796681255102094),
    ),
}  # fmt: skip


def action_specs(
    names: tuple[str, ...],
    normalization: str,
    clip: float,
    dim: int,
    statistics: Mapping[str, Any],
) -> dict[str, ActionSpec]:
    """Units of each dataset's actions.

    Args:
        names: of the datasets.
        normalization: see `ActionSpec`; "none" needs no numbers.
        clip: see `ActionSpec`.
        dim: action dimensions, gripper included.
        statistics: dataset -> entry of a dataset_statistics.json; comes before the numbers here.

    Raises:
        ConfigError: naming the datasets whose statistics are not known.
    """
    specs, unknown = {}, []
    for name in names:
        spec = SPECS.get(name)
        # Of a dataset that is not known here, 0 is closed and 1 open, as everywhere after
        # standardizing.
        env, hz = (spec.gripper_env, spec.hz) if spec else ((0.0, 1.0), None)
        if name in statistics:
            specs[name] = ActionSpec.from_statistics(statistics[name], normalization, clip, env, hz)
        elif normalization == "none":
            # With "none" actions stay as they are: the range only fills the fields.
            low, high = (-1.0,) * (dim - 1), (1.0,) * (dim - 1)
            specs[name] = ActionSpec(dim, normalization, clip, low, high, env, hz)
        # The numbers are of six arm dimensions and a gripper, so of no other kind of action.
        elif normalization == "q99" and name in _QUANTILES and dim == 7:
            low, high = _QUANTILES[name]
            specs[name] = ActionSpec(dim, normalization, clip, low, high, env, hz)
        else:
            unknown.append(name)
    if unknown:
        raise ConfigError(
            f"statistics of {unknown} are not known (known: {sorted(_QUANTILES)}); give the "
            "dataset_statistics.json the model was trained with, --statistics=FILE"
        )
    return specs
