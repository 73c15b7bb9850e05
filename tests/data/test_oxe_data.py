"""Registered datasets from their files to windows: look-alikes with a few steps each."""

import json

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.config import ConfigError
from vla_jax.data import features
from vla_jax.data.errors import FeatureError
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.oxe import get_spec
from vla_jax.data.rlds.writer import RLDSWriter
from vla_jax.data.units import statistics
from vla_jax.data.units.gripper import targets

X = "_converted_externally_to_rlds"


def encode(text):
    return np.zeros(16, np.int32), np.ones(16, bool)


def tree(flat):
    """{"a/b": x} -> {"a": {"b": x}}."""
    collected = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = collected
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return collected


def write(folder, name, cameras, numbers, episodes):
    """Writes a dataset; `episodes` are {path: array} with all of `cameras` and `numbers`."""
    described = {camera: features.image(8, 8, "png") for camera in cameras}
    described |= {path: features.tensor((n,) if n else ()) for path, n in numbers.items()}
    described["language_instruction"] = features.text()
    with RLDSWriter(folder, name, {"steps": tree(described)}) as out:
        for episode in episodes:
            out.write("train", {"steps": tree(episode | {"language_instruction": "do it"})})
    return folder


def frames(steps, camera, episode):
    """Pixels that name camera, episode and step."""
    pixels = np.zeros((steps, 8, 8, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = camera, episode
    pixels[..., 2] = np.arange(steps)[:, None, None]
    return pixels


@pytest.fixture
def droid(tmp_path):
    cameras = [f"observation/{c}" for c in (
        "exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")]  # fmt: skip
    numbers = {
        "action_dict/cartesian_velocity": 6,
        "action_dict/gripper_position": 1,
        "observation/cartesian_position": 6,
        "observation/gripper_position": 1,
    }
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(24):
        episode = {path: frames(3, i, number) for i, path in enumerate(cameras)}
        episode |= {p: rng.random((3, n)).astype(np.float32) for p, n in numbers.items()}
        episodes.append(episode)
    return write(tmp_path / "droid" / "1.0.0", "droid", cameras, numbers, episodes)


def seen(config, structure):
    """Camera that was read in each role, of each (episode, step)."""
    mixture = open_datasets(config, structure, 7, "train")
    collected = {}
    with Loader(mixture, encode, 8, 3) as loader:
        for _ in range(mixture.num_windows // 8 * 3):
            images = next(loader).observation.images
            for row in range(8):
                views = {role: x[row, -1, 0, 0] for role, x in images.items()}
                place = {(int(v[1]), int(v[2])) for v in views.values()}
                assert len(place) == 1
                collected[place.pop()] = {role: int(v[0]) for role, v in views.items()}
    return collected


def test_droids_outer_cameras_change_places_between_trajectories(droid, data_config, structure):
    config = data_config(("droid", droid, 1.0), val_fraction=0.0)
    both = seen(config, structure(window=1, cameras=("primary", "secondary", "wrist")))
    assert set(both) == {(e, t) for e in range(24) for t in range(3)}
    swapped = set()
    for (episode, _), views in both.items():
        assert views["wrist"] == 2
        assert {views["primary"], views["secondary"]} == {0, 1}
        swapped |= {episode} if views["primary"] else set()
    for episode in range(24):  # a trajectory has one order
        assert len({both[episode, t]["primary"] for t in range(3)}) == 1
    assert 6 <= len(swapped) <= 18
    alone = seen(config, structure(window=1))
    assert {place: v["primary"] for place, v in alone.items()} == {
        place: v["primary"] for place, v in both.items()
    }


def test_held_out_trajectories_keep_their_order_of_cameras(droid, data_config, structure):
    full = open_datasets(
        data_config(("droid", droid, 1.0), val_fraction=0.0), structure(window=1), 7, "train"
    )
    held_out = open_datasets(
        data_config(("droid", droid, 1.0), val_fraction=0.25), structure(window=1), 7, "val"
    )
    for number in range(6):
        expected = full.datasets[0]._path("primary", 18 + number)
        assert held_out.datasets[0]._path("primary", number) == expected


def test_a_stride_takes_its_images_along(tmp_path, data_config, structure):
    joints = np.arange(11, dtype=np.float32)[:, None] ** 2 / 100 + np.arange(7)
    episode = {
        "observation/hand_image": frames(11, 0, 0),
        "observation/joint_pos": joints.astype(np.float32),
        "observation/gripper": np.ones(11, np.float32),
        "action": np.concatenate([np.zeros((11, 7)), np.arange(11)[:, None] % 2], 1).astype("f4"),
    }
    numbers = {"observation/joint_pos": 7, "observation/gripper": 0, "action": 8}
    name = f"berkeley_rpt{X}"
    folder = write(tmp_path / name / "1.0.0", name, ["observation/hand_image"], numbers, [episode])
    config = data_config((name, folder, 1.0), val_fraction=0.0, variant="octo")
    config_plain = data_config((name, folder, 1.0), val_fraction=0.0)
    mixture = open_datasets(config, structure(cameras=("wrist",), proprio=8), 8, "train")
    assert mixture.datasets[0].lengths.tolist() == [3]  # steps 0, 3 and 6; the last, 9, has no next
    moved = mixture.datasets[0].actions[:, :7]
    assert (np.diff(moved[:, 0]) > 0).all()
    out = np.zeros((3, 8, 8, 3), np.uint8)
    mixture.datasets[0].images("wrist", 0, np.array([0, 1, 2]), out)
    assert out[:, 0, 0, 2].tolist() == [0, 3, 6]
    mixture.datasets[0].images("wrist", 0, np.array([0, 0, 1]), out)
    assert out[:, 0, 0, 2].tolist() == [0, 0, 3]
    plain = open_datasets(config_plain, structure(cameras=("wrist",)), 8, "train")
    assert plain.datasets[0].lengths.tolist() == [11]


def test_actions_that_no_head_here_makes_are_refused(tmp_path, data_config, structure):
    episode = {
        "observation/image": frames(4, 0, 0),
        "observation/position": np.ones((4, 2), np.float32),
        "observation/yaw": np.ones((4, 1), np.float32),
        "observation/state": np.ones((4, 3), np.float32),
        "action": np.ones((4, 2), np.float32),
    }
    numbers = {path: x.shape[1] for path, x in episode.items() if "image" not in path}
    folder = write(
        tmp_path / "g" / "1.0.0", "gnm_dataset", ["observation/image"], numbers, [episode]
    )
    config = data_config(("gnm_dataset", folder, 1.0), val_fraction=0.0)
    with pytest.raises(FeatureError, match="nav_2d actions do not end in a gripper"):
        open_datasets(config, structure(), 2, "train")
    with pytest.raises(FeatureError, match="nav_2d actions have 2 dimensions, the model 7"):
        open_datasets(config, structure(), 7, "train")


def test_a_variant_changes_what_is_kept(bridge, data_config, structure):
    lengths = {}
    for variant in ("default", "openvla", "octo"):
        config = data_config(("bridge_dataset", bridge, 1.0), val_fraction=0.0, variant=variant)
        lengths[variant] = open_datasets(config, structure(), 7, "train").datasets[0].lengths
    assert lengths["default"].tolist() == lengths["octo"].tolist()
    assert lengths["openvla"].tolist() == (lengths["octo"] - 1).tolist()


@pytest.mark.parametrize(
    ("rule", "binary", "expected"),
    [
        ("declared", True, [0, 0, 0, 1, 1, 1, 1]),
        ("declared", False, [0, 0, 0.5, 0.75, 1, 1, 1]),
        ("recorded", True, [-1, 0, 0.5, 0.75, 1, 1.5, 2]),
        ("exact", True, [0, 0, 0, 0, 1, 0, 0]),
        ("exact", False, [0, 0, 0, 0, 1, 0, 0]),
    ],
)
def test_gripper_targets(rule, binary, expected):
    opened = np.array([-1, 0, 0.5, 0.75, 1, 1.5, 2], np.float32)
    result = targets(opened, binary, rule)
    assert result.tolist() == expected
    assert result.dtype == np.float32


@pytest.fixture
def rh20t(tmp_path):
    """A gripper that is never quite open and never moves."""
    episodes = [
        {
            "observation/image_front": frames(5, 0, number),
            "action/tcp_base": np.random.default_rng(number).random((5, 6)).astype(np.float32),
            "action/gripper": np.full(5, 0.75, np.float32),
            "observation/tcp_base": np.zeros((5, 6), np.float32),
            "observation/gripper_width": np.zeros(5, np.float32),
        }
        for number in range(4)
    ]
    numbers = {"action/tcp_base": 6, "action/gripper": 0}
    numbers |= {"observation/tcp_base": 6, "observation/gripper_width": 0}
    cameras = ["observation/image_front"]
    return write(tmp_path / "rh20t" / "1.0.0", "rh20t", cameras, numbers, episodes)


def test_grippers_of_a_mixture(rh20t, data_config, structure):
    for knobs, expected in (
        ({}, 0.75),
        ({"gripper": "exact"}, 0),
        ({"constant_to_zero": True}, 0),
    ):
        config = data_config(("rh20t", rh20t, 1.0), val_fraction=0.0, **knobs)
        mixture = open_datasets(config, structure(), 7, "train")
        assert (mixture.datasets[0].actions[:, 6] == expected).all()
        assert mixture.statistics["rh20t"]["action"]["mean"][6] == 0.75  # as it was recorded


def test_statistics_over_train_and_validation(tmp_path, data_config, structure):
    folder = write_calvin(tmp_path / "calvin" / "1.0.0", [4, 5, 6, 7])
    calvin = ("calvin", folder, 1.0)
    train = open_datasets(data_config(calvin, val_fraction=0.25), structure(), 7, "train")
    both = data_config(calvin, val_fraction=0.25, stats_split="all")
    everything = open_datasets(both, structure(), 7, "train")
    full = open_datasets(data_config(calvin, val_fraction=0.0), structure(), 7, "train")
    assert everything.statistics == full.statistics
    assert everything.statistics != train.statistics
    assert everything.num_windows == train.num_windows
    config = data_config(calvin, val_fraction=0.0, stats_split="all")
    assert open_datasets(config, structure(), 7, "train").statistics == full.statistics
    split = write_calvin(tmp_path / "split" / "1.0.0", [4, 5], splits=("train", "val"))
    config = data_config(("calvin", split, 1.0), stats_split="all")
    result = open_datasets(config, structure(), 7, "train").statistics["calvin"]
    assert result["num_trajectories"] == 4


def test_statistics_from_a_file(tmp_path, calvin, data_config, structure):
    actions = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    inputs = {"calvin": statistics.statistics(actions, None, 3)}
    file = tmp_path / "dataset_statistics.json"
    file.write_text(json.dumps(inputs))
    config = data_config(("calvin", calvin, 1.0), statistics=str(tmp_path))
    mixture = open_datasets(config, structure(), 7, "train")
    assert mixture.statistics == inputs
    assert mixture.action_specs["calvin"].low == tuple(inputs["calvin"]["action"]["q01"][:6])
    file.write_text(json.dumps({"other": inputs["calvin"]}))
    with pytest.raises(ConfigError, match=r"lack \['calvin'\]; they have \['other'\]"):
        open_datasets(config, structure(), 7, "train")


def test_cutting_twice_is_told(calvin, data_config, structure, caplog):
    open_datasets(data_config(("calvin", calvin, 1.0)), structure(), 7, "train")
    assert "already cut" not in caplog.text
    # Of this dataset it is also too much.
    with pytest.raises(ConfigError, match="cuts off actions of 'calvin'"):
        open_datasets(data_config(("calvin", calvin, 1.0), clip=0.65), structure(), 7, "train")
    assert "already cut" in caplog.text


def test_masks_come_from_the_encoding():
    spec = get_spec("aloha_static_dataset")
    result = statistics.statistics(np.ones((2, 14), np.float32), None, 1, spec.mask(14))
    assert result["action"]["mask"] == ([True] * 6 + [False]) * 2


def test_the_dct_is_a_choice(bridge, data_config, structure):
    collected = {}
    for dct in ("fast", "accurate"):
        config = data_config(("bridge_dataset", bridge, 1.0), val_fraction=0.0, dct=dct)
        dataset = open_datasets(config, structure(), 7, "train").datasets[0]
        collected[dct] = np.empty((2, *dataset.image_sizes["primary"], 3), np.uint8)
        dataset.images("primary", 0, np.array([0, 1]), collected[dct])
    difference = np.abs(collected["fast"].astype(int) - collected["accurate"])
    assert 0 < difference.mean() < 4
