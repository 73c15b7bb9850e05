"""Demonstrations recorded in LIBERO, written as the datasets that others train on.

`eval_servers/libero/record.py` leaves one .npz an episode. `write_rlds` gives them the layout of
openvla's published LIBERO datasets, so that the specs `libero_*_no_noops` read them;
`write_lerobot` gives LeRobot v3.0, with the pictures in parquet.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vla_jax.data import features
from vla_jax.data.errors import CorruptRecordError, DataError
from vla_jax.data.rlds.writer import RLDSWriter

RECORDING = "recording.json"
CAMERAS = ("image", "wrist_image")
HZ = 20.0  # control steps a second
_VAL_EVERY = 25  # one episode in so many is held out


class Recording(NamedTuple):
    """One demonstration of t steps.

    Attributes:
        task: name of the task's files.
        instruction: what the policy is told.
        seed: of where everything started.
        state: hand's position, rotation vector, two fingers.
        joints: of the arm, rad.
        action: what the expert did.
        images: camera -> t encoded pictures.
    """

    task: str
    instruction: str
    seed: int
    state: Float[np.ndarray, "t 8"]
    joints: Float[np.ndarray, "t 7"]
    action: Float[np.ndarray, "t 7"]
    images: dict[str, list[bytes]]


def read(folder: Path) -> Iterator[tuple[str, Recording]]:
    """(split, episode) of all recordings in a folder, in the order of their names.

    Raises:
        DataError: the folder holds none, or one that cannot be read.
    """
    # In a fixed order, as it decides which episodes are held out.
    paths = sorted(folder.glob("*_*.npz"))
    if not paths:
        raise DataError("holds no recordings of eval_servers/libero/record.py", folder)
    for number, path in enumerate(paths):
        # The last of each group, so that a few recordings are all trained on.
        yield "val" if number % _VAL_EVERY == _VAL_EVERY - 1 else "train", _read(path)


def write_rlds(folder: Path, out: Path, name: str) -> dict[str, int]:
    """Writes all recordings as RLDS; returns the episodes of each split.

    Args:
        folder: what `record.py` made.
        out: version folder to make.
        name: of the dataset.

    Raises:
        DataError: see `read`.
        FileExistsError: `out` exists and is not empty.
    """
    size, counts = _size(folder), {"train": 0, "val": 0}
    with RLDSWriter(out, name, _rlds_features(size), description=__doc__ or "") as writer:
        for split, recording in read(folder):
            writer.write(split, _rlds_episode(recording))
            counts[split] += 1
    return counts


def write_lerobot(folder: Path, out: Path) -> dict[str, int]:
    """Writes all recordings as a LeRobot v3.0 dataset; returns the episodes of each split.

    Args:
        folder: what `record.py` made.
        out: folder to make.

    Raises:
        DataError: see `read`.
        FileExistsError: `out` exists.
    """
    from vla_jax.data.lerobot.writer import LeRobotWriter

    size = _size(folder)
    shapes = {"observation.state": (8,), "observation.joints": (7,), "action": (7,)}
    cameras = {f"observation.images.{camera}": (size, size, 3) for camera in CAMERAS}
    counts = {"train": 0}
    with LeRobotWriter(out, HZ, shapes, cameras, robot="panda") as writer:
        # Held-out episodes come along: LeRobot's datasets mostly have one split, `train`.
        for _, recording in read(folder):
            values: dict[str, Any] = {
                "observation.state": recording.state,
                "observation.joints": recording.joints,
                "action": recording.action,
            }
            for camera in CAMERAS:
                values[f"observation.images.{camera}"] = recording.images[camera]
            writer.write(values, recording.instruction)
            counts["train"] += 1
    return counts


def _rlds_features(size: int) -> dict[str, Any]:
    scalars = {"is_first": "bool", "is_last": "bool", "is_terminal": "bool"}
    scalars |= {"reward": "float32", "discount": "float32"}
    return {
        "steps": {
            "observation": {
                **{camera: features.image(size, size) for camera in CAMERAS},
                "state": features.tensor((8,)),
                "joint_state": features.tensor((7,)),
            },
            "action": features.tensor((7,)),
            "language_instruction": features.text(),
            **{name: features.tensor((), dtype) for name, dtype in scalars.items()},
        },
        "episode_metadata": {"task": features.text(), "seed": features.tensor((), "int32")},
    }


def _rlds_episode(recording: Recording) -> dict[str, Any]:
    steps = len(recording.action)
    # Only what was solved is recorded, so the last step is terminal and alone has a reward.
    last = np.arange(steps) == steps - 1
    return {
        "steps": {
            "observation": {
                **recording.images,
                "state": recording.state,
                "joint_state": recording.joints,
            },
            "action": recording.action,
            "language_instruction": recording.instruction,
            "is_first": np.arange(steps) == 0,
            "is_last": last,
            "is_terminal": last,
            "reward": last.astype(np.float32),
            "discount": np.ones(steps, np.float32),
        },
        "episode_metadata": {"task": recording.task, "seed": np.int32(recording.seed)},
    }


def _size(folder: Path) -> int:
    """Height and width of the pictures."""
    path = folder / RECORDING
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["size"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"is no finished recording of record.py ({error})", path) from error


def _read(path: Path) -> Recording:
    try:
        # Unpickling would run whatever code a stranger's file holds.
        with np.load(path, allow_pickle=False) as file:
            images = {}
            for camera in CAMERAS:
                data, ends = file[camera].tobytes(), file[camera + "_ends"]
                starts = np.concatenate([[0], ends[:-1]])
                # The pictures of a camera lie back to back, and `_ends` tells where each one stops.
                images[camera] = [data[a:b] for a, b in zip(starts, ends, strict=True)]
            return Recording(
                str(file["task"]),
                str(file["instruction"]),
                int(file["seed"]),
                file["state"],
                file["joints"],
                file["action"],
                images,
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CorruptRecordError(f"cannot be read ({error})", path) from error
