"""What a dataset looks like to a model, and what is suspicious about it.

Axis letters: e trajectories, n frames, a action dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.dataset import Dataset
from vla_jax.data.errors import DataError, FeatureError, Skips
from vla_jax.data.filters import moving
from vla_jax.data.formats import find_reader
from vla_jax.data.open_dataset import column_reader, open_dataset
from vla_jax.data.places import DataPath, data_path
from vla_jax.data.requested import find_feature, unfit
from vla_jax.data.spec import ACTION_ENCODINGS, DatasetSpec
from vla_jax.data.standardize import action_width
from vla_jax.data.units.statistics import statistics

# A gripper is called binary if no more than this share of its values lies between open and closed:
# recordings of two states have a few while it moves.
_BETWEEN = 0.01
# Robots mostly begin with an open hand. Below this share of trajectories that do, 1 may be closed.
_STARTS_OPEN = 0.2
_IDLE = 1e-6  # dataset's own units: motion that counts as none
_OUTLIER = 20.0  # times the distance from the median to the quantile
_BINS = np.linspace(0, 1, 11)  # of the gripper's histogram


@dataclass(frozen=True)
class Findings:
    """What was looked at and what was found.

    Attributes:
        dataset: opened, not normalized.
        statistics: in openvla's schema.
        gripper: share of the frames in each tenth of 0..1; [] without a gripper.
        summary: what to print.
        warnings: what is suspicious, one line each.
    """

    dataset: Dataset
    statistics: dict[str, Any]
    gripper: list[float]
    summary: list[str]
    warnings: list[str]


def inspect(
    name: str,
    spec: DatasetSpec,
    directory: str | Path,
    split: str = "train",
    cache_dir: str = "",
) -> Findings:
    """Opens a dataset with all cameras it has and looks at everything but the pixels.

    Args:
        name: for messages.
        spec: how it is standardized.
        directory: of the data; see `vla_jax.data.formats`.
        split: of its splits.
        cache_dir: where its index lives; see `vla_jax.data.cache.cached_folder`.

    Raises:
        DataError: it cannot be used at all; parts that are wrong become warnings.
    """
    folder = data_path(directory)
    features = find_reader(folder).features(folder)
    cameras = [role for role, path in spec.images.items() if find_feature(features, path)]
    try:
        dim = action_dim(spec, folder, split, cache_dir)
    except FeatureError as error:
        raise FeatureError(f"{name}: {error.problem}", error.file, error.episode) from error
    skips = Skips(name, "skip", most=1.0)  # whatever is wrong: that is what is asked
    dataset = open_dataset(
        name, spec, folder, split, cameras, dim, cache_dir=cache_dir, skips=skips
    )
    measured = statistics(dataset.actions, dataset.proprio, len(dataset.lengths), spec.mask(dim))
    inside: list[float] = []
    if spec.has_gripper:
        gripper = np.clip(dataset.actions[:, -1], 0, 1)
        inside = (np.histogram(gripper, _BINS)[0] / len(gripper)).tolist()
    warnings = [f"parts are skipped: {cause}" for cause in skips.causes()]
    warnings += [
        f"{count} trajectories {why}"
        for why, count in dataset.unused.items()
        if count and why != "have no text"  # `quality.texts` names them
    ]
    warnings += [
        f"no camera {role!r}: there is no {path!r}"
        for role, path in spec.images.items()
        if role not in cameras
    ]
    warnings += _about_gripper(dataset) if spec.has_gripper else []
    warnings += _about_actions(dataset, measured) + _about_texts(dataset)
    return Findings(dataset, measured, inside, _summary(dataset, measured), warnings)


def action_dim(spec: DatasetSpec, folder: DataPath, split: str, cache_dir: str = "") -> int:
    """Dimensions of the actions a spec makes: its encoding's, or of the first sound episode.

    Raises:
        FeatureError: a feature is missing, or no episode can be standardized.
    """
    if spec.action:
        return ACTION_ENCODINGS[spec.action].dim
    reader = find_reader(folder)
    features = reader.features(folder)
    paths = {short: find_feature(features, path) for short, path in spec.features.items()}
    missing = [str(spec.features[short]) for short, path in paths.items() if path is None]
    if missing:
        raise FeatureError(f"no feature {missing}. It has {sorted(features)}", folder)
    present = {short: path for short, path in paths.items() if path}
    if problems := unfit(features, {}, present.values()):
        raise FeatureError("; ".join(problems), folder)
    source = reader.open(folder, split, sorted(set(present.values())), cache_dir, False, skip=True)
    columns = {short: column_reader(source, path) for short, path in present.items()}
    last: Exception | None = None
    # One sound episode is enough; those before it may be broken.
    for episode in range(source.num_episodes):
        first, stop = int(source.starts[episode]), int(source.starts[episode + 1])
        try:
            values = {k: c(episode, first, stop) for k, c in columns.items()}
            return action_width(spec, values)
        except DataError as error:
            last = error
    raise FeatureError(f"no episode can be used: {last}", folder) from last


def _summary(dataset: Dataset, measured: Mapping[str, Any]) -> list[str]:
    lengths, actions = dataset.lengths, dataset.actions
    hz = f"{dataset.spec.hz:g} Hz" if dataset.spec.hz else "unknown rate"
    lines = [
        f"{len(lengths)} trajectories, {len(actions)} frames ({hz}); length {lengths.min()} to "
        f"{lengths.max()}, median {np.median(lengths):g}",
        f"{len(dataset.instructions)} instructions, such as {dataset.instructions[:3]}",
        *(f"camera {c}: {h} x {w}" for c, (h, w) in dataset.image_sizes.items()),
    ]
    for name, title in (("action", "action"), ("proprio", "state")):
        columns = measured.get(name)
        if columns is None:
            lines.append(f"{title}: none")
            continue
        lines.append(f"{title}: {len(columns['min'])} numbers")
        lines.append("  dim        min        q01       mean        q99        max        std")
        for i in range(len(columns["min"])):
            values = (columns[k][i] for k in ("min", "q01", "mean", "q99", "max", "std"))
            lines.append(f"  {i:3d} " + " ".join(f"{value:10.4g}" for value in values))
    return lines


def _about_gripper(dataset: Dataset) -> list[str]:
    gripper, warnings = dataset.actions[:, -1], []
    outside = (gripper < 0) | (gripper > 1)
    if outside.any():
        span = f"{gripper.min():g} to {gripper.max():g}"
        warnings.append(f"the gripper goes from {span}; 0 is closed and 1 open, nothing beyond")
    between = float(((gripper > 0.05) & (gripper < 0.95)).mean())
    if between > _BETWEEN:
        warnings.append(
            f"the gripper is not binary: {between:.1%} of its values lie between open and closed; "
            "ops.binarize_gripper turns them into what they lead to"
        )
    if gripper.min() == gripper.max():
        return warnings  # `quality.motion` says so
    starts_open = float((gripper[dataset.starts[:-1]] > 0.5).mean())
    if starts_open < _STARTS_OPEN:
        warnings.append(
            f"only {starts_open:.0%} of the trajectories begin with an open gripper: is the "
            "polarity wrong? 1 must be open"
        )
    return warnings


def _about_actions(dataset: Dataset, measured: Mapping[str, Any]) -> list[str]:
    warnings = []
    for title, columns in (
        ("action", measured["action"]),
        ("state", measured.get("proprio") or {}),
    ):
        low, high = np.asarray(columns.get("min", ())), np.asarray(columns.get("max", ()))
        scaled = np.asarray(columns.get("mask", [True] * len(low)), bool)
        constant = np.flatnonzero((low == high) & scaled).tolist()
        if constant:
            warnings.append(f"{title} dimensions {constant} are constant")
        q01, q99 = np.asarray(columns.get("q01", ())), np.asarray(columns.get("q99", ()))
        # q99 normalization has no range to scale by here.
        still = np.flatnonzero((q01 == q99) & (low != high) & scaled).tolist()
        if still:
            warnings.append(f"{title} dimensions {still} are constant in 98 % of the frames")
        # How far the extremes lie beyond the quantiles that q99 cuts at.
        reach = np.maximum(high - q99, q01 - low)
        wild = np.flatnonzero((reach > _OUTLIER * (q99 - q01)) & (q99 > q01) & scaled).tolist()
        if wild:
            warnings.append(
                f"{title} dimensions {wild} have outliers, more than {_OUTLIER:g} times the range "
                "between the 1 % and 99 % quantiles beyond it"
            )
    # A chunk of 1: every frame is judged by its own action.
    idle = 1 - float(
        moving(dataset.actions, dataset.starts, 1, _IDLE, dataset.spec.has_gripper).mean()
    )
    if idle > 0.05:
        warnings.append(f"the robot idles in {idle:.0%} of the frames; see data.filters.noop")
    return warnings


def _about_texts(dataset: Dataset) -> list[str]:
    odd = [t for t in dataset.instructions if t != t.strip() or "\n" in t or not t.isprintable()]
    warnings = []
    if odd:
        warnings.append(
            f"{len(odd)} instructions have blanks at an end or odd characters: {odd[:1]}"
        )
    if len(dataset.instructions) == 1 and len(dataset.lengths) > 1:
        warnings.append(f"every trajectory is told the same: {dataset.instructions[0]!r}")
    return warnings


def check_images(dataset: Dataset, rows: int = 6, columns: int = 5) -> tuple[dict, list[str]]:
    """Decodes some frames of some trajectories.

    Args:
        dataset: opened.
        rows: trajectories, evenly over the dataset.
        columns: frames of each, evenly over it.

    Returns:
        {camera: uint8 [rows, columns, h, x, 3]}, black where there is no image, and warnings.
    """
    chosen = np.unique(np.linspace(0, len(dataset.lengths) - 1, rows).round().astype(int))
    images, warnings = {}, []
    for camera, (height, width) in dataset.image_sizes.items():
        out = np.zeros((len(chosen), columns, height, width, 3), np.uint8)
        missing = 0
        for row, trajectory in enumerate(chosen.tolist()):
            last = int(dataset.lengths[trajectory]) - 1
            for column, frame in enumerate(np.linspace(0, last, columns).round().astype(int)):
                view = out[row, column][None]
                try:
                    present = dataset.images(camera, trajectory, np.array([frame]), view)
                except DataError as error:
                    warnings.append(f"camera {camera!r}: {error}")
                    continue
                missing += int(not present[0])
        if missing:
            total = len(chosen) * columns
            warnings.append(f"camera {camera!r} has no image in {missing} of {total} frames")
        # A covered or dead camera records one picture for ever.
        elif (out == out[:1, :1]).all():
            warnings.append(f"camera {camera!r} always shows the same image")
        images[camera] = out
    return images, warnings


def trajectories_shown(dataset: Dataset, rows: int = 6) -> list[int]:
    """The trajectories that `check_images` takes."""
    return np.unique(np.linspace(0, len(dataset.lengths) - 1, rows).round().astype(int)).tolist()
