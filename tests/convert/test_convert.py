"""The four commands, end to end, on models of full structure and tiny size."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import convert
from tests.parity import golden, kosmos
from vla_jax.convert import store
from vla_jax.convert.formats import torch_write
from vla_jax.convert.formats.torch_read import TorchFile
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.inference.policy import Policy
from vla_jax.train import checkpoint
from vla_jax.train.checkpoint import load_params
from vla_jax.train.state import TrainState

FIXTURES = Path(__file__).parents[1] / "fixtures"
TIED = "text_model.lm_head.weight"
EMBEDDING = "text_model.model.embed_tokens.weight"
ROBO = sorted(p.parent for p in FIXTURES.glob("robokosmos*/model_params.json"))


def run(*arguments) -> int:
    return convert.main([str(a) for a in arguments])


def tokenizer() -> str:
    return Tokenizer.build(["<grounding>An image of a robot lift the block"], 64).to_json()


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "kosmos"
    shutil.copytree(FIXTURES / "hf_kosmos2", folder)
    (folder / "tokenizer.json").write_text(tokenizer())
    return folder


@pytest.fixture(scope="module")
def imported(vlm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "imported"
    small = ("--set=model.head.hidden=8", "--set=model.structure.window=2")
    assert run("import-hf", vlm, out, *small) == 0
    return out


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        k: v for f in sorted(folder.glob("model*.safetensors")) for k, v in load_file(f).items()
    }


def same_bytes(a, b):
    assert set(a) == set(b)
    assert all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def test_hugging_face_round_trip(vlm, imported, tmp_path, capsys):
    assert run("export-hf", imported, tmp_path / "out", "--max-shard-gb", "0.0003") == 0
    assert "peak RSS" in capsys.readouterr().out
    original, exported = tensors_of(vlm), tensors_of(tmp_path / "out")
    assert TIED not in original
    same_bytes(exported, {**original, TIED: original[EMBEDDING]})
    names = [line.split("\t")[0] for line in (vlm / "full_param_names.txt").open()]
    layers = {name for name in names if all(f"layers.{i}." not in name for i in range(2, 24))}
    assert set(exported) == layers
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == layers
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((vlm / "config.json").read_text())
    assert config.pop("torch_dtype") == before.pop("dtype") == "float32"
    assert config == before
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tokenizer()


@pytest.mark.slow
def test_a_policy_survives_the_round_trip(imported, tmp_path):
    meta = {**store.Stored(imported).meta}
    spec = {"dim": 7, "normalization": "none", "clip": 0.65, "low": [-1.0] * 6, "high": [1.0] * 6,
            "gripper_env": [-1.0, 1.0], "hz": 30.0}  # fmt: skip
    meta |= {"action_specs": {"calvin": spec}, "statistics": {"calvin": {"action": {}}}}
    meta.pop("format")
    (tmp_path / "run").mkdir()
    store.write(tmp_path / "run", store.Stored(imported).leaves, meta)
    assert run("export-hf", tmp_path / "run", tmp_path / "hf") == 0
    assert run("import-hf", tmp_path / "hf", tmp_path / "again") == 0
    first, second = (store.Stored(tmp_path / name) for name in ("run", "again"))
    same_bytes(*({p: leaf.read() for p, leaf in s.leaves.items()} for s in (first, second)))
    for key in ("action_specs", "statistics", "tokenizer"):
        assert second.meta[key] == first.meta[key]
    models = [s.meta["config"]["model"] for s in (first, second)]
    for model in models:
        del model["backbone"]["hf_dir"]
    assert models[0] == models[1]
    assert "calvin" in (tmp_path / "hf" / "README.md").read_text()
    assert Policy.from_checkpoint(tmp_path / "again").metadata["dataset"] == "calvin"


def test_without_the_source_folder(vlm, imported, tmp_path):
    """Tokenizer and processor are written from the checkpoint when there is nothing to copy."""
    stored = store.Stored(imported)
    stored.meta["config"]["model"]["backbone"]["hf_dir"] = str(tmp_path / "gone")
    from vla_jax.convert import exporting

    exporting.to_hf(stored, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<pad>"
    ours = Tokenizer.from_dir(tmp_path / "out")
    text = "<grounding>An image of a robot lift the block"
    expected = Tokenizer.from_json(tokenizer()).encode(text, 12)
    np.testing.assert_array_equal(ours.encode(text, 12)[0], expected[0])
    image = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert image["size"] == {"height": 28, "width": 28}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Kosmos2ForConditionalGeneration"]


@pytest.mark.slow
def test_types(vlm, imported, tmp_path, capsys):
    folder = tmp_path / "half"
    shutil.copytree(vlm, folder)
    halves = {k: v.astype(jnp.bfloat16) for k, v in tensors_of(vlm).items()}
    save_file(halves, folder / "model.safetensors")
    assert run("import-hf", folder, tmp_path / "a", "--set=model.head.hidden=8") == 0
    assert "types: all kept" in capsys.readouterr().out
    assert run("export-hf", tmp_path / "a", tmp_path / "b") == 0
    same_bytes(tensors_of(tmp_path / "b"), {**halves, TIED: halves[EMBEDDING]})
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    capsys.readouterr()
    assert run("export-hf", imported, tmp_path / "c", "--dtype=bfloat16") == 0
    assert "float32 -> bfloat16, rounded" in capsys.readouterr().out
    same_bytes(tensors_of(tmp_path / "c"), {**halves, TIED: halves[EMBEDDING]})


def robo_files(folder: Path, where: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A golden folder as the files RoboVLMs would have left: .pt, VLM folder."""
    tensors = {f"model.{k}": v for k, v in golden.weights(folder).items()}
    tied = f"model.backbone.{TIED}"
    aliases = {tied: f"model.backbone.{EMBEDDING}"} if tied in tensors else {}
    shapes = {k: v.shape for k, v in tensors.items()}
    dtypes = {k: v.dtype for k, v in tensors.items()}
    pairs = [(k, v) for k, v in tensors.items() if k not in aliases]
    torch_write.write(where / "x.pt", shapes, dtypes, aliases, lambda: iter(pairs))
    vlm = where / "vlm"
    vlm.mkdir()
    _, arch = kosmos.describe({}, {k.removeprefix("model."): v for k, v in tensors.items()})
    (vlm / "config.json").write_text(json.dumps(arch))
    (vlm / "tokenizer.json").write_text(tokenizer())
    return where / "x.pt", vlm, tensors


@pytest.mark.parametrize("folder", ROBO, ids=lambda p: p.name)
def test_robovlms_round_trip(folder, tmp_path):
    pt, vlm, tensors = robo_files(folder, tmp_path)
    config, run_dir = folder / "config.json", tmp_path / "run"
    assert run("import-robovlms", pt, config, run_dir, "--vlm", vlm) == 0
    assert run("export-robovlms", run_dir, tmp_path / "out.pt") == 0
    assert "import-robovlms out.pt CONFIG.json" in (tmp_path / "out.pt.md").read_text()
    file = TorchFile(tmp_path / "out.pt")
    assert file.wrapper == "state_dict"
    same_bytes({name: file.read(name) for name in file.shapes}, tensors)
    if folder is not ROBO[0]:
        return
    assert run("export-robovlms", run_dir, tmp_path / "out.safetensors", "--bare") == 0
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    same_bytes(load_file(tmp_path / "out.safetensors"), bare)
    policy = Policy.from_checkpoint(run_dir)
    keys = policy.metadata["cameras"].values()
    obs = {key: np.zeros((28, 28, 3), np.uint8) for key in keys} | {"prompt": "lift the block"}
    actions, _ = policy.infer(policy.new_session(), obs)
    assert actions["actions"].shape == (policy.metadata["chunk"], 7)


def test_trained_checkpoints_read_back_into_training(imported):
    """What an import wrote is what `Checkpoints.params` restores onto any mesh."""
    stored = store.Stored(imported)
    params = load_params(imported)
    flat = {"/".join(str(k.key) for k in path): x for path, x in jax.tree.leaves_with_path(params)}
    same_bytes({k: np.asarray(v) for k, v in flat.items()},
               {p: leaf.read() for p, leaf in stored.leaves.items()})  # fmt: skip
    with (
        checkpoint.Checkpoints(imported, read_only=True) as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match="weights alone"),
    ):
        checkpoints.restore(
            TrainState(step=0, trainable={}, frozen={}, ema={}, opt_state={}, rng=None)
        )
