"""Real little datasets, broken in every way: a named error with its place, or a counted skip."""

import dataclasses
import logging

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.data import errors, oxe
from vla_jax.data.features import load_features
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.rlds import crc32c, records

LENGTHS = [4, 5, 6, 7]
SHARD = "calvin-train.tfrecord-00000-of-00001"


def shard_of(folder):
    return folder / SHARD


def rewrite(folder, change):
    """Applies `change` to the list of the shard's records."""
    results = [record for _, record in records.read_records(shard_of(folder))]
    change(results)
    shard_of(folder).write_bytes(b"".join(map(records.frame_record, results)))


def fields_of(folder, record):
    """A record's values by name, as `records.build_example` takes them."""
    collected = {}
    for name, field in records.walk_example(record).items():
        read = {records.FLOAT: records.floats, records.INT: records.ints}.get(field.kind)
        spans = records.byte_spans(record, field) if read is None else ()
        values = [record[a:b] for a, b in spans] if read is None else read(record, field)
        collected[name] = (field.kind, values)
    return collected


def truncate(folder):
    data = shard_of(folder).read_bytes()
    shard_of(folder).write_bytes(data[:-1000])


def cut_between_records(folder):
    rewrite(folder, lambda found: found.__delitem__(slice(2, None)))


def spoil_a_length(folder):
    offset, _ = list(records.read_records(shard_of(folder)))[1]
    data = bytearray(shard_of(folder).read_bytes())
    data[offset - 2] ^= 255
    shard_of(folder).write_bytes(data)


def empty(folder):
    described = load_features(folder / "features.json")
    kinds = {
        p: records.FLOAT if f.kind == "tensor" else records.BYTES for p, f in described.items()
    }
    nothing = records.build_example({p: (kind, []) for p, kind in kinds.items()})
    rewrite(folder, lambda found: found.__setitem__(1, nothing))


def no_protobuf(folder):
    rewrite(folder, lambda found: found.__setitem__(1, b"\xff" * 40))


def no_list(folder):
    """Flips a bit of the wire format inside a feature, where only its values are expected."""

    def change(found):
        field = records.walk_example(found[1])["steps/rel_actions"]
        record = bytearray(found[1])
        record[field.start] |= 7  # wire type 7 does not exist
        found[1] = bytes(record)

    rewrite(folder, change)


def without_camera(folder):
    def change(found):
        fields = fields_of(folder, found[1])
        del fields["steps/observation/rgb_static"]
        found[1] = records.build_example(fields)

    rewrite(folder, change)


def not_a_number(folder, feature="steps/rel_actions", width=7):
    def change(found):
        fields = fields_of(folder, found[1])
        values = fields[feature][1].copy()
        values[3 * width + 2] = np.nan
        found[1] = records.build_example({**fields, feature: (records.FLOAT, values)})

    rewrite(folder, change)


def state_not_a_number(folder):
    not_a_number(folder, "steps/observation/robot_obs", 15)


# What is done; the error, its episode and frame, its message; episodes that skipping loses.
BROKEN = {
    "truncated": (truncate, errors.TruncatedShardError, 3, -1, "ends 1000 bytes early", 1),
    "short": (cut_between_records, errors.TruncatedShardError, -1, -1, "holds 2 episodes", 2),
    "length": (spoil_a_length, errors.CorruptRecordError, 1, -1, "record's length differs", 3),
    "empty": (empty, errors.EmptyTrajectoryError, 1, -1, "the episode has no steps", 1),
    "protobuf": (no_protobuf, errors.CorruptRecordError, 1, -1, "not a tf.train.Example", 1),
    "list": (no_list, errors.CorruptRecordError, 1, -1, "cannot be taken apart: wire type 7", 1),
    "camera": (without_camera, errors.MissingCameraError, 1, -1, "no feature .*rgb_static'", 1),
    "action": (not_a_number, errors.ActionError, 1, 3, "the action is not finite: .*nan", 1),
    "state": (state_not_a_number, errors.ActionError, 1, 3, "the robot state is not finite", 1),
}


@pytest.fixture
def folder(tmp_path):
    return write_calvin(tmp_path / "c" / "1.0.0", LENGTHS)


@pytest.fixture
def opened(data_config, structure):
    def run(*folders, cameras=("primary",), **changes):
        entries = [("calvin", folder, 1.0) for folder in folders]
        config = data_config(*entries, normalization="none", val_fraction=0.0, **changes)
        return open_datasets(config, structure(cameras=cameras), 7, "train")

    return run


@pytest.mark.parametrize("case", BROKEN)
def test_episodes(folder, opened, caplog, case):
    damage, kind, episode, frame, message, lost = BROKEN[case]
    damage(folder)
    with pytest.raises(kind, match=message) as raised:
        opened(folder)
    error = raised.value
    assert error.file == str(shard_of(folder))
    assert (error.episode, error.frame) == (episode, frame)
    assert SHARD in str(error)
    with caplog.at_level(logging.WARNING):
        mixture = opened(folder, on_error="skip")
    left = [length for length in LENGTHS if length in _left(case)]
    assert mixture.datasets[0].lengths.tolist() == left
    counts = mixture.datasets[0].skips.counts
    assert dict(counts) == {kind.__name__: lost}
    assert f"calvin: skipped {lost} {kind.__name__}" in caplog.text
    assert f"calvin: skipped {lost}: {kind.__name__}: {shard_of(folder)}" in caplog.text
    # The index remembers, and refuses again where nothing may be skipped.
    again = opened(folder, on_error="skip").datasets[0]
    assert again.skips.counts == counts
    with pytest.raises(kind, match=message) as raised:
        opened(folder)
    assert raised.value.episode == episode
    # Pixels, actions and places of what is left still belong together.
    _check(mixture, case)


def _left(case):
    lost = {"truncated": {7}, "short": {6, 7}, "length": {5, 6, 7}}.get(case, {5})
    return set(LENGTHS) - lost


def _check(mixture, case):
    with Loader(mixture, _encode, 3, 0, shuffle=False, pad_last=True) as loader:
        for batch in loader:
            pixels = batch.observation.images["primary"][:, -1, 0, 0, :2].astype(int)
            for row, (episode, step) in enumerate(pixels.tolist()):
                assert LENGTHS[episode] in _left(case)
                if batch.actions.mask[row].any():
                    result = batch.actions.chunk[row, -1, 0, :2] * 100
                    np.testing.assert_allclose(result, [episode, step], atol=1e-4)
    source = mixture.datasets[0]
    last = int(source.source.starts[-1]) - 1
    length = sorted(_left(case))[-1]
    assert source.source.place(last) == (source.source.shards[0], LENGTHS.index(length), length - 1)


@pytest.mark.parametrize("reader", ["index", "stream"])
def test_mended_shards_are_used_again(folder, opened, reader):
    sound = shard_of(folder).read_bytes()
    no_list(folder)  # the shard keeps its size
    retained = opened(folder, on_error="skip", reader=reader).datasets[0]
    assert retained.lengths.tolist() == [4, 6, 7]
    shard_of(folder).write_bytes(sound)
    assert opened(folder, reader=reader).datasets[0].lengths.tolist() == LENGTHS


def test_checksums_on_request_or_where_they_are_quick(folder, opened, monkeypatch):
    monkeypatch.setattr(crc32c, "FAST", False)
    data = bytearray(shard_of(folder).read_bytes())
    offset, record = list(records.read_records(shard_of(folder)))[2]
    data[offset + records.walk_example(record)["steps/rel_actions"].start + 9] ^= 1  # a value
    shard_of(folder).write_bytes(data)
    assert opened(folder).datasets[0].lengths.tolist() == LENGTHS
    with pytest.raises(errors.CorruptRecordError, match="episode 2: checksum of the record"):
        opened(folder, index="verify")
    monkeypatch.setattr(crc32c, "FAST", True)
    with pytest.raises(errors.CorruptRecordError, match="episode 2: checksum of the record"):
        opened(folder, index="rebuild")


def test_nothing_left_is_an_error(folder, opened):
    rewrite(folder, lambda found: found.__setitem__(slice(None), [b"\xff" * 40] * 4))
    with pytest.raises(errors.CorruptRecordError, match="episode 0: not a tf"):
        opened(folder, on_error="skip")


def spoil_jpeg(folder, episode, frame):
    """A JPEG that was damaged before it was written: the record's checksum is right."""

    def change(found):
        field = records.walk_example(found[episode])["steps/observation/rgb_gripper"]
        start, stop = records.byte_spans(found[episode], field)[frame]
        record = bytearray(found[episode])
        record[start + 4 : stop] = bytes(stop - start - 4)
        found[episode] = bytes(record)

    rewrite(folder, change)


def test_windows_with_a_corrupt_image(folder, opened, caplog):
    spoil_jpeg(folder, 2, 4)
    with pytest.raises(errors.ImageDecodeError) as raised:
        _collect(opened(folder, cameras=("primary", "wrist")))
    error = raised.value
    assert (error.file, error.episode, error.frame) == (str(shard_of(folder)), 2, 4)
    mixture = opened(folder, cameras=("primary", "wrist"), on_error="skip")
    clean = _collect(opened(folder, cameras=("primary",)))
    with caplog.at_level(logging.WARNING):
        collected = _collect(mixture)
    # Three windows of two cameras hold frame 4 of episode 2, which has frames up to 5.
    first = sum(LENGTHS[:2])
    bad = [first + 4, first + 5]
    assert mixture.datasets[0].skips.counts == {"ImageDecodeError": len(bad)}
    assert "calvin: skipped 2 ImageDecodeError" in caplog.text
    for number, (row, other) in enumerate(zip(collected, clean, strict=True)):
        if number in bad:
            assert not row["mask"].any()
            assert not row["primary"].any()
            assert not row["wrist"].any()
        else:
            np.testing.assert_array_equal(row["mask"], other["mask"])
            np.testing.assert_array_equal(row["primary"], other["primary"])
            assert row["wrist"].any()
        np.testing.assert_array_equal(row["seen"], other["seen"])
    assert [row["text"].tolist() for row in collected] == [row["text"].tolist() for row in clean]


def _collect(mixture):
    rows = []
    with Loader(mixture, _encode, 2, 0, shuffle=False, pad_last=True) as loader:
        for batch in loader:
            for row in range(2):
                images = {c: x[row].copy() for c, x in batch.observation.images.items()}
                observed = batch.observation.image_mask["primary"][row]
                mask, text = batch.actions.mask[row], batch.observation.text[row]
                rows.append({**images, "mask": mask, "seen": observed, "text": text})
    return rows


def _encode(text):
    return np.full(2, len(text), np.int32), np.ones(2, bool)


def without(folder, name, other):
    path = folder / "features.json"
    path.write_text(path.read_text().replace(f'"{name}"', f'"{other}"'))


def test_a_view_that_one_dataset_lacks_is_black(tmp_path, opened, caplog):
    folders = [write_calvin(tmp_path / name / "1.0.0", LENGTHS) for name in "ab"]
    without(folders[1], "rgb_gripper", "rgb_elsewhere")
    cameras = ("primary", "wrist")
    with pytest.raises(errors.MissingCameraError, match="calvin-2: no camera 'wrist'; its cameras"):
        opened(*folders, cameras=cameras)
    # The records still hold the feature under its old name; a real dataset would not.
    rewrite(folders[1], lambda found: found.__setitem__(slice(None), _renamed(folders[1], found)))
    with caplog.at_level(logging.WARNING):
        mixture = opened(*folders, cameras=cameras, on_error="skip")
    assert "calvin-2: skipped 1 MissingCameraError" in caplog.text
    with Loader(mixture, _encode, 4, 0) as loader:
        batch = [next(loader) for _ in range(6)][-1]
    black = batch.dataset == 1
    assert black.any()
    assert not black.all()
    assert not batch.observation.images["wrist"][black].any()
    assert not batch.observation.image_mask["wrist"][black].any()
    assert batch.observation.images["wrist"][~black].any()
    assert batch.actions.mask[black].any()
    with pytest.raises(errors.MissingCameraError, match=r"no dataset of .* has 'wrist'"):
        opened(folders[1], cameras=cameras, on_error="skip")


def _renamed(folder, found):
    old, new = "steps/observation/rgb_gripper", "steps/observation/rgb_elsewhere"
    everything = [fields_of(folder, record) for record in found]
    return [
        records.build_example({new if k == old else k: v for k, v in e.items()}) for e in everything
    ]


def test_a_wrong_feature_name_leaves_the_dataset_out(
    tmp_path, opened, data_config, structure, caplog
):
    folders = [write_calvin(tmp_path / name / "1.0.0", LENGTHS) for name in "ab"]
    without(folders[0], "robot_obs", "robot_observation")
    message = r"calvin: no feature 'observation/robot_obs'. It has .*robot_observation"
    with pytest.raises(errors.FeatureError, match=message):
        opened(*folders)
    with caplog.at_level(logging.WARNING):
        mixture = opened(*folders, on_error="skip")
    assert mixture.names == ["calvin-2"]
    assert "data.datasets: skipped 1: FeatureError" in caplog.text
    entries = [("calvin", folder, 1.0) for folder in folders]
    config = data_config(*entries, normalization="none", on_error="skip")
    held_out = open_datasets(config, structure(), 7, "val", statistics=mixture.statistics)
    assert held_out.names == mixture.names
    with pytest.raises(errors.DataError, match=r"no dataset is left of \['calvin'\].*FeatureError"):
        opened(folders[0], on_error="skip")


def test_a_spec_that_fails_names_the_episode(folder, opened, monkeypatch):
    spec = oxe.SPECS["calvin"]

    def standardize(episode):
        if len(episode["action"]) == 6:
            raise ValueError("six steps are too many for me")
        return spec.standardize(episode)

    changed = dataclasses.replace(spec, standardize=standardize)
    monkeypatch.setitem(oxe.SPECS, "calvin", changed)
    with pytest.raises(errors.FeatureError, match=r"episode 2: calvin: cannot be .*six steps"):
        opened(folder)
    mixture = opened(folder, on_error="skip")
    assert mixture.datasets[0].lengths.tolist() == [4, 5, 7]
