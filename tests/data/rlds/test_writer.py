from typing import Any

import numpy as np
import pytest

from vla_jax.data import features
from vla_jax.data.errors import FeatureError
from vla_jax.data.features import load_features
from vla_jax.data.rlds.index import open_index, split_names
from vla_jax.data.rlds.writer import RLDSWriter

DESCRIBED = {
    "steps": {"rgb": features.image(4, 4, "png"), "action": features.tensor((2,))},
    "episode_metadata": {"id": features.tensor((), "int32")},
}


def episode(length=3):
    rgb = np.zeros((length, 4, 4, 3), np.uint8)
    steps = {"rgb": rgb, "action": np.ones((length, 2), np.float32)}
    return {"steps": steps, "episode_metadata": {"id": 1}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "robot" / "1.0.0"


def test_features_json_round_trip(folder):
    with RLDSWriter(folder, "robot", DESCRIBED) as writer:
        writer.write("train", episode())
    assert load_features(folder / "features.json") == {
        "steps/rgb": features.image(4, 4, "png"),
        "steps/action": features.tensor((2,)),
        "episode_metadata/id": features.tensor((), "int32"),
    }
    assert split_names(folder) == ["train"]


def test_nothing_appears_before_the_end_or_after_an_error(folder):
    writer = RLDSWriter(folder, "robot", DESCRIBED)
    writer.write("train", episode())
    assert not folder.exists()
    writer.close()
    assert folder.exists()

    def fail():
        with RLDSWriter(folder.parent / "2.0.0", "robot", DESCRIBED) as writer:
            writer.write("train", episode())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["1.0.0"]


def test_existing_data_are_kept(folder):
    with RLDSWriter(folder, "robot", DESCRIBED) as writer:
        writer.write("train", episode())
    with pytest.raises(FileExistsError, match="not empty"):
        RLDSWriter(folder, "robot", DESCRIBED)


def test_encoded_images_are_stored_as_they_are(folder):
    blobs = [b"\x89PNG 1", b"\x89PNG 22", b"\x89PNG 333"]
    changed: dict[str, Any] = episode()
    changed["steps"]["rgb"] = blobs
    with RLDSWriter(folder, "robot", DESCRIBED) as writer:
        writer.write("train", changed)
    index = open_index(folder, "train", ["steps/action"])
    assert [bytes(view) for view in index.read("steps/rgb", 0, 2)] == blobs


def test_wrong_episodes_are_refused_with_all_problems(folder):
    writer = RLDSWriter(folder, "robot", DESCRIBED)
    wrong = episode()
    wrong["steps"]["acton"] = wrong["steps"].pop("action")
    with pytest.raises(FeatureError, match=r"missing .*steps/action'.* unknown .*steps/acton"):
        writer.write("train", wrong)
    wrong = episode()
    wrong["steps"]["action"] = np.ones((3, 5))
    wrong["steps"]["rgb"] = np.zeros((3, 4, 5, 3), np.uint8)
    with pytest.raises(FeatureError, match=r"rgb: .*\(4, 5, 3\)(.|\n)*action: .*\(3, 5\)"):
        writer.write("train", wrong)
    wrong = episode()
    wrong["steps"]["action"] = np.ones((2, 2), np.float32)
    with pytest.raises(FeatureError, match="unequal"):
        writer.write("train", wrong)
    with pytest.raises(FeatureError, match="unequal or no length"):
        writer.write("train", episode(0))
    writer.abort()
    assert not any(folder.parent.iterdir())


def test_features_without_steps_are_refused(folder):
    with pytest.raises(FeatureError, match="under 'steps'"):
        RLDSWriter(folder, "robot", {"action": features.tensor((2,))})
