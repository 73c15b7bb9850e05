"""Recordings of LIBERO, from the expert's script to the loader's windows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval_servers.libero import record, suites
from tests.eval_servers.fake_libero import FakeSimulator
from vla_jax.data import recordings
from vla_jax.data.decode import decode
from vla_jax.data.errors import CorruptRecordError, DataError, FeatureError
from vla_jax.data.lerobot.source import open_lerobot
from vla_jax.data.lerobot.writer import LeRobotWriter
from vla_jax.data.rlds.index import open_index

SCRIPT = Path(__file__).parents[2] / "launch" / "convert_data.py"
SEEDS = range(1000, 1026)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """26 demonstrations of two tasks, and the numbers of their steps."""
    folder, lengths = tmp_path_factory.mktemp("recorded"), []
    record._worlds[:] = [FakeSimulator()]
    for number in (0, 1):
        for seed in SEEDS[::2]:
            settings = record.Settings("egl", 32)
            lengths.append(record._job(settings, "object", number, seed, 0.1, 0.0, str(folder)))
    record._worlds.clear()
    (folder / recordings.RECORDING).write_text(json.dumps({"size": 32}))
    return folder, lengths


def test_an_experts_failure_is_no_demonstration(tmp_path):
    class Slippery(FakeSimulator):
        def solved(self):
            return False

    assert record.demonstrate(Slippery(), "object", 0, 1000, 0.1) is None


def test_what_is_recorded_is_seen_before_it_is_done(recorded):
    folder, lengths = recorded
    results = list(recordings.read(folder))
    assert [split for split, _ in results] == ["train"] * 24 + ["val", "train"]
    assert [len(episode.action) for _, episode in results] == lengths
    first = results[0][1]
    assert (first.task, first.seed) == (suites.tasks("object")[0].name, 1000)
    assert first.state[0, :3] == pytest.approx([-0.14, 0, 0.27])
    assert np.abs(first.action).max() <= 1
    # The first action goes down to the thing; the noise in what was done is not in it.
    assert first.action[0] == pytest.approx([1, -1, -1, 0, 0, 0, -1])
    pictures = [decode(data) for data in first.images["image"][:2]]
    assert [int(p[1, 0, 0]) for p in pictures] == [20, 21]


def test_a_push_lasts_some_steps_and_is_not_recorded_as_the_experts():
    straight = record.demonstrate(FakeSimulator(), "object", 0, 1000, 0.0)
    pushed = record.demonstrate(FakeSimulator(), "object", 0, 1000, 0.0, pushes=0.05)
    assert straight is not None
    assert pushed is not None

    def gone_astray(rows):
        done = np.diff(rows["state"][:, :3], axis=0) / 0.02
        return np.abs(done - np.clip(rows["action"][:-1, :3], -1, 1)).max(1) > 1e-3

    assert not gone_astray(straight).any()
    astray = gone_astray(pushed)
    assert 4 <= astray.sum() < len(astray) / 2
    first = int(np.argmax(astray))
    assert astray[first : first + 4].all()
    assert len(pushed["action"]) > len(straight["action"])


def test_the_seeds_of_evaluations_are_not_recorded(tmp_path, capsys):
    out = tmp_path / "recorded"
    assert record.main([f"--out={out}", "--suite=object", "--seed=999"]) == 1
    assert "--seed: 999 is left to evaluations" in capsys.readouterr().err
    assert not out.exists()


def test_rlds_as_openvlas(recorded, tmp_path):
    folder, lengths = recorded
    out = tmp_path / "libero_object_no_noops" / "1.0.0"
    command = [sys.executable, str(SCRIPT), "libero", str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{'train': 25, 'val': 1} episodes" in done.stdout
    index = open_index(out, "train", ["steps/action", "steps/observation/state"])
    assert index.num_episodes == 25
    assert int(index.starts[-1]) == sum(lengths) - lengths[24]
    assert index.low("steps/action").shape == (int(index.starts[-1]), 7)


def test_lerobot_reads_back(recorded, tmp_path):
    folder, lengths = recorded
    out = tmp_path / "lerobot"
    assert recordings.write_lerobot(folder, out) == {"train": 26}
    source = open_lerobot(out, "train", ["steps/action", "steps/observation/state"])
    assert source.num_episodes == 26
    assert np.diff(source.starts).tolist() == lengths
    _, first = next(recordings.read(folder))
    assert np.array_equal(source.low("steps/action")[: lengths[0]], first.action)
    image = source.read("steps/observation/images/image", 0, 3)[3]
    assert bytes(image) == first.images["image"][3]
    stats = json.loads((out / "meta" / "stats.json").read_text())
    assert stats["action"]["count"] == [sum(lengths)]
    with pytest.raises(FileExistsError):
        recordings.write_lerobot(folder, out)


def test_wrong_values_are_all_named_and_leave_nothing_behind(tmp_path):
    out = tmp_path / "new"
    with (
        pytest.raises(FeatureError, match=r"features \['action', 'other'\].*shape \(6,\), not"),
        LeRobotWriter(out, 20.0, {"action": (7,), "state": (8,)}, {}) as writer,
    ):
        writer.write({"action": np.zeros((3, 6)), "other": np.zeros(3)}, "go")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FeatureError, match="no episodes"), LeRobotWriter(out, 20.0, {}, {}):
        pass


def test_what_is_no_recording(tmp_path):
    with pytest.raises(DataError, match="no finished recording"):
        recordings.write_rlds(tmp_path, tmp_path / "out", "x")
    (tmp_path / recordings.RECORDING).write_text('{"size": 32}')
    with pytest.raises(DataError, match="holds no recordings"):
        list(recordings.read(tmp_path))
    (tmp_path / "00_01000.npz").write_bytes(b"half a fi")
    with pytest.raises(CorruptRecordError, match="cannot be read"):
        list(recordings.read(tmp_path))
