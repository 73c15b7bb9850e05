"""Specs of users, and what is wrong with them."""

import dataclasses
import logging

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.data import errors, features, ops, oxe
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.rlds.writer import RLDSWriter
from vla_jax.data.spec import DatasetSpec, Trajectory

LENGTHS = [4, 5, 6]
FEATURES = {
    "action": "rel_actions",
    "state": "observation/robot_obs",
    "language": "language_instruction",
}


@pytest.fixture
def opened(tmp_path, data_config, structure, monkeypatch):
    def run(standardize, folder=None, camera="rgb_static", used=FEATURES, **changes):
        spec = DatasetSpec({"primary": f"observation/{camera}"}, used, standardize, (0.0, 1.0))
        monkeypatch.setitem(oxe.SPECS, "calvin", spec)
        folder = folder or tmp_path / "c" / "1.0.0"
        if not folder.exists():
            write_calvin(folder, LENGTHS)
        knobs = {"normalization": "none", "val_fraction": 0.0, **changes}
        return open_datasets(data_config(("calvin", folder, 1.0), **knobs), structure(), 7, "train")

    return run


def made(action, language, proprio=None):
    """A Trajectory as users make it, whose shapes nothing has checked."""
    result = object.__new__(Trajectory)
    vars(result).update(action=action, language=language, proprio=proprio, keep=slice(None))
    return result


def without_first(e):
    return made(e["action"][1:], e["language"])


def states_beyond(e):
    return made(e["action"], e["language"], np.concatenate([e["state"], e["state"][:1]]))


def states_of_some(e):
    return made(e["action"], e["language"], e["state"] if len(e["action"]) < 6 else None)


def states_that_grow(e):
    return made(e["action"], e["language"], e["state"][:, : len(e["action"])])


def one_number(e):
    return made(e["action"][:, 0], e["language"])


def a_list(e):
    return made(e["action"].tolist(), e["language"])


def asserted(e):
    raise AssertionError("no")


def a_dict(e):
    return {"action": e["action"], "language": e["language"]}


def divided(e):
    return Trajectory(e["action"] * (1 / (len(e["action"]) - 5)), e["language"])


@pytest.mark.parametrize(
    ("standardize", "episode", "message"),
    [
        (without_first, 0, r"actions have 3 rows, the episode 4 steps; Trajectory\.keep leaves"),
        (states_beyond, 0, "the robot's states have 5 rows, the episode 4 steps"),
        (states_of_some, 2, "the robot's state has 0 numbers, in the episodes before 15"),
        (states_that_grow, 1, "the robot's state has 5 numbers, in the episodes before 4"),
        (one_number, 0, r"actions are float32 \(4,\), not numbers"),
        (a_list, 0, "cannot be standardized: TypeError: actions are a list, not an array"),
        (asserted, 0, "cannot be standardized: AssertionError: no"),
        (a_dict, 0, "cannot be standardized: TypeError: the spec makes a dict"),
        (divided, 1, "cannot be standardized: ZeroDivisionError"),
    ],
)
def test_what_does_not_fit_is_named(opened, standardize, episode, message):
    with pytest.raises(errors.FeatureError, match=rf"episode {episode}: calvin: {message}"):
        opened(standardize)


def test_what_does_not_fit_can_be_left_out(opened):
    (dataset,) = opened(states_of_some, on_error="skip").datasets
    assert dataset.lengths.tolist() == [4, 5]
    assert dataset.skips.counts == {"FeatureError": 1}


def test_a_text_of_the_episode_survives_keep(tmp_path, opened):
    described = {
        "steps": {"observation": {"rgb": features.image(8, 8)}, "action": features.tensor((7,))},
        "episode_metadata": {"text": features.text()},
    }
    folder = tmp_path / "e" / "1.0.0"
    with RLDSWriter(folder, "told", described) as out:
        for number, length in enumerate(LENGTHS):
            steps = {
                "observation": {"rgb": np.zeros((length, 8, 8, 3), np.uint8)},
                "action": np.full((length, 7), number / 10, np.float32),
            }
            out.write("train", {"steps": steps, "episode_metadata": {"text": f"task {number}"}})

    def standardize(e):
        return Trajectory(e["action"], e["text"], keep=slice(1, -1))

    used = {"action": "action", "text": "episode_metadata/text"}
    (dataset,) = opened(standardize, folder, "rgb", used).datasets
    assert dataset.lengths.tolist() == [2, 3, 4]
    assert [dataset.instructions[code] for code in dataset.text] == ["task 0", "task 1", "task 2"]


def test_a_first_image_that_is_corrupt(tmp_path, opened):
    described = {
        "steps": {
            "observation": {"rgb": features.Feature("image", (None, None, 3), "uint8", "jpeg")},
            "action": features.tensor((7,)),
            "text": features.text(),
        }
    }
    folder = tmp_path / "u" / "1.0.0"
    import simplejpeg

    sound = simplejpeg.encode_jpeg(np.zeros((8, 16, 3), np.uint8))
    with RLDSWriter(folder, "unsized", described) as out:
        for length in LENGTHS:
            images = [sound] * length
            if length == 4:
                images[0] = b"\xff\xd8 and no more"
            action = np.zeros((length, 7), np.float32)
            out.write("train", {"steps/observation/rgb": images, "steps/action": action,
                                "steps/text": "go"})  # fmt: skip

    def standardize(e):
        return Trajectory(e["action"], e["text"])

    used = {"action": "action", "text": "text"}
    message = r"episode 0, frame 0: 'steps/observation/rgb': not an image"
    with pytest.raises(errors.ImageDecodeError, match=message):
        opened(standardize, folder, "rgb", used)
    mixture = opened(standardize, folder, "rgb", used, on_error="skip")
    assert mixture.image_sizes == {"primary": (8, 16)}
    ids = np.zeros(2, np.int32), np.ones(2, bool)
    with Loader(mixture, lambda _: ids, 5, 0, shuffle=False) as batches:
        masks = np.concatenate([batch.actions.mask.any((1, 2)) for batch in batches])
    # The windows of three frames that hold the first one.
    assert masks.tolist() == [False] * 3 + [True] * 12
    assert mixture.datasets[0].skips.counts == {"ImageDecodeError": 3}


def test_scaling_by_deviations_warns_of_cutting(opened, caplog):
    def standardize(e):
        return Trajectory(e["action"], e["language"])

    with caplog.at_level(logging.WARNING):
        opened(standardize, normalization="normal", clip=5.0)
        assert "standard deviations" not in caplog.text
        opened(standardize, normalization="normal")
    assert "data.clip = 1.0 cuts actions that lie further than" in caplog.text


def test_specs_of_version_0_1_are_read():
    def spec(episode):
        return made(ops.binarise_gripper(episode["action"]), "lift")

    old = DatasetSpec(images={}, features={}, standardise=spec, gripper_env=(0.0, 1.0))
    assert old.standardize is dataclasses.replace(old, hz=5.0).standardize is spec
    assert old == DatasetSpec({}, {}, spec, (0.0, 1.0))
    with pytest.raises(TypeError, match="needs `standardize`"):
        DatasetSpec(images={}, features={})
