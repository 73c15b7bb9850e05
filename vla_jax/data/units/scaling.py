"""The rules by which today's policies scale states and actions, each with its project's epsilon.

Unlike `ActionSpec`, which clips, these leave what lies outside the range as it is, and treat the
gripper as any other number unless a mask says otherwise.

| rule | normalized | back |
|---|---|---|
| openpi_zscore | (x - mean) / (std + 1e-6) | the same, inverted |
| openpi_quantile | 2 (x - q01) / (q99 - q01 + 1e-6) - 1 | the same, inverted |
| lerobot_zscore | (x - mean) / (std + 1e-8) | x std + mean |
| lerobot_quantile | 2 (x - q01) / (q99 - q01) - 1, 1e-8 for a range of 0 | the same, inverted |
| openvla_quantile | 2 (x - q01) / (q99 - q01 + 1e-8) - 1, clipped | without the 1e-8 |
| oft_quantile | as openvla's | with the 1e-8 |
| oft_bounds | as oft_quantile, of min and max | with the 1e-8 |

Sources: openpi 15a9616 `transforms.py`, lerobot 7427f31 `normalize_processor.py`, openvla c8f03f4
and openvla-oft 213c5ff `modeling_prismatic.py`.

Legend: d numbers of a state or an action
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Rule(NamedTuple):
    """A way to make a scale of two statistics of a dimension.

    Attributes:
        names: of the statistics: of the middle and the half width, or of the two ends.
        epsilon: added to the width.
        back: added to it on the way back.
        only_zero: the epsilon takes the place of a width of 0 and is not added to another.
        clips: normalized values end at -1 and 1.
        masks: an action's last number, the gripper, stays as it is.
    """

    names: tuple[str, str]
    epsilon: float
    back: float
    only_zero: bool = False
    clips: bool = False
    masks: bool = False

    @property
    def centered(self) -> bool:
        """Whether the statistics are a middle and a width."""
        return self.names[0] == "mean"


_CENTER, _QUANTILES, _ENDS = ("mean", "std"), ("q01", "q99"), ("min", "max")
# The epsilons are the originals' own, because imported weights were trained with them.
RULES = {
    "openpi_zscore": Rule(_CENTER, 1e-6, 1e-6),
    "openpi_quantile": Rule(_QUANTILES, 1e-6, 1e-6),
    "lerobot_zscore": Rule(_CENTER, 1e-8, 0.0),
    "lerobot_quantile": Rule(_QUANTILES, 1e-8, 1e-8, only_zero=True),
    "openvla_quantile": Rule(_QUANTILES, 1e-8, 0.0, clips=True, masks=True),
    "oft_quantile": Rule(_QUANTILES, 1e-8, 1e-8, clips=True, masks=True),
    "oft_bounds": Rule(_ENDS, 1e-8, 1e-8, clips=True, masks=True),
}


@dataclass(frozen=True)
class Scaling:
    """Units of one vector; see the rules above.

    Attributes:
        rule: a key of `RULES`.
        first: d statistics: mean, or the lower end.
        second: d statistics: standard deviation, or the upper end.
        mask: d times, False where a number stays as it is; empty = all are scaled.
    """

    rule: str
    first: tuple[float, ...]
    second: tuple[float, ...]
    mask: tuple[bool, ...] = ()

    @classmethod
    def from_statistics(
        cls, statistics: Mapping[str, Any], rule: str, mask: Sequence[bool] = ()
    ) -> "Scaling":
        """Reads "state" or "actions" of a norm_stats.json, or "action" of dataset_statistics.json.

        Args:
            statistics: name -> d numbers.
            rule: a key of `RULES`.
            mask: see `Scaling`; by default the statistics' own, if they have one.

        Raises:
            ValueError: naming the legal rules, or the statistics that are missing.
        """
        if rule not in RULES:
            raise ValueError(f"scaling rule {rule!r} is none of {list(RULES)}")
        names = RULES[rule].names
        missing = [name for name in names if statistics.get(name) is None]
        if missing:
            raise ValueError(f"{rule} needs {missing}; the statistics have {sorted(statistics)}")
        first, second = (tuple(map(float, statistics[name])) for name in names)
        # Only openvla's files have a mask; of the others all numbers are scaled.
        chosen = mask or statistics.get("mask") or ()
        return cls(rule, first, second, tuple(map(bool, chosen)))

    def normalize(self, values: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
        """Robot units -> model units; statistics of further numbers are passed over.

        Raises:
            ValueError: there are more numbers than statistics.
        """
        rule, size = RULES[self.rule], values.shape[-1]
        if size > len(self.first):
            raise ValueError(f"{size} numbers, statistics of {len(self.first)}")
        # The statistics may be of more numbers than the robot has, as openpi pads them.
        first, width = self._first(size), self._width(size, rule.epsilon)
        scaled = (values - first) / width
        scaled = scaled if rule.centered else scaled * 2.0 - 1.0
        scaled = np.clip(scaled, -1, 1) if rule.clips else scaled
        return np.where(self._mask(size), scaled, values)

    def unnormalize(self, values: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
        """Inverse of `normalize`; behind the statistics (padding) those are 0 and 1, or none."""
        rule, size = RULES[self.rule], min(values.shape[-1], len(self.first))
        first, width, inner = self._first(size), self._width(size, rule.back), values[..., :size]
        scaled = inner * width + first if rule.centered else (inner + 1.0) / 2.0 * width + first
        scaled = np.where(self._mask(size), scaled, inner)
        # The originals pad with mean 0 and std 1, to which they add the epsilon as well.
        behind = values[..., size:] * (1.0 + rule.back if rule.centered else 1.0)
        return np.concatenate([scaled, behind], axis=-1)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Scaling":
        """Inverse of `to_json`."""
        return cls(raw["rule"], *(tuple(raw[name]) for name in ("first", "second", "mask")))

    def _first(self, size: int) -> Float[np.ndarray, "d"]:
        return np.asarray(self.first[:size], np.float64)

    def _width(self, size: int, epsilon: float) -> Float[np.ndarray, "d"]:
        rule, second = RULES[self.rule], np.asarray(self.second[:size], np.float64)
        width = second if rule.centered else second - self._first(size)
        # LeRobot replaces a width of 0; the others add the epsilon to every width.
        return np.where(width == 0, epsilon, width) if rule.only_zero else width + epsilon

    def _mask(self, size: int) -> Bool[np.ndarray, "d"]:
        return np.asarray(self.mask[:size], bool) if self.mask else np.ones(size, bool)


def pad(values: Float[np.ndarray, "*n d"], width: int) -> Float[np.ndarray, "*n w"]:
    """Zeros behind a state or an action, up to the model's width.

    Raises:
        ValueError: it is wider than the model.
    """
    size = values.shape[-1]
    if size > width:
        raise ValueError(f"{size} numbers do not fit the model's {width}")
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - size)])
