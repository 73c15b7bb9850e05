"""From a dataset as it was recorded to the numbers a model trains on, once.

Axis letters: n frames, a action dimension.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from vla_jax.config import ConfigError, DataConfig, StructureConfig
from vla_jax.data.dataset import Dataset, Prepared, Trajectories
from vla_jax.data.spec import DatasetSpec
from vla_jax.data.units.gripper import targets
from vla_jax.data.units.normalize import ActionSpec, StateSpec
from vla_jax.data.units.policy_units import PolicyUnits

_ROWS = 1 << 16  # scaled at a time, so that the float64 intermediates stay small


@dataclass(frozen=True)
class Units:
    """How the recorded numbers of one dataset become the model's.

    Attributes:
        action: scale of the arm, and the gripper's commands.
        state: scale of the states; None where the model takes none, or `chunks` scale them.
        gripper: rule by which a recorded gripper becomes a target, see `gripper.targets`.
        resting: whether the gripper's target is 0 at all times.
        chunks: scales chunks with the state they start from, in place of `action`; None = no.
    """

    action: ActionSpec
    state: StateSpec | None
    gripper: str = "declared"
    resting: bool = False
    chunks: PolicyUnits | None = None


def choose_units(
    name: str,
    statistics: Mapping[str, Any],
    spec: DatasetSpec,
    structure: StructureConfig,
    config: DataConfig,
) -> Units:
    """The units that the config asks for, from the statistics of one dataset.

    Args:
        name: the dataset's.
        statistics: its statistics; with those of its chunks where `data.units` names a rule.
        spec: says how its gripper is commanded, and how often.
        structure: says how many numbers of the state the model takes.
        config: the data section.

    Raises:
        ConfigError: the units cannot be made of these statistics, or do not fit the model.
    """
    try:
        action = ActionSpec.from_statistics(
            statistics, config.normalization, config.clip, spec.gripper_env, spec.hz
        )
    except ValueError as error:
        raise ConfigError(
            f"data.statistics: {name!r}: data.normalization = {config.normalization} cannot be "
            f"made of them: {error}; choose another one, or let the data be measured"
        ) from error
    if config.units:
        return Units(action, None, chunks=_chunk_units(name, statistics, spec, structure, config))
    state = None
    if structure.proprio:
        try:
            state = StateSpec.from_statistics(statistics, structure.proprio)
        except ValueError as error:
            raise ConfigError(f"model.structure.proprio: dataset {name!r}: {error}") from error
    resting = config.parity.constant_to_zero and _is_constant(statistics["action"])
    return Units(action, state, config.parity.gripper, resting)


def prepare(recorded: Dataset, units: Units) -> Prepared:
    """The same trajectories in model units; what was recorded stays as it is.

    Args:
        recorded: a dataset in robot units.
        units: of that dataset, see `choose_units`.
    """
    # The two kinds of dataset differ in their numbers alone.
    common = {f.name: getattr(recorded, f.name) for f in dataclasses.fields(Trajectories)}
    if units.chunks is not None:
        # The scale depends on the state a chunk starts from, so it waits for the windows.
        rows, states = recorded.actions, recorded.proprio
        return Prepared(**common, actions=rows, proprio=states, chunk_units=units.chunks)
    states = None
    if units.state is not None:
        states = units.state.normalize(np.asarray(recorded.proprio))
    return Prepared(**common, actions=_actions(recorded, units), proprio=states)


def _actions(recorded: Dataset, units: Units) -> Float32[np.ndarray, "n a"]:
    actions = np.empty_like(recorded.actions)
    for row in range(0, len(actions), _ROWS):
        part = slice(row, row + _ROWS)
        actions[part] = units.action.normalize(recorded.actions[part])
    if recorded.spec.has_gripper:
        binary = recorded.spec.gripper_binary
        actions[:, -1] = targets(actions[:, -1], binary, units.gripper)
        # A mistake of openvla's, here for parity alone: a gripper that is always open becomes
        # closed.
        if units.resting:
            actions[:, -1] = 0
    return actions


def _chunk_units(
    name: str,
    statistics: Mapping[str, Any],
    spec: DatasetSpec,
    structure: StructureConfig,
    config: DataConfig,
) -> PolicyUnits:
    """The units that `data.units` names."""
    try:
        units = PolicyUnits.from_statistics(
            statistics["chunks"], config.units, config.relative, config.robot, spec.gripper_env
        )
    except ValueError as error:
        raise ConfigError(f"data.units: dataset {name!r}: {error}") from error
    # A `proprio` of 0 means that the model takes no state.
    size = len(units.state.first)
    if structure.proprio not in (0, size):
        raise ConfigError(
            f"model.structure.proprio: {structure.proprio}, but dataset {name!r} records {size} "
            "numbers of the state"
        )
    return units


def _is_constant(action: Mapping[str, Any]) -> bool:
    """Whether the gripper never moves; unknown counts as no."""
    ends = [action[key][-1] for key in ("min", "max") if key in action]
    return len(ends) == 2 and ends[0] == ends[1]
