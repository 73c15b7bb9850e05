"""A first spec for a dataset that has none, written from what the dataset says of itself.

Which numbers are the action, the state and the instruction, and which camera stands for which
role, is guessed by name; what was guessed stands in the file, with what else there was.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_jax.cameras import CAMERAS
from vla_jax.commands import as_typed
from vla_jax.data.errors import DataError
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.formats import find_reader
from vla_jax.data.lerobot.meta import Info
from vla_jax.data.places import data_path

# Words in a camera's name that tell its role; without one it is the next role that is free.
_ROLES = {
    "wrist": r"wrist|hand|gripper|palm",
    "primary": r"primary|front|high|head|top|static|main|third|ego",
}
# Names of what is commanded and of what is measured, the likeliest first.
_ACTION = (r"^actions?$", r"(^|/)actions?$", r"(^|/)(rel_)?actions?(/|$|_)")
_STATE = (r"(^|/)state$", r"(^|/)(proprio|robot_obs|state)", r"(^|/)(qpos|joint)")
_TEXT = (r"language_instruction$", r"(language|instruction|task|text|prompt)")
_NO_TEXT = "do the task"


@dataclass(frozen=True)
class Guess:
    """The features that play each part, with their paths as a spec has them.

    Attributes:
        action: the numbers of an action, one after another.
        state: the robot's state; "" if none was found.
        text: the instruction; "" if none was found.
        images: role -> camera.
        others: cameras without a role.
        hz: control rate in 1/s, None when the dataset does not say.
    """

    action: tuple[str, ...]
    state: str
    text: str
    images: Mapping[str, str]
    others: tuple[str, ...]
    hz: float | None


def list_features(folder: str | Path) -> list[str]:
    """A line for each feature of a dataset: its path in a spec, what it is, its shape and dtype.

    Raises:
        DataError: there is no dataset of a known format.
    """
    features = _features(folder)
    width = max(len(path) for path in features)
    lines = [_line(path, feature, width) for path, feature in sorted(features.items())]
    rate = recorded_hz(folder)
    return [f"{rate:g} frames a second" if rate else "frames a second: not said", *lines]


def guess(folder: str | Path) -> Guess:
    """Guesses the part of each feature from its name.

    Raises:
        DataError: no feature has the name of an action, or none is a camera.
    """
    features = _features(folder)
    # An action or a state is one vector a step, so matrices are left out, and so is what has no
    # column: some recorders declare a feature that their robot does not fill.
    vectors = {p: f for p, f in features.items() if f.kind == "tensor" and len(f.shape) < 2}
    numbers = {path: feature for path, feature in vectors.items() if 0 not in feature.shape}
    cameras = [path for path, feature in features.items() if feature.kind == "image"]
    action = _first(_ACTION, numbers)
    if not action:
        problem = f"no feature is called an action; it has {sorted(numbers)}"
        raise DataError(f"{problem}. Write the spec by hand, as docs/your_dataset.md shows", folder)
    if not cameras:
        raise DataError(f"no feature is a camera of colors; it has {sorted(features)}", folder)
    images, unassigned = _roles(cameras)
    texts = [path for path, feature in features.items() if feature.kind == "text"]
    # The name of an action may look like that of a state.
    state = _first(_STATE, {p: f for p, f in numbers.items() if p not in action})
    text = _first(_TEXT, texts)
    # An action may have parts; of a state or a text one is taken.
    first_state, first_text = ("".join(paths[:1]) for paths in (state, text))
    return Guess(action, first_state, first_text, images, unassigned, recorded_hz(folder))


def source_code(name: str, folder: str | Path) -> str:
    """A Python file with a spec that can be used as it is.

    Args:
        name: of the spec, an identifier.
        folder: of the dataset.

    Raises:
        DataError: see `guess`.
    """
    g, available = guess(folder), _features(folder)
    short = {"action": g.action[0]} if len(g.action) == 1 else _numbered("action", g.action)
    actions = ", ".join(f'episode["{key}"]' for key in short)
    features = {**short, **({"state": g.state} if g.state else {})}
    features |= {"text": g.text} if g.text else {}
    text = 'episode["text"]' if g.text else f'"{_NO_TEXT}"'
    state = ', ops.cat(episode["state"])' if g.state else ""
    unused = [p for p in available if p not in {*features.values(), *g.images.values()}]
    size = sum(_size(available[path]) for path in g.action)
    note = "" if g.text else "    # No text was recorded: write here what the robot does.\n"
    rate = f"{g.hz:g} a second" if g.hz else "unknown: set hz to the frames in a second"
    return f'''"""What the numbers of {folder} mean.

Written by {as_typed("launch/inspect_data.py")} from the names of its features: check its guesses.
Actions: {size} numbers, control rate: {rate}.
Not used: {", ".join(sorted(unused)) or "nothing"}.
"""

from vla_jax.data import ops
from vla_jax.data.spec import DatasetSpec, Trajectory


def standardize(episode):
    """One episode as recorded -> its actions, its instruction and the robot's states."""
{note}    return Trajectory(ops.cat({actions}), {text}{state})


{name} = DatasetSpec(
    images={_dict(g.images)},
    features={_dict(features)},
    standardize=standardize,
    # All numbers of an action are scaled alike. If the last one opens and closes a gripper, make
    # it 1 = open, 0 = closed above, and set this to what the robot takes for (closed, open).
    gripper_env=None,
    hz={g.hz},
)
'''


def _features(folder: str | Path) -> dict[str, Feature]:
    features = find_reader(folder).features(data_path(folder))
    return {path.removeprefix(STEPS): feature for path, feature in features.items()}


def _line(path: str, feature: Feature, width: int) -> str:
    shape = " x ".join("?" if size is None else str(size) for size in feature.shape)
    held = {"text": "", "other": "not read"}.get(feature.kind, f"{feature.dtype} {shape or '1'}")
    return f"  {path:{width}}  {feature.kind:7} {held}".rstrip()


def recorded_hz(folder: str | Path) -> float | None:
    """Frames a second as the dataset's own files say it; None if they do not."""
    where = data_path(folder)
    return Info(where).fps if (where / "meta" / "info.json").is_file() else None


def _first(patterns: Sequence[str], paths: Sequence[str] | Mapping[str, Feature]) -> tuple:
    """The paths that match the first regex that any matches; one, unless they are parts of one."""
    for pattern in patterns:
        hits = sorted(path for path in paths if re.search(pattern, path, re.I))
        folders = {path.rpartition("/")[0] for path in hits}
        # action/x, action/y, ... are parts of one action, which are joined.
        parts = len(folders) == 1 and re.search(r"(^|/)actions?$", next(iter(folders)), re.I)
        if hits:
            return tuple(hits if parts else hits[:1])
    return ()


def _roles(cameras: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Role -> camera, and the cameras that are left."""
    left, camera_of = sorted(cameras), {}
    for role, pattern in _ROLES.items():
        # Only the end of a path names the camera; the groups above are those of all cameras.
        hit = next((c for c in left if re.search(pattern, c.rpartition("/")[2], re.I)), None)
        if hit:
            camera_of[role] = hit
            left.remove(hit)
    # Cameras whose names tell nothing take the roles that are free, in order.
    for role in CAMERAS:
        if role not in camera_of and left:
            camera_of[role] = left.pop(0)
    return {role: camera_of[role] for role in CAMERAS if role in camera_of}, tuple(left)


def _numbered(name: str, paths: Sequence[str]) -> dict[str, str]:
    return {f"{name}_{i}": path for i, path in enumerate(paths)}


def _size(feature: Feature) -> int:
    return (feature.shape[0] or 0) if feature.shape else 1


def _dict(entries: Mapping[str, str]) -> str:
    lines = "".join(f'        "{key}": "{value}",\n' for key, value in entries.items())
    return f"{{\n{lines}    }}"
