"""Against TensorFlow Datasets itself, which training does not need."""

import numpy as np
import pytest
import simplejpeg

from tests.data.conftest import write_calvin
from vla_jax.data import features
from vla_jax.data.decode import decode
from vla_jax.data.rlds.index import open_index
from vla_jax.data.rlds.writer import RLDSWriter

tf = pytest.importorskip("tensorflow")
tfds = pytest.importorskip("tensorflow_datasets")


def episodes(folder, split, decoders=None):
    builder = tfds.builder_from_directory(str(folder))
    for episode in builder.as_dataset(split=split, decoders=decoders):
        steps = tfds.as_numpy(episode.pop("steps"))
        yield list(steps) if decoders is None else steps, tfds.as_numpy(episode)


def test_wire_walk_equals_tfds(bridge, tmp_path):
    low = ["steps/action", "steps/observation/state", "steps/reward", "steps/is_last"]
    text, number = "steps/language_instruction", "episode_metadata/episode_id"
    index = open_index(bridge, "train", [*low, text, number], str(tmp_path), check_crc=True)
    codes, table = index.text(text)
    for e, (steps, remainder) in enumerate(episodes(bridge, "train")):
        first, stop = index.starts[e : e + 2]
        assert len(steps) == stop - first
        images = index.read("steps/observation/image_0", int(first), int(stop) - 1)
        assert index.low(number)[e] == remainder["episode_metadata"]["episode_id"]
        for t, step in enumerate(steps):
            for path in low:
                value = step
                for key in path.split("/")[1:]:
                    value = value[key]
                stored = index.low(path)[first + t]
                assert stored.dtype == value.dtype
                np.testing.assert_array_equal(stored, value)
            assert table[codes[first + t]] == step["language_instruction"].decode()
            # Also proves decoding bit-exact: TFDS decodes by tf.io.decode_image.
            np.testing.assert_array_equal(decode(images[t]), step["observation"]["image_0"])


@pytest.mark.parametrize("sampling", ["444", "422", "420"])
@pytest.mark.parametrize("size", [(64, 64), (37, 53)])
def test_decode_is_bit_exact(sampling, size):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    pixels[: size[0] // 2] = np.linspace(0, 255, size[1]).astype(np.uint8)[:, None]
    for quality in (30, 95):
        data = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=sampling)
        expected = tf.io.decode_image(data, channels=3).numpy()
        np.testing.assert_array_equal(decode(data), expected)


EVERYTHING = {
    "steps": {
        "observation": {"rgb": features.image(16, 24), "png": features.image(8, 8, "png")},
        "action": features.tensor((7,)),
        "reward": features.tensor(),
        "is_first": features.tensor((), "bool"),
        "counts": features.tensor((2,), "int32"),
        "wide": features.Feature("tensor", (2, 2), "float64", "zlib"),
        "raw": features.Feature("tensor", (3,), "uint16", "bytes"),
        "language_instruction": features.text(),
    },
    "episode_metadata": {"id": features.tensor((), "int64"), "file": features.text()},
}


def make_episode(number):
    rng, length = np.random.default_rng(number), 3 + number
    return {
        "steps": {
            "observation": {
                "rgb": rng.integers(0, 255, (length, 16, 24, 3)).astype(np.uint8),
                "png": rng.integers(0, 255, (length, 8, 8, 3)).astype(np.uint8),
            },
            "action": rng.normal(size=(length, 7)).astype(np.float32),
            "reward": np.arange(length, dtype=np.float32),
            "is_first": np.arange(length) == 0,
            "counts": rng.integers(-(2**31), 2**31, (length, 2)).astype(np.int32),
            "wide": rng.normal(size=(length, 2, 2)),
            "raw": rng.integers(0, 2**16, (length, 3)).astype(np.uint16),
            "language_instruction": f"öffne {number}",
        },
        "episode_metadata": {"id": -number, "file": f"file {number}"},
    }


def test_writer_is_read_back_by_tfds_and_by_the_index(tmp_path):
    folder = tmp_path / "my_robot" / "2.1.0"
    written = [make_episode(i) for i in range(5)]
    with RLDSWriter(folder, "my_robot", EVERYTHING, version="2.1.0", shard_bytes=9000) as writer:
        for i, episode in enumerate(written):
            writer.write("val" if i == 4 else "train", episode)
    builder = tfds.builder_from_directory(str(folder))
    assert str(builder.version) == "2.1.0"
    assert builder.info.splits["train"].num_examples == 4
    assert builder.info.splits["train"].num_shards > 1
    paths = [f"steps/{k}" for k in ("action", "counts", "wide", "raw", "language_instruction")]
    index = open_index(folder, "train", [*paths, "episode_metadata/id"], check_crc=True)
    assert index.low("episode_metadata/id").tolist() == [0, -1, -2, -3]
    for split, expected in (("train", written[:4]), ("val", written[4:])):
        results = list(episodes(folder, split))
        assert len(results) == len(expected)
        for (steps, remainder), episode in zip(results, expected, strict=True):
            assert remainder["episode_metadata"]["id"] == episode["episode_metadata"]["id"]
            assert len(steps) == len(episode["steps"]["action"])
            for t, step in enumerate(steps):
                for key in ("action", "reward", "is_first", "counts", "wide", "raw"):
                    np.testing.assert_array_equal(step[key], episode["steps"][key][t], key)
                png = episode["steps"]["observation"]["png"][t]
                np.testing.assert_array_equal(step["observation"]["png"], png)
                assert (
                    step["language_instruction"].decode()
                    == f"öffne {-remainder['episode_metadata']['id']}"
                )
    rows = np.concatenate([e["steps"]["raw"] for e in written[:4]])
    np.testing.assert_array_equal(index.low("steps/raw"), rows)
    rows = np.concatenate([e["steps"]["wide"] for e in written[:4]])
    np.testing.assert_array_equal(index.low("steps/wide"), rows)


def test_jpeg_loses_little(tmp_path):
    folder = write_calvin(tmp_path / "c" / "1.0.0", [3], size=32)
    index = open_index(folder, "train", ["steps/rel_actions"])
    ((steps, _),) = episodes(folder, "train")
    for t, view in enumerate(index.read("steps/observation/rgb_static", 0, 2)):
        np.testing.assert_array_equal(decode(view), steps[t]["observation"]["rgb_static"])
