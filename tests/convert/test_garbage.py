"""What cannot be converted is refused with everything that is wrong, and nothing is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import convert
from vla_jax.convert import output

TINY = Path(__file__).parents[1] / "fixtures" / "hf_kosmos2"
ROBO = Path(__file__).parents[1] / "fixtures" / "robokosmos_lstm_post" / "config.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(TINY, tmp_path / "hf")
    return tmp_path / "hf"


def refused(capsys, out: Path, *arguments) -> str:
    assert convert.main([str(a) for a in (*arguments, out)]) == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))  # nothing beside it either
    return text


def test_the_whole_key_report(folder, tmp_path, capsys):
    tensors = load_file(folder / "model.safetensors")
    norm = "text_model.model.layer_norm.bias"
    del tensors[norm]
    tensors["surprise"] = np.zeros(1, np.float32)
    tensors["vision_model.model.embeddings.class_embedding"] = np.zeros(7, np.float32)
    tensors["text_model.model.layer_norm.weight"] = np.zeros(64, np.int8)
    embedding = tensors["text_model.model.embed_tokens.weight"]
    tensors["text_model.lm_head.weight"] = embedding + 1
    save_file(tensors, folder / "model.safetensors")
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    for line in (
        f"1 missing:\n  {norm} [64]",
        "1 unexpected:\n  surprise",
        "1 of the wrong shape:\n  vision_model.model.embeddings.class_embedding: [7]",
        "1 of a type that is not floating point:\n  text_model.model.layer_norm.weight: int8",
        "1 aliases that differ from their original:\n  text_model.lm_head.weight",
    ):
        assert line in text


def test_truncated_file(folder, tmp_path, capsys):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "model.safetensors: not a whole safetensors file (truncated" in text


def test_wrong_architecture(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip-2"}))
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "no config here for a VLM of type 'blip-2'" in text
    named = f"--config={Path(convert.CONFIGS) / 'kosmos_ph.py'}"
    text = refused(capsys, tmp_path / "out", "import-hf", named, folder)
    assert "the files are of 'blip-2', expected 'kosmos-2'" in text
    config["text_config"]["ffn_dim"] = 999
    (folder / "config.json").write_text(json.dumps(config))
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "ffn.fc1.weight: [128, 64], expected [999, 64]" in text


def test_missing_parts(folder, tmp_path, capsys):
    assert "config.json" in refused(capsys, tmp_path / "out", "import-hf", tmp_path / "nowhere")
    (folder / "config.json").write_text("<html>")
    assert "config.json" in refused(capsys, tmp_path / "out", "import-hf", folder)
    shutil.copy(TINY / "config.json", folder)
    (folder / "model.safetensors").unlink()
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "holds neither model.safetensors nor model.safetensors.index.json" in text


def test_config_mistakes(folder, tmp_path, capsys):
    text = refused(capsys, tmp_path / "out", "import-hf", "--set=model.head.hiden=3", folder)
    assert "model.head.hiden" in text
    text = refused(capsys, tmp_path / "out", "import-hf", "--config=none.py", folder)
    assert "none.py: no Python file" in text


def test_robovlms_files(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 cut short")
    text = refused(capsys, tmp_path / "out", "import-robovlms", tmp_path / "x.pt", ROBO)
    assert "x.pt: truncated" in text
    text = refused(
        capsys, tmp_path / "out", "import-robovlms", tmp_path / "x.pt", TINY / "config.json"
    )
    assert "no config of RoboVLMs' policies" in text


def test_no_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    text = refused(capsys, tmp_path / "out", "export-hf", tmp_path / "empty")
    assert "holds neither checkpoints/ nor numbered steps" in text
    text = refused(capsys, tmp_path / "out.pt", "export-robovlms", tmp_path / "gone")
    assert "no such folder" in text


def test_what_is_there_stays(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert convert.main(["import-hf", str(folder), str(out)]) == 1
    assert "exists; choose another OUT or add --overwrite" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    def fail(overwrite):
        with output.whole(out, overwrite) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    out = tmp_path / "out"
    for overwrite in (False, True):
        with pytest.raises(RuntimeError):
            fail(overwrite)
        assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])
        out.mkdir(exist_ok=True)
        (out / "old").write_text("old")
    with output.whole(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "old").exists()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_check_writes_nothing(folder, tmp_path, capsys):
    assert convert.main(["import-hf", str(folder), str(tmp_path / "out"), "--check"]) == 0
    assert "all of it fits" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
