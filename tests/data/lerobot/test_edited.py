"""A dataset that LeRobot's own tools have cut and merged, see its SOURCE.txt."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from vla_jax.data.lerobot.source import open_lerobot

pytest.importorskip("pyarrow")
pytest.importorskip("av")
FOLDER = Path(__file__).parents[2] / "fixtures" / "lerobot_merged"
CAMERA, TEXT = "steps/observation/images/front", "steps/language_instruction"
RECORDED = {0: 8, 2: 7, 3: 5, 4: 4, 5: 9}  # episode as it was recorded -> frames


def test_rows_texts_and_frames_belong_together(tmp_path):
    source = open_lerobot(FOLDER, "train", ["steps/action", TEXT], cache_dir=str(tmp_path))
    assert source.numbers.tolist() == [0, 1, 2, 3, 4]
    assert np.diff(source.starts).tolist() == list(RECORDED.values())
    action, (codes, table) = source.low("steps/action"), source.text(TEXT)
    row = 0
    for number, length in RECORDED.items():
        pictures = source.read(CAMERA, row, row + length - 1)
        for step in range(length):
            assert action[row + step, :2].tolist() == [number, step]
            assert table[codes[row + step]] == ["pick", "place"][number % 2]
            red, green = np.asarray(pictures[step], int).mean((0, 1))[:2]
            assert abs(red - (20 + 40 * number)) < 5
            assert abs(green - 10 * step) < 5
        row += length


def test_frames_that_two_episodes_claim_are_told(tmp_path, caplog):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "set"
    shutil.copytree(FOLDER, folder)
    open_lerobot(folder, "train", ["steps/action"])
    assert "share frames" not in caplog.text
    # As by a merge that has forgotten to move the times of the second dataset.
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    table, key = parquet.read_table(path), "videos/observation.images.front/from_timestamp"
    times = [0.0, 0.8, 1.5, 0.0, 0.4]
    column = arrow.array(times, table.schema.field(key).type)
    parquet.write_table(table.set_column(table.column_names.index(key), key, column), path)
    open_lerobot(folder, "train", ["steps/action"])
    assert "episodes 3 and 0 share frames of file-000.mp4" in caplog.text
    assert "(3 such pairs)" in caplog.text
