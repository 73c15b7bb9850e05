"""What cannot be converted is refused with everything that is wrong, and nothing is written."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import convert
from vla_jax.convert import output, store
from vla_jax.convert.tensors import Lazy
from vla_jax.models.weights import WeightError

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
    tensors["vision_model.model.embeddings.position_ids"] = np.arange(5)
    half = "text_model.model.layers.1.ffn.fc1.bias"
    tensors[half] = tensors[half].astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    for line in (
        f"1 missing:\n  {norm} [64]",
        "1 unexpected:\n  surprise",
        "1 of the wrong shape:\n  vision_model.model.embeddings.class_embedding: [7]",
        "1 of a type that is not floating point:\n  text_model.model.layer_norm.weight: int8",
        "1 aliases that differ from their original:\n  text_model.lm_head.weight",
        "unused, they carry nothing:\n  vision_model.model.embeddings.position_ids",
        "1 of a type that would change:\n  text_model.model.layers.{}.ffn.fc1.bias: float16 -> ",
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
    assert "no backbone is a VLM of type 'blip-2'" in text
    named = "--config=kosmos_ph"
    text = refused(capsys, tmp_path / "out", "import-hf", named, folder)
    assert "the files are of 'blip-2', expected 'kosmos-2'" in text
    config["text_config"]["ffn_dim"] = 999
    (folder / "config.json").write_text(json.dumps(config))
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "ffn.fc1.weight: [128, 64], expected [999, 64]" in text


def test_missing_parts(folder, tmp_path, capsys):
    text = refused(capsys, tmp_path / "out", "import-hf", tmp_path / "nowhere")
    assert "nowhere: no such file or folder" in text
    (folder / "config.json").write_text("<html>")
    assert "config.json" in refused(capsys, tmp_path / "out", "import-hf", folder)
    shutil.copy(TINY / "config.json", folder)
    (folder / "model.safetensors").unlink()
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "holds neither model.safetensors nor model.safetensors.index.json" in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<html>", "is a web page"),
        ("[]", "expected an object, found list"),
        ('{"model_type": "kosmos-2", "vision_config": 7}', "vision_config: expected a group"),
        (
            '{"model_type": "kosmos-2", "latent_query_num": "64"}',
            "no model can be made of its architecture",
        ),
        ('{"text_config": {"layers": null}}', "no model can be made of its architecture"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_garbage_for_a_config(folder, tmp_path, capsys, text, told):
    (folder / "config.json").write_text(text)
    named = "--config=kosmos_ph"
    assert told in refused(capsys, tmp_path / "out", "import-hf", named, folder)


def header(entries: dict | str) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape, start, stop) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "the file is empty"),
        (b"\xff" * 64, "truncated, or of another format"),
        (header("[" * 100_000), "recursion"),
        (header("{not json"), "Expecting property name"),
        (header("[1, 2]"), "not a whole safetensors file"),
        (header({"a": entry([2.0], 0, 8)}) + bytes(8), r"[2.0] at [0, 8] cannot be"),
        (header({"a": entry([-1, -2], 0, 8)}) + bytes(8), "cannot be"),
        (header({"a": entry([2**62, 4], 0, 0)}), "cannot be"),
        (header({"a": {"dtype": "F32", "shape": 3}}), "not a whole safetensors file"),
        (header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}) + bytes(12), "overlap"),
        (header({"a": entry([2], 8, 16)}) + bytes(16), "leave bytes between"),
        (header({"a": entry([2], 0, 8)}) + bytes(9), "behind them"),
    ],
)
def test_garbage_for_weights(folder, tmp_path, capsys, data, told):
    (folder / "model.safetensors").write_bytes(data)
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "model.safetensors: " in text
    assert told in text


def test_shards(folder, tmp_path, capsys):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").rename(folder / "whole.bin")
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {n: file for file, part in parts.items() for n in part}
    where = folder / "model.safetensors.index.json"
    where.write_text(json.dumps({"weight_map": index | {"gone": "a.safetensors", "far": "c"}}))
    (folder / "b.safetensors").unlink()
    text = refused(capsys, tmp_path / "out", "import-hf", folder)
    assert "b.safetensors: No such file" in text
    assert f"{folder / 'c'}: No such file" in text
    for wrong, message in (
        ({"weight_map": {"a": "../a.safetensors"}}, "outside its folder: ['../a.safetensors']"),
        ({"weight_map": {"a": 5}}, "5: No such file"),
        ({"map": {}}, "not an index of shards"),
    ):
        where.write_text(json.dumps(wrong))
        assert message in refused(capsys, tmp_path / "out", "import-hf", folder)


def test_every_part_of_our_own_folders(folder, tmp_path, capsys):
    """Faults of the VLM and of the policy beside it are told at once."""
    small = ("--set=model.head.hidden=8", "--set=model.structure.window=2")
    run, ours = tmp_path / "run", tmp_path / "ours"
    assert convert.main(["import-hf", str(folder), str(run), *small]) == 0
    assert convert.main(["export-hf", str(run), str(ours)]) == 0
    assert "0 changed" not in capsys.readouterr().err
    for file in ("model.safetensors", "policy_head.safetensors"):
        tensors = load_file(ours / file)
        save_file({**tensors, f"surprise in {file}": np.zeros(1, np.float32)}, ours / file)
    text = refused(capsys, tmp_path / "out", "import-hf", ours)
    assert "the VLM:\n1 unexpected:\n  surprise in model.safetensors" in text
    assert "policy_head.safetensors:\n1 unexpected:\n  surprise in policy_head" in text
    settings = json.loads((ours / "vla_config.json").read_text())
    for wrong, message in (
        ({**settings, "format": 99}, "format 99, this version"),
        ({"format": 1}, "['config', 'action_specs'] missing"),
        ({**settings, "config": {**settings["config"], "surprise": 1}}, "surprise"),
    ):
        (ours / "vla_config.json").write_text(json.dumps(wrong))
        assert message in refused(capsys, tmp_path / "out", "import-hf", ours)


def test_damaged_checkpoints(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert convert.main(["import-hf", str(folder), str(run), "--set=model.head.hidden=8"]) == 0
    capsys.readouterr()
    largest = max((p for p in run.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    refused(capsys, tmp_path / "out", "export-hf", run)
    refused(capsys, tmp_path / "out.pt", "export-robovlms", run)


def test_what_is_replaced_stays_until_the_new_one_is_whole(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    (folder / "model.safetensors").write_bytes(b"")
    assert convert.main(["import-hf", str(folder), str(out), "--overwrite"]) == 1
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert not list(tmp_path.glob(".out.*"))


def test_config_mistakes(folder, tmp_path, capsys):
    text = refused(capsys, tmp_path / "out", "import-hf", "--set=model.head.hiden=3", folder)
    assert "model.head.hiden" in text
    text = refused(capsys, tmp_path / "out", "import-hf", "--config=none.py", folder)
    assert "none.py: no such file" in text


def test_robovlms_files(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 cut short")
    text = refused(capsys, tmp_path / "out", "import-robovlms", tmp_path / "x.pt", ROBO)
    assert "x.pt: truncated" in text
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(shutil.rmtree, protocol=2))
    text = refused(capsys, tmp_path / "out", "import-robovlms", tmp_path / "x.pt", ROBO)
    assert "contains pickled code, shutil.rmtree; nothing of it was run" in text
    text = refused(
        capsys, tmp_path / "out", "import-robovlms", tmp_path / "x.pt", TINY / "config.json"
    )
    assert "config.json: no config of RoboVLMs' policies" in text


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


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, wrong):
    array = np.array([0, wrong], np.float32)
    leaves = {"head/kernel": Lazy(array.shape, array.dtype, lambda: array)}
    meta = {"config": {}, "statistics": {}, "action_specs": {}, "tokenizer": ""}
    with pytest.raises(WeightError, match=r"head\.kernel: the weights hold numbers that are not"):
        store.write(tmp_path, leaves, meta)
