"""The whole way, very small: demonstrations, training, serving, rollout, report."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = {
    "model.structure.chunk": 2,
    "model.head.hidden": 16,
    "model.backbone.arch.latent_query_num": 2,
    "model.backbone.arch.vision_config.hidden_size": 32,
    "model.backbone.arch.vision_config.num_hidden_layers": 1,
    "model.backbone.arch.text_config.embed_dim": 32,
    "model.backbone.arch.text_config.layers": 1,
    "train.batch_size": 8,
    "train.steps": 8,
    "train.save_every": 4,
    "train.log_every": 2,
}


def execute(environment: dict, *command: object) -> str:
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("baselines", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_demo(tmp_path, one_device, baselines):
    run = partial(execute, one_device)
    run("launch/record_demos.py", "--out", tmp_path / "data/tabletop/1.0.0", "--episodes", 50)
    which = "--baselines" if baselines else "--no-baselines"
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    out = run("launch/demo.py", "--workdir", tmp_path, "--episodes", 2, which, "--", *flags)
    assert "success" in out

    trained = steps(tmp_path)
    assert [row["step"] for row in trained] == [2, 4, 6, 8]
    score = json.loads((tmp_path / "report/score.json").read_text())
    assert score["episodes"] == 2
    beside = {f"{name}_success_rate" for name in ("untrained", "swapped")} if baselines else set()
    assert set(score) == {"success_rate", "episodes", "per_task", "minutes", *beside}
    page = (tmp_path / "report/index.html").read_text()
    if baselines:
        assert "untrained" in page
        assert "swapped" in page
    # A finished run is evaluated again, not trained again.
    config = f"--config=configs/quickstart.py:{tmp_path / 'data/tabletop/1.0.0'}"
    run("launch/train.py", config, "--workdir", tmp_path, *flags)
    assert steps(tmp_path) == trained
