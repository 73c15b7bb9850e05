"""What a config leaves to its datasets: numbers of an action, a gripper or none, cameras."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.cameras import CAMERAS
from vla_jax.config import Config, ConfigError, DatasetConfig, resolve
from vla_jax.data.errors import DataError, FeatureError
from vla_jax.data.features import Feature
from vla_jax.data.find_spec import find_spec, short_name
from vla_jax.data.formats import find_reader
from vla_jax.data.inspection import action_dim
from vla_jax.data.places import data_path
from vla_jax.data.requested import find_feature
from vla_jax.data.spec import ACTION_ENCODINGS, DatasetSpec
from vla_jax.data.standardize import action_width

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Robot:
    """What one dataset says of the robot it was recorded on.

    Attributes:
        action_dim: numbers of an action, as its spec makes them; None when it cannot be known
            without a pass over data that are streamed.
        gripper: "last" or "none", see `model.gripper`.
        cameras: the roles that it has images for.
    """

    action_dim: int | None
    gripper: str
    cameras: tuple[str, ...]


def resolve_with_data(raw: Any) -> Config:
    """A raw config as `vla_jax.config.resolve` gives it, completed and checked by its datasets.

    `model.action_dim` = 0, `model.gripper` = "" and `model.structure.cameras` = () become what the
    datasets have. Each dataset is opened as far as that takes: its description and one episode.

    Args:
        raw: ConfigDict or plain nested dict.

    Raises:
        ConfigError: a dataset cannot be opened, the datasets do not agree, or they contradict what
            the config sets; with the key of each problem, and what would be legal.
    """
    raw = raw.to_dict() if hasattr(raw, "to_dict") else raw
    config = resolve(raw)
    robots = _robots(config)
    model = raw.get("model", {})
    cameras = model.get("structure", {}).get("cameras") or _cameras(robots)
    skip = config.data.on_error == "skip"
    chosen = {
        "action_dim": _agreed(
            "model.action_dim", model.get("action_dim"),
            {name: robot.action_dim for name, robot in robots.items()}, skip,
        ),
        "gripper": _agreed(
            "model.gripper", model.get("gripper"),
            {name: robot.gripper for name, robot in robots.items()}, skip=False,
        ),
    }  # fmt: skip
    structure = dataclasses.replace(config.model.structure, cameras=tuple(cameras))
    complete = dataclasses.replace(config.model, structure=structure, **chosen)
    log.info(
        "actions of %d numbers, gripper: %s; cameras: %s",
        complete.action_dim, complete.gripper, ", ".join(cameras),
    )  # fmt: skip
    return dataclasses.replace(config, model=complete)


def _robots(config: Config) -> dict[str, Robot]:
    """What each dataset says of its robot, by the dataset's name."""
    robots, problems = {}, []
    for i, entry in enumerate(config.data.datasets):
        key = f"data.datasets[{i}]"
        try:
            spec = find_spec(entry.spec, config.data.parity.variant)
        except KeyError as error:
            problems.append(f"{key}.spec: {error.args[0]}")
            continue
        try:
            # A dataset that is named twice has one robot, so one entry is enough.
            robots[short_name(entry.spec)] = _robot(spec, entry, config)
        except DataError as error:
            problems.append(f"{key} ({entry.spec}): {error}")
    # A dataset that is broken may be left out, unless it is the only one.
    if problems and not (robots and config.data.on_error == "skip"):
        raise ConfigError("\n".join(problems))
    return robots


def _robot(spec: DatasetSpec, entry: DatasetConfig, config: Config) -> Robot:
    folder, reader = data_path(entry.dir), find_reader(entry.dir, config.data.reader)
    features = reader.features(folder)
    cameras = [role for role in CAMERAS if role in spec.images]
    cameras = tuple(role for role in cameras if find_feature(features, spec.images[role]))
    if spec.action:
        numbers = ACTION_ENCODINGS[spec.action].dim
    elif config.data.reader == "stream":
        # A single real episode would take a pass over data that are streamed.
        numbers = _from_zeros(spec, features)
    else:
        split, cache = config.data.train_split, config.data.cache_dir
        numbers = action_dim(spec, folder, split, cache)
    return Robot(numbers, "last" if spec.has_gripper else "none", cameras)


def _from_zeros(spec: DatasetSpec, features: Mapping[str, Feature]) -> int | None:
    """Numbers of an action that the spec makes of an episode of zeros, if it makes any."""
    columns: dict[str, np.ndarray] = {}
    for short, path in spec.features.items():
        feature = features.get(find_feature(features, path) or "")
        if feature is None or (feature.kind != "text" and None in feature.shape):
            return None
        is_text = feature.kind == "text"
        # Two steps, as a spec may take differences between steps.
        shape = (2, *(size or 0 for size in feature.shape))
        columns[short] = np.array([""] * 2, object) if is_text else np.zeros(shape, feature.dtype)
    try:
        return action_width(spec, columns)
    except FeatureError:  # a person's own code, which expects real numbers
        return None


def _cameras(robots: Mapping[str, Robot]) -> Sequence[str]:
    """The roles that every dataset has.

    Raises:
        ConfigError: there are none.
    """
    shared = [role for role in CAMERAS if all(role in robot.cameras for robot in robots.values())]
    if not shared:
        listing = {name: list(robot.cameras) for name, robot in robots.items()}
        raise ConfigError(
            f"model.structure.cameras: no camera that every dataset has; they have {listing}"
        )
    return shared


def _agreed(key: str, configured: Any, of: Mapping[str, Any], skip: bool) -> Any:
    """What the config sets, or else what all datasets have.

    Args:
        key: of the config.
        configured: its value there; false if it is left to the data.
        of: dataset -> what it has, None where that is not known.
        skip: whether datasets that do not fit may be left out.

    Raises:
        ConfigError: the datasets differ, or what is set fits none of them.
    """
    stated = {name: value for name, value in of.items() if value is not None}
    values = list(dict.fromkeys(stated.values()))
    if configured:
        fits = [value == configured for value in stated.values()]
        # Where unfit datasets may be skipped, one that fits is enough.
        if all(fits) or (skip and any(fits)):
            return configured
        advice = f"leave it out, or set it to {values[0]!r}" if len(values) == 1 else "choose one"
        raise ConfigError(f"{key}: {configured!r} is set, the datasets have {stated}; {advice}")
    if len(values) != 1:
        advice = "set it" if not values else "one model has one kind of action: choose datasets"
        raise ConfigError(f"{key}: the datasets do not agree: {dict(of)}; {advice}")
    return values[0]
