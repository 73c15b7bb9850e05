"""Checkpoints of earlier formats are loaded, served, resumed and exported by this tree.

tests/fixtures/make_checkpoint.py says how and at which commit each of them was made.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import convert
from tests.fixtures import make_checkpoint
from vla_jax.config import FORMAT
from vla_jax.convert import store
from vla_jax.train.checkpoint import DamagedError, load_params

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = sorted((ROOT / "tests/fixtures").glob("checkpoint_format_*"))

every_format = pytest.mark.parametrize("golden", GOLDEN, ids=lambda folder: folder.name)
# The oldest goes through the steps of all newer formats.
NEWER = [pytest.param(golden, marks=pytest.mark.slow) for golden in GOLDEN[1:]]


def test_every_format_has_one():
    assert [folder.name for folder in GOLDEN] == [
        f"checkpoint_format_{number}" for number in range(1, FORMAT + 1)
    ]


@every_format
def test_served_with_the_recorded_actions(golden):
    with np.load(golden / "answers.npz") as recorded:
        arrays = dict(recorded)
    expected = arrays.pop("actions")
    observations: list[dict] = [{} for _ in expected]
    for name, value in arrays.items():
        key, _, step = name.rpartition("/")
        observations[int(step)][key] = str(value) if value.dtype.kind == "U" else value
    actions = make_checkpoint.answers(golden, observations)
    assert actions.shape == (3, 3, 7)
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("golden", [GOLDEN[0], *NEWER], ids=lambda folder: folder.name)
def test_resumed(golden, tmp_path, one_device):
    shutil.copytree(golden / "checkpoints", tmp_path / "checkpoints")
    last = make_checkpoint.STEPS + 1
    changes = {
        **make_checkpoint.CHANGES,
        "train.steps": last,
        "data.cache_dir": tmp_path / "cache",
        # A run from pretrained weights goes on when their folder is gone.
        "model.backbone.hf_dir": tmp_path / "gone",
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    config = f"--config=configs/bridge_smoke.py:{make_checkpoint.DATA}"
    command = [sys.executable, "launch/train.py", config, f"--workdir={tmp_path}", *flags]
    done = subprocess.run(command, cwd=ROOT, env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {make_checkpoint.STEPS}" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (trained,) = [row for row in rows if row["kind"] == "train"]
    assert trained["step"] == last
    assert 0 < trained["loss"] < 10
    assert (tmp_path / "checkpoints" / str(last)).is_dir()


@every_format
def test_exported(golden, tmp_path):
    assert convert.main(["export-hf", str(golden), str(tmp_path / "hf")]) == 0
    assert convert.main(["import-hf", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    before, after = store.Stored(golden), store.Stored(tmp_path / "run")
    # The export adds the LoRA factors to the kernels beside them.
    factors = {path for path in before.leaves if path.endswith(("lora_a", "lora_b"))}
    changed = {str(Path(path).parent / "kernel") for path in factors}
    assert len(factors) == 12
    assert set(after.leaves) == set(before.leaves) - factors
    for path, leaf in after.leaves.items():
        same = np.array_equal(leaf.read(), before.leaves[path].read())
        assert same == (path not in changed), path
    for key in ("action_specs", "statistics", "tokenizer"):
        assert after.meta[key] == before.meta[key]


@every_format
def test_cut_off_it_is_called_damaged(golden, tmp_path):
    """With checksums, and without those, which formats 1 and 2 did not have."""
    copy = shutil.copytree(golden, tmp_path / "copy")
    arrays = [path for path in copy.glob("checkpoints/*/params/**/d/*") if path.is_file()]
    with max(arrays, key=lambda path: path.stat().st_size).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedError, match="There is no other step"):
        load_params(copy)
