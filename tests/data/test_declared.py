"""What datasets declare, held against what they hold; and how much of them may be left out."""

import dataclasses
import itertools
import json
import logging

import jaxtyping
import numpy as np
import pytest

from tests.data.conftest import write_calvin
from tests.data.look_alikes import START, calvin_frame, encoded, write_calvin_npz
from vla_jax.config import ConfigError
from vla_jax.data import errors, features, oxe
from vla_jax.data.calvin.frames import Files
from vla_jax.data.calvin.frames import load as load_frame
from vla_jax.data.decode import decode
from vla_jax.data.errors import Skips
from vla_jax.data.features import cast
from vla_jax.data.filters import Filters
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.open_dataset import open_dataset
from vla_jax.data.rlds.writer import RLDSWriter
from vla_jax.data.spec import DatasetSpec, Trajectory
from vla_jax.files import explain_content

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 104857600\n"
SPEC = DatasetSpec(
    images={"primary": "observation/front"},
    features={"action": "action", "text": "instruction"},
    standardize=lambda e: Trajectory(e["action"], e["text"]),
    gripper_env=(0.0, 1.0),
)


def write(folder, camera, frames, action=None, lengths=(5, 4), **writer):
    described = {"steps": {"observation": {"front": camera}, "action": features.tensor((7,)),
                           "instruction": features.text()}}  # fmt: skip
    with RLDSWriter(folder, "my_robot", described, **writer) as out:
        for number, n in enumerate(lengths):
            values = np.full((n, 7), number, np.float32) if action is None else action(n)
            steps = {"observation": {"front": frames(n)}, "action": values, "instruction": "go"}
            out.write("train", {"steps": steps})
    return folder


def opened(folder, **more):
    return open_dataset("my", SPEC, folder, "train", ["primary"], 7, **more)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "Git LFS pointer.*git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(90), "packed with gzip"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, message):
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8))  # fmt: skip
    shard = next(folder.glob("*.tfrecord*"))
    for path in (shard, folder / "features.json", folder / "dataset_info.json"):
        sound = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(errors.DataError, match=rf"{path.name}.*{message}"):
            opened(folder)
        path.write_bytes(sound)
    write_calvin_npz(tmp_path / "c", splits=("training",))
    below = tmp_path / "c" / "training"
    for path in (
        Files(below).path(START + 5),
        below / "ep_start_end_ids.npy",
        below / "lang_annotations" / "auto_lang_ann.npy",
    ):
        sound = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(errors.DataError, match=rf"{path.name}.*{message}"):
            open_dataset("c", oxe.SPECS["calvin"], tmp_path / "c", "train", ["primary"], 7)
        path.write_bytes(sound)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(errors.DataError, match=message):
        load_frame(tmp_path / "x.npz")
    assert not explain_content(b"PK\x03\x04 sound")


@pytest.mark.parametrize("reader", ["index", "stream"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8, 12, 3), "uint8"), ((8, 12, 3), "float32"), ((3, 8, 12), "uint8")],
)
def test_a_camera_that_is_stored_as_numbers(tmp_path, shape, dtype, reader):
    from vla_jax.data.formats import find_reader

    if reader == "stream":
        pytest.importorskip("tensorflow_datasets")
    folder = write(tmp_path / "a" / "1.0.0", features.tensor(shape, dtype),
                   lambda n: np.zeros((n, *shape), dtype))  # fmt: skip
    with pytest.raises(errors.FeatureError, match=rf"'primary' .*stored as numbers \({dtype}"):
        opened(folder, reader=find_reader(folder, reader))


def test_given_pixels_that_are_no_pictures(data_config, structure):
    def trajectories(dtype):
        return [{"observation": {"rgb_static": np.zeros((4, 8, 8, 3), dtype),
                                 "robot_obs": np.zeros((4, 15), np.float32)},
                 "rel_actions": np.zeros((4, 7), np.float32),
                 "language_instruction": [b"go"] * 4}]  # fmt: skip

    config = data_config(("calvin", "none", 1.0), val_fraction=0.0, normalization="none")
    with pytest.raises(errors.FeatureError, match=r"'primary' .*stored as numbers"):
        open_datasets(config, structure(), 7, "train", trajectories={"calvin": trajectories(float)})
    mixture = open_datasets(
        config, structure(), 7, "train", trajectories={"calvin": trajectories(np.uint8)}
    )
    assert mixture.datasets[0].image_sizes == {"primary": (8, 8)}


def test_calvins_pixels_that_are_no_pictures(tmp_path):
    def frame(number):
        result = calvin_frame(number)
        return result | {"rgb_static": result["rgb_static"].astype(np.float32)}

    write_calvin_npz(tmp_path / "c", splits=("training",), frame=frame)
    with pytest.raises(errors.FeatureError, match=r"'primary' .*stored as numbers .float32"):
        open_dataset("c", oxe.SPECS["calvin"], tmp_path / "c", "train", ["primary"], 7)


def test_files_beside_calvins_frames(tmp_path):
    write_calvin_npz(tmp_path / "c", splits=("training",))
    below = tmp_path / "c" / "training"
    for name in ("._episode_0358482.npz", "statistics_1.npz", "backup_episode_77.npz"):
        (below / name).write_bytes(b"something else")
    files = Files(below)
    assert (files.prefix, files.digits) == ("episode_", 7)


@pytest.mark.parametrize("mode", ["I;16", "F", "L", "RGB", "RGBA", "P"])
def test_images_that_hold_distances(mode):
    import io

    from PIL import Image

    out = io.BytesIO()
    depth = np.tile(np.linspace(0, 250, 64), (48, 1))
    image = Image.fromarray(depth.astype({"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)))
    image = image if mode == "I;16" else image.convert(mode)
    image.save(out, "TIFF" if mode == "F" else "PNG")
    if mode in ("I;16", "F"):
        with pytest.raises(errors.ImageDecodeError, match="distances"):
            decode(out.getvalue())
    else:
        assert np.abs(decode(out.getvalue())[..., 0] - depth.astype(np.uint8)).max() < 2


def test_a_png_whose_pixels_were_changed():
    data = bytearray(encoded(np.arange(48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)))
    for at in range(60, len(data) - 16, 7):
        changed = bytearray(data)
        changed[at] ^= 16
        with pytest.raises(errors.ImageDecodeError, match="corrupt PNG"):
            decode(bytes(changed))


def test_images_of_another_size_than_declared(tmp_path, caplog):
    big = encoded(np.zeros((16, 24, 3), np.uint8))
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"), lambda n: [big] * n)
    assert opened(folder).image_sizes == {"primary": (16, 24)}
    assert "is declared as 8 x 12, its images are 16 x 24" in caplog.text


@pytest.mark.parametrize(
    ("values", "dtype", "fine"),
    [
        (np.array([0.5]), "int64", False),
        (np.array([2.0]), "int64", True),
        (np.array([300]), "uint8", False),
        (np.array([-1]), "uint8", False),
        (np.array([7]), "uint8", True),
        (np.array([2]), "bool", False),
        (np.array([1e39]), "float32", False),
        (np.array([np.inf, 0.1]), "float32", True),
        (np.array([2**40]), "float32", True),
    ],
)
def test_numbers_of_another_type_than_declared(values, dtype, fine):
    if fine:
        assert cast(values, dtype).dtype == dtype
        return
    with pytest.raises(errors.FeatureError, match=f"that are no {dtype}"):
        cast(values, dtype)


# What a spec makes of an episode of 8 steps, and what becomes of it.
def keeps(keep):
    return lambda e: Trajectory(e["action"], "pick", keep=keep)


def says(language):
    return lambda e: Trajectory(e["action"], language)


MASK = np.arange(8) > 3
RETURNED: dict[str, tuple] = {
    "bytes": (says(b"pick"), ["pick"], 8),
    "numpy bytes": (says(np.array([b"pick"] * 8)), ["pick"], 8),
    "objects": (says(np.array([b"pick"] * 8, object)), ["pick"], 8),
    "a list": (says(["pick"] * 8), ["pick"], 8),
    "alternatives": (says((b"pick", np.array(["take"] * 8))), ["pick", "take"], 8),
    "a scalar array": (says(np.array("pick")), ["pick"], 8),
    "nothing": (says(None), "have no text", 0),
    "a number": (says(7), "the language is int64", 0),
    "numbers": (says(np.zeros(8)), "the language is float64", 0),
    "a mask": (keeps(MASK), ["pick"], 4),
    "every other": (keeps(np.arange(8) % 2 == 0), ["pick"], 4),
    "numbers of frames": (keeps(np.array([2, 3, 4])), ["pick"], 3),
    "all": (keeps(None), ["pick"], 8),
    "gaps": (keeps(np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)), "frames out in between", 0),
    "a short mask": (keeps(MASK[:5]), "a mask over 5 steps, the episode has 8", 0),
    "True": (keeps(True), "keep is True", 0),
    "huge": (lambda e: Trajectory(np.full((8, 7), 1e39), "pick"), "not finite", 0),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_spec_returns(tmp_path, name):
    standardize, expected, length = RETURNED[name]
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8), lengths=(8,))  # fmt: skip
    spec = dataclasses.replace(SPEC, standardize=standardize)
    if length:
        dataset = open_dataset("my", spec, folder, "train", ["primary"], 7)
        assert (dataset.instructions, len(dataset)) == (expected, length)
        return
    with pytest.raises(errors.DataError, match=expected):
        open_dataset("my", spec, folder, "train", ["primary"], 7)


def test_episodes_keep_their_numbers_when_others_are_skipped(tmp_path, monkeypatch):
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8),
                   lengths=(5,) * 5, shard_bytes=1)  # fmt: skip
    shards = sorted(folder.glob("*.tfrecord*"))
    for shard in (shards[0], shards[2]):
        shard.write_bytes(shard.read_bytes()[:-30])
    skips = Skips("my", "skip")
    retained = opened(folder, filters=Filters(episodes=frozenset([1, 2, 4])), skips=skips)
    assert np.unique(retained.actions[:, 0]).tolist() == [1, 4]
    with pytest.raises(errors.DataError, match=r"names \[5\], which are no episodes.*0 to 4"):
        opened(folder, filters=Filters(episodes=frozenset([1, 5])), skips=Skips("my", "skip"))


def test_too_much_to_skip(tmp_path):
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8),
                   lengths=(5,) * 8, shard_bytes=1)  # fmt: skip
    for shard in sorted(folder.glob("*.tfrecord*"))[:5]:
        shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(
        errors.DataError, match=r"5 8 parts|5 of 8|: 5 8|5 .*data.max_skipped_share = 0.5"
    ):
        opened(folder, skips=Skips("my", "skip"))
    assert len(opened(folder, skips=Skips("my", "skip", 0.7)).lengths) == 3


def test_a_mistake_of_the_config_is_no_damage(tmp_path, data_config, structure):
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8), lengths=(5,) * 8)  # fmt: skip
    with pytest.raises(errors.FeatureError, match="episode 0: my: actions have 7 dimensions, the "):
        open_dataset("my", SPEC, folder, "train", ["primary"], 26, skips=Skips("my", "skip"))
    calvin = write_calvin(tmp_path / "c" / "1.0.0", [6, 7])
    config = data_config(("calvin", calvin, 1.0), on_error="skip")
    with pytest.raises(errors.DataError, match=r"no dataset is left.*calvin(?s:.*)the model 26"):
        open_datasets(config, structure(), 26, "train")


def test_a_run_stops_when_most_windows_are_lost(tmp_path, data_config, structure):
    folder = write_calvin(tmp_path / "c" / "1.0.0", [30, 30])
    config = data_config(("calvin", folder, 1.0), on_error="skip", val_fraction=0.0)
    mixture = open_datasets(config, structure(), 7, "train")
    shard = next(folder.glob("*.tfrecord*"))
    shard.write_bytes(bytes(shard.stat().st_size))  # under the run, which keeps it open or not
    ids = np.zeros(2, np.int32), np.ones(2, bool)
    with Loader(mixture, lambda _: ids, 4, 0) as batches:
        subset = itertools.islice(batches, 60)
        with pytest.raises(errors.DataError, match=r"of the last \d+ parts would be skipped"):
            list(subset)


def sparse(n):
    values = np.random.default_rng(0).normal(0, 0.1, (n, 7)).astype(np.float32)
    values[:, 4], values[:, 2] = 0, 0.5
    values[n // 2, 4] = 0.3
    values[:, 6] = np.arange(n) < n / 2
    return values


def test_motion_that_the_model_is_not_shown(tmp_path, monkeypatch, data_config, structure, caplog):
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8), sparse, lengths=(300,))  # fmt: skip
    monkeypatch.setitem(oxe.SPECS, "my", SPEC)
    entry = ("my", folder, 1.0)
    with caplog.at_level(logging.WARNING):
        open_datasets(data_config(entry, val_fraction=0.0), structure(), 7, "train")
    (line,) = [line for line in caplog.messages if "moves from" in line]
    assert line.startswith("my: action 4 moves from 0 to 0.3, in 0.33% of the frames, and always 0")
    caplog.clear()
    config = data_config(entry, val_fraction=0.0, normalization="bounds")
    open_datasets(config, structure(), 7, "train")
    assert "moves from" not in caplog.text
    for scale, case in ((1000.0, "which is"), (0.01, "of the frames are cut off")):
        low = [-scale * 0.3] * 7
        columns = {"q01": low, "min": low, "mean": [0.0] * 7, "std": [scale / 10] * 7,
                   "q99": [-x for x in low], "max": [-x for x in low]}  # fmt: skip
        path = tmp_path / "statistics.json"
        path.write_text(json.dumps({"my": {"action": columns}}))
        config = data_config(entry, val_fraction=0.0, statistics=str(path))
        caplog.clear()
        open_datasets(config, structure(), 7, "train")
        assert caplog.text.count(case) >= 4, caplog.text


def statistics(size, keys=("mean", "std", "min", "max", "q01", "q99"), padding=0):
    single = {"mean": 0.0, "std": 1.0, "min": -2.0, "max": 2.0, "q01": -1.0, "q99": 1.0}
    return {key: [single[key]] * size + [0.0] * padding for key in keys}


EXTREMES = ("mean", "std", "min", "max")
OPENPI = ("mean", "std", "q01", "q99")
GIVEN = {
    "two": ({"my": {"action": statistics(2)}}, "are of actions of 2 numbers, the model takes 7"),
    "eight": ({"my": {"action": statistics(8)}}, "actions of 8 numbers, the model takes 7"),
    "openpi": ({"norm_stats": {"actions": statistics(32, OPENPI)}}, "of 32 numbers"),
    "padded": ({"norm_stats": {"actions": statistics(7, OPENPI, 25)}}, ""),
    "lerobot": (
        {
            "action": statistics(7, ("mean", "std", "min", "max")),
            "observation.state": statistics(8),
        },
        r"q99 cannot be made of them.*lacks \['q01', 'q99'\]",
    ),
    "lerobot, newer": ({"action": statistics(7), "observation.state": statistics(8)}, ""),
}


@pytest.mark.parametrize("name", GIVEN)
def test_statistics_of_another_size(tmp_path, monkeypatch, data_config, structure, name):
    content, message = GIVEN[name]
    folder = write(tmp_path / "a" / "1.0.0", features.image(8, 12, "png"),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8))  # fmt: skip
    monkeypatch.setitem(oxe.SPECS, "my", SPEC)
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(content))
    config = data_config(("my", folder, 1.0), val_fraction=0.0, statistics=str(path))
    if not message:
        assert open_datasets(config, structure(), 7, "train").action_specs["my"].dim == 7
        return
    with pytest.raises(ConfigError, match=message):
        open_datasets(config, structure(), 7, "train")


def test_more_episodes_than_any_dataset_has(tmp_path):
    folder = write(tmp_path / "1.0.0", features.image(8, 12),
                   lambda n: np.zeros((n, 8, 12, 3), np.uint8), lengths=(5, 4, 3),
                   shard_bytes=1)  # fmt: skip
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"][0]["shardLengths"][0] = str(10**12)
    path.write_text(json.dumps(info))
    with pytest.raises(errors.DataError, match="says 1000000000000"):
        opened(folder)
    # Left out, the rest would have the numbers from there on.
    with pytest.raises(errors.DataError, match=r"my: episode number \d+: the dataset miscounts"):
        opened(folder, skips=Skips("my", "skip"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"gripper_env": (1.0, 1.0)}, "two different commands"),
        ({"gripper_env": (0.04, None)}, r"gripper_env=\(0.04, None\): two different commands"),
        ({"gripper_env": 0.04}, "two different commands"),
        ({"gripper_env": (0.0, float("nan"))}, "two different commands"),
        ({"hz": 0.0}, "above 0"),
        ({"hz": "10"}, "hz='10': .* above 0"),
        ({"noop": "a"}, "noop='a': a number, 0 or more"),
        ({"action": "eef"}, r"action='eef': is none of \['', 'eef_pos'"),
        ({"state": "pose", "noop": -1}, r"noop=-1: .*; state='pose': is none of \['none'"),
        ({"swap": "primary"}, "swap='primary': two of"),
        ({"features": ["action"]}, r"features=\['action'\]: a dict from names to paths"),
        ({"images": {"primary": 3}}, "images={'primary': 3}: a dict"),
        ({"images": {"head": "observation/front"}}, r"\['head'\] are none of \['primary'"),
    ],
)
def test_a_spec_that_cannot_be_right_is_refused_where_it_is_made(change, problem, monkeypatch):
    # Users' specs are made without the tests' own check of types.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(SPEC, **change)
