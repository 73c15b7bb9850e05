"""Statistics that other projects wrote, in our schema (openvla's).

| from | file | is |
|---|---|---|
| openvla, ours | dataset_statistics.json; `norm_stats` in config.json | {dataset: entry} |
| octo | dataset_statistics.json | the same, quantiles called p01 and p99 |
| octo, openvla | dataset_statistics_<hash>.json beside the data | one entry |
| RoboVLMs | configs/data/oxe_dataset_stats/*.json | one entry; its data.clip is 0.65 |
| LeRobot | meta/stats.json | one entry: `action`, `observation.state`; quantiles in newer ones |
| openpi | assets/.../norm_stats.json | one entry: `actions`, `state`; no extremes, no mask |

Openpi scales the gripper like the rest, which is not done here, and closes it at 1 on some robots:
only its arm can be taken over.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax.config import ConfigError, read_json

FILES = ("dataset_statistics.json", "norm_stats.json")
_KEYS = ("mean", "std", "min", "max", "q01", "q99")
_OTHERS = {"p01": "q01", "p99": "q99"}  # octo's names


def read_statistics(path: str | Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """Statistics of one or more datasets, from any of the files above.

    Args:
        path: of the file, or of a folder with one of `FILES`.
        names: of the datasets they are wanted for. A file of one entry does not say whose it is,
            so it needs exactly one.

    Returns:
        Dataset -> entry. An entry has `action` with mean, std and what else there is of min, max,
        q01 and q99, with a mask; `proprio` unless none was recorded; and the counts, if known.

    Raises:
        ConfigError: it cannot be read, or listing all that is wrong with it.
    """
    file = _file(Path(path).expanduser())
    raw = read_json(file, "statistics: ")
    entries = _entries(raw)
    if entries is None:
        raise ConfigError(
            f"statistics: {file}: not octo's, openvla's, RoboVLMs' or openpi's: "
            f"it holds {sorted(raw)}"
        )
    if "" in entries:
        if len(names) != 1:
            raise ConfigError(
                f"statistics: {file} is of one dataset and does not say of which; it was to serve "
                f"{list(names)}"
            )
        entries = {names[0]: entries[""]}
    problems: list[str] = []
    converted = {name: _convert(entry, name, problems) for name, entry in entries.items()}
    if problems:
        raise ConfigError("\n  ".join([f"statistics: {file}:", *problems]))
    return converted


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"statistics: {path} has none of {list(FILES)}")


def _entries(raw: dict[str, Any]) -> dict[str, Mapping[str, Any]] | None:
    """Dataset -> entry, "" if the file does not name it; None if it is no such file."""
    if _is_entry(raw):
        state = raw.get("proprio") or raw.get("observation.state")  # LeRobot's name
        return {"": {**raw, "proprio": state}}
    # Openpi's file and openvla's config.json have the entries one level down.
    inner = raw.get("norm_stats", raw)
    if isinstance(inner, dict) and isinstance(inner.get("actions"), dict):
        renamed = {"action": inner["actions"], "proprio": inner.get("state")}
        return {"": renamed} if _is_entry(renamed) else None
    if isinstance(inner, dict) and inner and all(_is_entry(entry) for entry in inner.values()):
        return inner
    return None


def _is_entry(raw: Any) -> bool:
    action = raw.get("action") if isinstance(raw, dict) else None
    return isinstance(action, dict) and "mean" in action


def _convert(entry: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    # The mask is compared only with columns that are sound.
    before = len(problems)
    action = _columns(entry["action"], f"{name}: action", problems)
    converted: dict[str, Any] = {"action": action}
    if len(problems) == before:
        dim = len(action["mean"])
        # Files without a mask are of arms whose last number is the gripper.
        mask = entry["action"].get("mask") or [True] * (dim - 1) + [False]
        if not isinstance(mask, list) or not all(scaled in (0, 1) for scaled in mask):
            problems.append(f"{name}: action: mask is no list of true and false")
        elif len(mask) != dim:
            problems.append(f"{name}: action: mask has {len(mask)} entries, mean {dim}")
        else:
            action["mask"] = [bool(scaled) for scaled in mask]
    if isinstance(entry.get("proprio"), dict):
        proprio = _columns(entry["proprio"], f"{name}: proprio", problems)
        # Openvla writes zeros where no state was read.
        if any(value for values in proprio.values() for value in values):
            converted["proprio"] = proprio
    for count in ("num_transitions", "num_trajectories"):
        number = entry.get(count)
        if number is not None and not _is_number(number):
            problems.append(f"{name}: {count} is {number!r}, no number")
        elif number is not None:
            converted[count] = int(number)
    return converted


def _columns(raw: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, list[float]]:
    """The known columns, checked against each other."""
    named = {_OTHERS.get(key, key): values for key, values in raw.items()}
    columns: dict[str, list[float]] = {}
    for key in _KEYS:
        values = named.get(key)
        if values is None:
            if key in ("mean", "std"):
                problems.append(f"{where}: {key} is missing")
        elif not isinstance(values, list) or not all(_is_number(value) for value in values):
            problems.append(f"{where}: {key} is no list of finite numbers")
        else:
            columns[key] = [float(value) for value in values]
    sizes = {key: len(values) for key, values in columns.items()}
    if len(set(sizes.values())) > 1:
        # Comparing columns of different lengths would only repeat this problem.
        problems.append(f"{where}: numbers of dimensions differ: {sizes}")
        return columns
    for low, high in (("min", "max"), ("q01", "q99"), ("min", "q01"), ("q99", "max")):
        pairs = list(zip(columns.get(low, []), columns.get(high, []), strict=False))
        # Quantiles are interpolated, so they may pass an extreme by a rounding error.
        worse = [i for i, (a, b) in enumerate(pairs) if a - b > 1e-6 * max(1.0, abs(b))]
        if worse:
            problems.append(f"{where}: {low} is above {high} in dimensions {worse}")
    if any(value < 0 for value in columns.get("std", [])):
        problems.append(f"{where}: a std is negative")
    return columns


def _is_number(value: Any) -> bool:
    # Python's bool is an int, too, and no statistic.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
