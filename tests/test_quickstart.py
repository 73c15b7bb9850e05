"""The whole way, very small: demonstrations, training, serving, rollout, report."""

import json
import subprocess
import sys
from pathlib import Path

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


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_demo(tmp_path):
    run("launch/record_demos.py", "--out", tmp_path / "data/tabletop/1.0.0", "--episodes", 50)
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    out = run("launch/demo.py", "--workdir", tmp_path, "--episodes", 2, "--", *flags)
    assert "success" in out

    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4, 6, 8}
    score = json.loads((tmp_path / "report/score.json").read_text())
    assert score["episodes"] == 2
    assert set(score) == {
        "success_rate",
        "episodes",
        "per_task",
        "untrained_success_rate",
        "swapped_success_rate",
        "minutes",
    }
    page = (tmp_path / "report/index.html").read_text()
    assert "untrained" in page
    assert "swapped" in page
    # What is there is used again: nothing is trained a second time.
    log = (tmp_path / "log.jsonl").read_bytes()
    run(
        "launch/train.py",
        "--config=configs/quickstart.py:" + str(tmp_path / "data/tabletop/1.0.0"),
        "--workdir",
        tmp_path,
        *flags,
    )
    assert (tmp_path / "log.jsonl").read_bytes() == log
