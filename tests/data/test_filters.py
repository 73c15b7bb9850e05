import itertools
import json
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.config import ConfigError
from vla_jax.data import errors
from vla_jax.data.filters import Filters, moving
from vla_jax.data.loader import Loader, open_datasets

TEXTS = ["push the red block", "open the drawer", "push the blue block", "open the drawer", "push"]
LENGTHS = [4, 5, 6, 7, 8]


@pytest.fixture
def folder(tmp_path):
    return write_calvin(
        tmp_path / "c" / "1.0.0", LENGTHS, texts=TEXTS, splits=("train", "val"), spans=True
    )


@pytest.fixture
def kept(folder, data_config, structure):
    """Lengths, which tell the trajectories apart, that are left."""

    def run(split: Any = "train", **filters):
        config = data_config(("calvin", folder, 1.0), filters=filters)
        return open_datasets(config, structure(), 7, split).datasets[0].lengths.tolist()

    return run


def test_language(kept, caplog):
    with caplog.at_level("INFO"):
        assert kept(language=("^push",), not_language=("blue",)) == [4, 8]
    assert "calvin: 3 of 5 trajectories say what data.filters leaves out" in caplog.text
    assert kept(language=("drawer", "blue")) == [5, 6, 7]
    assert kept("val", language=("drawer",)) == [5, 7]
    with pytest.raises(errors.DataError, match=r"no trajectory is left: 5 say what data\.filters"):
        kept(language=("fold the towel",))


def test_few_shot_keeps_some_of_every_instruction(kept):
    recorded = set()
    for seed in range(20):
        result = kept(few_shot=1, few_shot_seed=seed)
        assert result == kept(few_shot=1, few_shot_seed=seed)
        assert len(result) == 4
        assert set(result) >= {4, 6, 8}
        recorded |= set(result)
    assert recorded == set(LENGTHS)  # the seed decides which of the two drawers
    assert kept(few_shot=2) == LENGTHS
    assert kept("val", few_shot=1) == LENGTHS


def test_few_shot_counts():
    codes = np.array([3, 0, 3, 3, 1, 0, 3])
    keep = Filters(few_shot=2).few(codes.tolist())
    assert {c: int(keep[codes == c].sum()) for c in (0, 1, 3)} == {0: 2, 1: 1, 3: 2}


@pytest.mark.parametrize("listed", [[0, 3], [[1000, 1004], [1300, 1307], [7, 8]]])
def test_listed_episodes(kept, tmp_path, listed, caplog):
    path = tmp_path / "episodes.json"
    path.write_text(json.dumps({"calvin": listed}))
    with caplog.at_level("INFO"):
        assert kept(episodes=str(path)) == [4, 7]
    assert "3 of 5 trajectories are not listed in data.filters.episodes" in caplog.text
    assert kept("val", episodes=str(path)) == LENGTHS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected {dataset"),
        (
            '{"calvn": [1], "calvin": "x"}',
            r"'calvn' is no dataset(.|\n)*'calvin': expected numbers",
        ),
        ('{"calvin": [1, [2, 3]]}', "expected numbers, or"),
        ('{"calvin": []}', "expected numbers, or"),
    ],
)
def test_a_bad_list_of_episodes(kept, tmp_path, text, message):
    path = tmp_path / "episodes.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        kept(episodes=str(path))
    with pytest.raises(ConfigError, match="No such file"):
        kept(episodes=str(tmp_path / "none.json"))


def test_pairs_need_recorded_spans(tmp_path, data_config, structure):
    folder = write_calvin(tmp_path / "d" / "1.0.0", [4, 5])
    path = tmp_path / "episodes.json"
    path.write_text('{"calvin": [[0, 4]]}')
    config = data_config(("calvin", folder, 1.0), filters={"episodes": str(path)})
    with pytest.raises(errors.FeatureError, match="no feature 'episode_metadata/start'"):
        open_datasets(config, structure(), 7, "train")


def idle_by_loop(actions, starts, chunk, threshold):
    keep = []
    for first, stop in itertools.pairwise(starts):
        for t in range(first, stop):
            moves = False
            for u in range(t, min(t + chunk, stop)):
                moves |= bool((np.abs(actions[u, :-1]) > threshold).any())
                moves |= u > first and abs(actions[u, -1] - actions[u - 1, -1]) > threshold
            keep.append(moves)
    return keep


@pytest.mark.parametrize("chunk", [1, 3])
def test_idle_frames_equal_the_definition(chunk):
    rng = np.random.default_rng(chunk)
    starts = np.array([0, 1, 9, 30, 60])
    actions = rng.choice([0.0, 0.0, 0.0, 0.0, 1e-5, -0.3], (60, 7)).astype(np.float32)
    actions[:, :-1] *= rng.random((60, 1)) < 0.2
    actions[:, -1] = np.repeat(rng.integers(0, 2, 12), 5)
    result = moving(actions, starts, chunk, 1e-4)
    assert result.tolist() == idle_by_loop(actions, starts, chunk, 1e-4)
    assert 5 < result.sum() < 55


def test_no_window_ends_where_the_robot_idles(tmp_path, data_config, structure, caplog):
    folder = write_calvin(tmp_path / "c" / "1.0.0", [12, 9], idle=((0, 3, 9), (1, 0, 2)))
    config = data_config(
        ("calvin", folder, 1.0), normalization="none", filters={"noop": 1e-6}, val_fraction=0.0
    )
    with caplog.at_level("INFO"):
        mixture = open_datasets(config, structure(chunk=2), 7, "train")
    # The last idle frame is still followed, within a chunk of two, by one that moves.
    expected = {(0, t) for t in range(12) if not 3 <= t < 8} | {(1, t) for t in range(1, 9)}
    assert f"leaves out {21 - len(expected)} of 21 frames" in caplog.text
    with Loader(mixture, _encode, 4, 0, shuffle=False, pad_last=True) as loader:
        batches = list(loader)
    ends = np.concatenate([b.observation.images["primary"][:, -1, 0, 0, :2] for b in batches])
    assert {tuple(end) for end in ends.tolist()} == expected
    # What lies between is still there as history and as targets.
    observed = np.concatenate([b.observation.images["primary"][:, :, 0, 0, :2] for b in batches])
    assert (0, 6) in {tuple(x) for x in observed.reshape(-1, 2).tolist()}
    all_idle = write_calvin(tmp_path / "d" / "1.0.0", [5], idle=((0, 0, 5),))
    config = data_config(("calvin", all_idle, 1.0), filters={"noop": 1e-6}, val_fraction=0.0)
    with pytest.raises(errors.DataError, match=r"no window is left.*data\.filters\.noop"):
        open_datasets(config, structure(), 7, "train")


def _encode(text):
    return np.zeros(4, np.int32), np.ones(4, bool)
