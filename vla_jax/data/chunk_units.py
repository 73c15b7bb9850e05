"""Another project's units for the datasets of a run: their statistics, measured chunk by chunk."""

from collections.abc import Mapping
from typing import Any

from vla_jax.config import ConfigError, DataConfig, StructureConfig
from vla_jax.data.dataset import Dataset
from vla_jax.data.spec import DatasetSpec
from vla_jax.data.units.policy_units import PolicyUnits, measure


def with_chunks(
    statistics: Mapping[str, Any], dataset: Dataset, structure: StructureConfig, config: DataConfig
) -> dict[str, Any]:
    """Statistics with those of chunks and states as `data.units` scales them, if not yet there.

    Args:
        statistics: the dataset's statistics so far.
        dataset: opened, in its recorded units.
        structure: gives the chunk's length.
        config: the data section.

    Raises:
        ConfigError: the dataset records no state.
    """
    # A checkpoint brings them along: its units stay those it was trained with.
    if "chunks" in statistics:
        return dict(statistics)
    if dataset.proprio is None:
        raise ConfigError(f"data.units: dataset {dataset.name!r} records no state of the robot")
    chunks = measure(
        dataset.actions, dataset.proprio, dataset.starts, structure.chunk, config.relative,
        config.robot,
    )  # fmt: skip
    return {**statistics, "chunks": chunks}


def units_of(
    name: str,
    statistics: Mapping[str, Any],
    spec: DatasetSpec,
    structure: StructureConfig,
    config: DataConfig,
) -> PolicyUnits:
    """The units of a dataset.

    Args:
        name: the dataset's.
        statistics: its statistics, with those of its chunks.
        spec: says how its gripper is commanded.
        structure: says how many numbers of the state the model takes.
        config: the data section.

    Raises:
        ConfigError: the rule is none, or the state has another size than the model takes.
    """
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
