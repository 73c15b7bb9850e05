"""The statistics of a dataset: measured over what was recorded, and held against the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ConfigError, DataConfig
from vla_jax.data.dataset import Dataset
from vla_jax.data.units.policy_units import chunk_statistics
from vla_jax.data.units.statistics import cached_statistics


def measure(
    parts: Sequence[Dataset], action_dim: int, folder: Path | None, config: DataConfig
) -> dict[str, Any]:
    """Statistics over the actions and states of all parts of a dataset.

    Args:
        parts: of one dataset, as recorded.
        action_dim: numbers of an action.
        folder: of the data, beside which they are kept; None = in `config.cache_dir` alone.
        config: the data section.
    """
    first, *further = parts
    states = [part.proprio for part in parts if part.proprio is not None]
    return cached_statistics(
        first.name,
        # A single part is not copied, as its actions may fill gigabytes.
        np.concatenate([part.actions for part in parts]) if further else first.actions,
        np.concatenate(states) if states[1:] else first.proprio,
        sum(len(part.lengths) for part in parts),
        first.spec.mask(action_dim),
        folder,
        config.cache_dir,
        # Whoever wants the index made anew trusts nothing that was kept, statistics included.
        config.index != "auto",
    )


def measure_chunks(
    statistics: Mapping[str, Any], recorded: Dataset, chunk: int, config: DataConfig
) -> dict[str, Any]:
    """Statistics with those of chunks and states as `data.units` scales them, if not yet there.

    Args:
        statistics: the dataset's statistics so far.
        recorded: the dataset.
        chunk: f, actions predicted at a step.
        config: the data section.

    Raises:
        ConfigError: the dataset records no state.
    """
    # A checkpoint brings them along: its units stay those it was trained with.
    if "chunks" in statistics:
        return dict(statistics)
    if recorded.proprio is None:
        raise ConfigError(f"data.units: dataset {recorded.name!r} records no state of the robot")
    chunks = chunk_statistics(
        recorded.actions, recorded.proprio, recorded.starts, chunk, config.relative, config.robot
    )
    return {**statistics, "chunks": chunks}


def fitted(
    name: str, statistics: Mapping[str, Any], action_dim: int, state_dim: int
) -> dict[str, Any]:
    """One dataset's statistics, held against the sizes of the model.

    Args:
        name: the dataset's.
        statistics: its statistics; openpi pads its own with zeros, which are left out.
        action_dim: numbers of an action.
        state_dim: numbers of a state that the model takes; 0 = none.

    Raises:
        ConfigError: they are of actions of another size.
    """
    result = {**statistics, "action": _unpadded(statistics["action"], action_dim)}
    if state_dim and statistics.get("proprio"):
        result["proprio"] = _unpadded(statistics["proprio"], state_dim)
    sizes = {key: len(values) for key, values in result["action"].items()}
    if set(sizes.values()) != {action_dim}:
        raise ConfigError(
            f"data.statistics: {name!r}: they are of actions of {max(sizes.values())} numbers, the "
            f"model takes {action_dim}"
        )
    return result


def _unpadded(columns: dict[str, list], size: int) -> dict[str, list]:
    """Statistics without the zeros behind `size`; anything else that is longer stays as it is."""
    numbers: Sequence[Sequence[float]] = [v for k, v in columns.items() if k != "mask"]
    # A number other than 0 behind `size` is no padding.
    if not numbers or len(numbers[0]) <= size or any(any(v[size:]) for v in numbers):
        return columns
    return {key: list(values)[:size] for key, values in columns.items()}
