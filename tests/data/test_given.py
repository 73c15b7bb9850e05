"""Given trajectories that are wrong, or hold numbers as bytes; TensorFlow is not needed."""

import zlib

import numpy as np
import pytest
import simplejpeg

from vla_jax.data import errors
from vla_jax.data.loader import Loader, open_datasets

LENGTHS = [4, 5, 6]
JPEG = simplejpeg.encode_jpeg(np.full((8, 8, 3), 99, np.uint8))


def make(number, length):
    rng = np.random.default_rng(number)
    return {
        "observation": {
            "rgb_static": [JPEG] * length,
            "robot_obs": rng.normal(size=(length, 15)).astype(np.float32),
        },
        "action": rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        "language_instruction": [b"go"] * length,
    }


@pytest.fixture
def opened(data_config, structure):
    def run(trajectories, spec="calvin", **changes):
        knobs = {"normalization": "none", "val_fraction": 0.0, **changes}
        config = data_config((spec, "unused", 1.0), **knobs)
        return open_datasets(config, structure(), 7, "train", trajectories={spec: trajectories})

    return run


def windows(mixture):
    ids = np.zeros(2, np.int32), np.ones(2, bool)
    with Loader(mixture, lambda _: ids, 1, 0, shuffle=False) as batches:
        return sum(1 for _ in batches)


def blind(trajectory):
    del trajectory["observation"]["rgb_static"]


def uneven(trajectory):
    trajectory["action"] = trajectory["action"][:-1]


def empty(trajectory):
    trajectory |= {"action": trajectory["action"][:0], "language_instruction": []}
    trajectory["observation"] = {
        "rgb_static": [], "robot_obs": trajectory["observation"]["robot_obs"][:0]
    }  # fmt: skip


def not_finite(trajectory):
    trajectory["action"][2, 3] = np.nan


def renamed(trajectory):
    trajectory["actions"] = trajectory.pop("action")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (blind, errors.MissingCameraError, r"episode 1: no camera \['steps/observation/rgb_static"),
        (uneven, errors.FeatureError, "episode 1: features of different lengths"),
        (empty, errors.EmptyTrajectoryError, "episode 1: the trajectory has no steps"),
        (not_finite, errors.ActionError, "episode 1, frame 2: calvin: the action is not finite"),
        (renamed, errors.FeatureError, r"episode 1: no feature \['steps/action'\]"),
    ],
)
def test_what_is_wrong_is_named_or_left_out(opened, damage, kind, message):
    results = [make(number, length) for number, length in enumerate(LENGTHS)]
    damage(results[1])
    with pytest.raises(kind, match=message):
        opened(results)
    mixture = opened(results, on_error="skip")
    (dataset,) = mixture.datasets
    assert dataset.lengths.tolist() == [4, 6]
    assert dataset.skips.counts == {kind.__name__: 1}
    assert windows(mixture) == 10


def test_nothing_was_given(opened):
    with pytest.raises(errors.DataError, match="there are no trajectories"):
        opened([])


def test_kukas_states_may_come_as_bytes(opened):
    def kuka(number, length):
        rng = np.random.default_rng(number)
        pose = rng.normal(size=(length, 7)).astype(np.float32)
        closed = rng.normal(size=(length, 1)).astype(np.float32)
        return pose, {
            "observation": {
                "image": [JPEG] * length,
                "clip_function_input": {
                    "base_pose_tool_reached": [zlib.compress(row.tobytes()) for row in pose]
                },
                "gripper_closed": [zlib.compress(row.tobytes()) for row in closed],
                "natural_language_instruction": [b"pick"] * length,
            },
            "action": {
                "world_vector": rng.normal(size=(length, 3)).astype(np.float32),
                "rotation_delta": rng.normal(size=(length, 3)).astype(np.float32),
                "gripper_closedness_action": np.zeros((length, 1), np.float32),
            },
        }

    created = [kuka(number, length) for number, length in enumerate(LENGTHS)]
    mixture = opened([trajectory for _, trajectory in created], "kuka", stats_split="train")
    proprio = mixture.statistics["kuka"]["proprio"]
    everything = np.concatenate([pose for pose, _ in created])
    np.testing.assert_array_equal(proprio["max"][:7], everything.max(axis=0))
