"""What a config leaves to its datasets, and the first spec that a dataset gets."""

import json
import runpy
import shutil

import numpy as np
import pytest

from configs import finetune, first_run
from launch import inspect_data
from tests.data.conftest import write_calvin
from tests.data.look_alikes import write_lerobot
from vla_jax.config import ConfigError, resolve
from vla_jax.data.errors import DataError
from vla_jax.data.find_spec import find_spec
from vla_jax.data.first_spec import guess, list_features, source_code
from vla_jax.data.inspection import inspect
from vla_jax.data.robot import resolve_with_data

SPEC = """
from vla_jax.data import ops
from vla_jax.data.spec import DatasetSpec, Trajectory


def standardize(episode):
    return Trajectory(ops.cat(episode["action"])[:, :{dim}], episode["text"])


{name} = DatasetSpec(
    images={images},
    features={{"action": "rel_actions", "text": "language_instruction"}},
    standardize=standardize,
    gripper_env={gripper},
)
"""
BOTH = {"primary": "observation/rgb_static", "wrist": "observation/rgb_gripper"}


@pytest.fixture
def robot(tmp_path, monkeypatch):
    """A function that writes a spec over `write_calvin`'s data and gives its config."""
    monkeypatch.chdir(tmp_path)
    write_calvin(tmp_path / "data", [9, 12])

    def make(name="mine", dim=7, images=BOTH, gripper=None, **changes):
        text = SPEC.format(name=name, dim=dim, images=images, gripper=gripper)
        (tmp_path / f"{name}.py").write_text(text)
        raw = first_run.get_config(f"{name}.py:{name}:data")
        raw.update_from_flattened_dict(changes)
        return raw

    return make


def test_actions_cameras_and_gripper_are_the_datasets(robot):
    model = resolve_with_data(robot(dim=5, images={"wrist": BOTH["wrist"]})).model
    assert (model.action_dim, model.gripper, model.structure.cameras) == (5, "none", ("wrist",))
    model = resolve_with_data(robot("held", gripper=(1.0, -1.0))).model
    assert (model.action_dim, model.gripper) == (7, "last")
    assert model.structure.cameras == ("primary", "wrist")
    # What is set stays, and what no data are asked about is a hand with a gripper.
    chosen = robot("more", **{"model.structure.cameras": ("wrist",), "model.action_dim": 7})
    assert resolve_with_data(chosen).model.structure.cameras == ("wrist",)
    plain = resolve(robot("none")).model
    assert (plain.action_dim, plain.gripper) == (7, "last")
    assert plain.structure.cameras == ("primary", "wrist")


@pytest.mark.slow  # imports TensorFlow
def test_the_streams_actions_are_counted_without_reading_it(robot):
    assert resolve_with_data(robot(dim=4, **{"data.reader": "stream"})).model.action_dim == 4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.action_dim": 6}, r"model.action_dim: 6 is set, the datasets have {'mine': 7}"),
        ({"model.gripper": "last"}, "model.gripper: 'last' is set, the datasets have .* 'none'"),
        ({"images": {"primary": "rgb"}}, r"model.structure.cameras: .* have {'mine': \[\]}"),
    ],
)
def test_what_contradicts_the_data_names_its_key(robot, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        resolve_with_data(robot(**changes))


def test_every_dataset_that_cannot_be_opened_is_named_at_once(robot, tmp_path):
    raw = robot()
    (full,) = raw.data.datasets
    raw.data.datasets = (
        {**full, "dir": "nowhere"}, {**full, "spec": "mine.py:other"}, {**full, "spec": "gone"},
        {**full, "spec": "mine.py"},
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        resolve_with_data(raw)
    message = str(error.value)
    assert "data.datasets[0] (mine.py:mine): nowhere: is no folder" in message
    assert "data.datasets[1].spec: 'mine.py:other': no DatasetSpec 'other'" in message
    assert "data.datasets[2].spec: " in message
    assert (
        "data.datasets[3].spec: 'mine.py': name the spec within the file, mine.py:NAME" in message
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dim": 0}, r"actions are float32 \(\d+, 0\), without a single number a step"),
        ({"dim": 1, "gripper": (0.0, 1.0)}, "a gripper alone; gripper_env=None takes it as"),
    ],
)
def test_actions_without_numbers_are_no_actions(robot, tmp_path, change, problem):
    with pytest.raises(ConfigError, match=rf"\(mine.py:mine\): data: .*{problem}"):
        resolve_with_data(robot(**change))
    with pytest.raises(DataError, match=f"data: mine: .*{problem}"):
        inspect("mine", find_spec("mine.py:mine"), "data", cache_dir=str(tmp_path / "cache"))


def test_pictures_are_no_actions(robot, tmp_path):
    raw = robot()
    text = (tmp_path / "mine.py").read_text().replace("rel_actions", BOTH["wrist"])
    (tmp_path / "mine.py").write_text(text)
    problem = f"mine.py:mine.: data: 'steps/{BOTH['wrist']}' holds images, not numbers or text"
    with pytest.raises(ConfigError, match=problem):
        resolve_with_data(raw)


def test_datasets_of_different_robots_make_no_model(robot):
    raw, other = robot("one", dim=7), robot("two", dim=5)
    raw.data.datasets = (*raw.data.datasets, *other.data.datasets)
    with pytest.raises(ConfigError, match=r"action_dim: .* {'one': 7, 'two': 5}"):
        resolve_with_data(raw)


def test_the_argument_of_a_config_names_a_spec_and_a_folder():
    result = finetune.dataset("my robot.py:spec:gs://bucket/data")
    assert (result["spec"], result["dir"]) == ("my robot.py:spec", "gs://bucket/data")
    assert finetune.dataset("bridge_dataset:d")["spec"] == "bridge_dataset"
    with pytest.raises(ValueError, match=r"NAME:DIR; 'a.py:spec' has no folder"):
        finetune.dataset("a.py:spec")


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "humanoid", images="image")


def test_a_dataset_lists_what_it_holds(lerobot):
    first, *lines = list_features(lerobot)
    assert first == "10 frames a second"
    words = [line.split() for line in lines]
    assert ["action", "tensor", "float32", "7"] in words
    assert ["observation/images/front", "image", "uint8", "48", "x", "64", "x", "3"] in words
    assert ["language_instruction", "text"] in words


def test_the_first_spec_works_as_it_is(lerobot, tmp_path, monkeypatch, capsys):
    """Joints alone, no gripper: nothing of the file has to be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lerobot, tmp_path / "data")
    monkeypatch.setattr("sys.argv", ["inspect_data.py", "data", "--write-spec=mine.py"])
    inspect_data.main()
    assert "--spec=mine.py:mine" in capsys.readouterr().out
    spec = runpy.run_path("mine.py")["mine"]
    assert (spec.images, spec.hz) == ({"primary": "observation/images/front"}, 10.0)
    assert not spec.has_gripper
    report = inspect("mine", spec, "data", cache_dir=str(tmp_path / "cache"))
    assert report.gripper == []
    assert len(report.dataset) == 43
    assert report.statistics["action"]["mask"] == [True] * 7
    model = resolve_with_data(first_run.get_config("mine.py:mine:data")).model
    assert (model.action_dim, model.gripper, model.structure.cameras) == (7, "none", ("primary",))
    # It is never written over.
    with pytest.raises(SystemExit, match="1"):
        inspect_data.main()
    assert "inspect_data.py: --write-spec: mine.py exists" in capsys.readouterr().err


def test_without_a_spec_the_listing_says_how_to_go_on(lerobot, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["inspect_data.py", str(lerobot)])
    inspect_data.main()
    printed = capsys.readouterr().out
    assert "no spec says what its numbers mean" in printed
    assert f"python launch/inspect_data.py {lerobot} --write-spec=my_robot.py" in printed


def described(folder, **features):
    """An RLDS folder as far as its description goes."""
    kinds = {
        "image": ("image", {"shape": {"dimensions": ["8", "8", "3"]}, "encodingFormat": "jpeg"}),
        "text": ("text", {}),
    }
    tree = {}
    for path, kind in features.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {"featuresDict": {"features": {}}})
            node = node["featuresDict"]["features"]
        name, body = kinds.get(kind) or (
            "tensor", {"shape": {"dimensions": [str(kind)]}, "dtype": "float32"},
        )  # fmt: skip
        node[leaf] = {name: body}
    steps = {"sequence": {"feature": {"featuresDict": {"features": tree}}}}
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    full = {"featuresDict": {"features": {"steps": steps}}}
    (folder / "features.json").write_text(json.dumps(full))
    return folder


def test_roles_and_parts_are_guessed_by_name(tmp_path):
    folder = described(
        tmp_path / "two_arms",
        **{
            "action/left": 7, "action/right": 7, "observation/qpos": 14, "reward": 1,
            "observation/cam_left_wrist": "image", "observation/cam_high": "image",
            "observation/cam_right_wrist": "image", "observation/overview": "image",
        },
    )  # fmt: skip
    result = guess(folder)
    assert result.action == ("action/left", "action/right")
    assert (result.state, result.text, result.hz) == ("observation/qpos", "", None)
    assert result.images == {
        "primary": "observation/cam_high",
        "secondary": "observation/cam_right_wrist",
        "wrist": "observation/cam_left_wrist",
    }
    assert result.others == ("observation/overview",)
    code = source_code("two_arms", folder)
    (tmp_path / "two_arms.py").write_text(code)
    spec = runpy.run_path(str(tmp_path / "two_arms.py"))["two_arms"]
    raw = {"action_0": np.zeros((3, 7)), "action_1": np.ones((3, 7)), "state": np.zeros((3, 14))}
    standardized = spec.standardize(raw)
    assert standardized.action.shape == (3, 14)
    assert standardized.language == "do the task"
    assert "No text was recorded" in code
    assert "Not used: observation/overview, reward." in code


def test_a_dataset_without_actions_or_cameras_says_what_it_has(tmp_path):
    blind = described(tmp_path / "blind", **{"action": 3})
    with pytest.raises(DataError, match=r"no feature is a camera of colors; it has .*action"):
        guess(blind)
    still = described(tmp_path / "still", **{"command": 3, "observation/image": "image"})
    with pytest.raises(DataError, match=r"no feature is called an action; it has \['command'\]"):
        guess(still)


def test_a_feature_without_columns_plays_no_part(tmp_path):
    """Some recorders declare what their robot does not fill."""
    folder = described(
        tmp_path / "r", **{"action": 0, "rel_action": 7, "state": 0, "observation/image": "image"}
    )
    assert guess(folder).action == ("rel_action",)
    assert guess(folder).state == ""
