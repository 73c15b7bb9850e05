"""OpenVLA's and OpenVLA-OFT's folders in and out, to the bit: parts, adapters, statistics."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import openvla_libero, openvla_oft_libero
from configs.tiny import ARCHS
from vla_jax.config import ConfigError, resolve
from vla_jax.convert.formats import torch_write
from vla_jax.convert.formats.torch_read import TorchFile
from vla_jax.convert.importing import from_hf, shapes_of
from vla_jax.convert.openvla import names
from vla_jax.convert.openvla.exporting import to_openvla
from vla_jax.convert.openvla.importing import from_openvla
from vla_jax.convert.start import Start
from vla_jax.convert.store import Stored
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.inference.policy import Policy
from vla_jax.models import vla
from vla_jax.models.weights import WeightError

SUITE = "libero_spatial_no_noops"
# Room for 256 ids of actions below the 64 rows that pad a vocabulary.
TEXT = {**ARCHS["prismatic"]["text_config"], "vocab_size": 400}
HEADS = {"featurizer": {"num_attention_heads": 2}, "fused_featurizer": {"num_attention_heads": 2}}
MODULE = "vision_backbone.featurizer.blocks.0.block.attn.qkv"


def raw_config(kind: str = "oft") -> dict[str, Any]:
    """What a user writes: sizes come from the folder but for the towers' heads."""
    c = (openvla_oft_libero if kind != "base" else openvla_libero).get_config("none")
    with c.unlocked():
        c.model.backbone.arch = {**HEADS, "image_crop": 0.9}
        c.model.structure.cameras = ("primary",)
    return c.to_dict()


def statistics(dim: int = 7) -> dict[str, Any]:
    rng = np.random.default_rng(3)

    def columns(size: int) -> dict[str, list[float]]:
        x = np.sort(rng.normal(size=(4, size)), axis=0)
        rows = dict(zip(("min", "q01", "q99", "max"), x.tolist(), strict=True))
        return {"mean": [0.0] * size, "std": [1.0] * size, **rows}

    action = columns(dim) | {"mask": [True] * (dim - 1) + [False]}
    counts = {"num_transitions": 9, "num_trajectories": 2}
    return {SUITE: {"action": action, "proprio": columns(8), **counts}}


@functools.cache
def tensors(kind: str) -> dict[str, np.ndarray]:
    """Every tensor of a policy by its name in the weight map."""
    raw = raw_config(kind)
    raw["model"]["backbone"]["arch"] = {
        **ARCHS["prismatic"], "text_config": TEXT, "film": kind == "film"
    }  # fmt: skip
    raw["model"]["head"] |= {"hidden": 16}
    config = resolve(raw).model
    model = vla.build(config)
    backbone = dataclasses.replace(model.config.backbone, arch=model.arch)
    rows, _ = names.rows(dataclasses.replace(model.config, backbone=backbone))
    ours, rng, collected = shapes_of(model), np.random.default_rng(0), {}
    for row in rows:
        shapes = [ours[path][1:] if row.stacked else ours[path] for path in row.targets]
        for name in row.expand(ours[row.targets[0]][0] if ours[row.targets[0]] else 0):
            shape = row.join([np.broadcast_to(np.int8(0), shape) for shape in shapes]).shape
            collected[name] = rng.normal(size=shape).astype(np.float32)
    return collected


def save_torch(path: Path, state: dict[str, np.ndarray]) -> None:
    shapes = {name: x.shape for name, x in state.items()}
    dtypes = {name: x.dtype for name, x in state.items()}
    torch_write.write(path, shapes, dtypes, {}, lambda: iter(state.items()), wrapper="")


def write(folder: Path, kind: str, wrapped: str = "module.") -> None:
    """A folder as the original's training leaves it."""
    folder.mkdir()
    result, parts = tensors(kind), {}
    for part in (names.HEAD, names.STATE):
        separate = [name for name in result if name.startswith(f"{part}/")]
        parts[part] = {wrapped + name.split("/")[1]: result[name] for name in separate}
    vision = {name: x for name, x in result.items() if name.startswith(f"{names.VISION}." * 2)}
    parts[names.VISION] = {name.removeprefix(f"{names.VISION}."): x for name, x in vision.items()}
    for part, state in parts.items():
        if state:
            save_torch(folder / f"{part}--150000_checkpoint.pt", state)
    main = {name: x for name, x in result.items() if "/" not in name and name not in vision}
    for name, x in vision.items():  # a folder with FiLM has the plain towers as well
        if ".scale." not in name and ".shift." not in name:
            plain = name.removeprefix(f"{names.VISION}.").replace(".block.", ".")
            main[plain] = np.zeros_like(x)
    save_file(main, folder / "model.safetensors")
    config = {"model_type": "openvla", "auto_map": {"AutoConfig": "code.Config"}}
    config |= {"arch_specifier": "no-align+fused-gelu-mlp", "text_config": TEXT}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this must not run')")
    words = "In: What action should the robot take to lift it? Out:"
    (folder / "tokenizer.json").write_text(Tokenizer.build([words], 64).to_json())
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics()))
    processor = {"means": [[0.1, 0.2, 0.3], [0.5] * 3], "stds": [[0.2] * 3, [0.5] * 3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def imported(folder: Path, out: Path, kind: str) -> Any:
    result = from_openvla(folder, raw_config(kind))
    result.save(out, overwrite=False)
    return result


class Made(NamedTuple):
    """A folder of a kind, and what it was imported as."""

    folder: Path
    run: Path
    found: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("openvla")

    @functools.cache
    def make(kind: str) -> Made:
        write(root / kind, kind)
        out = root / f"{kind}_run"
        return Made(root / kind, out, imported(root / kind, out, kind))

    return make


def read_back(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    for path in folder.glob("*.pt"):
        file = TorchFile(path)
        files[path.name] = {name: file.read(name) for name in file.shapes}
    return files


@pytest.mark.parametrize("kind", ["base", "oft", "film"])
def test_in_and_out_to_the_bit(made, tmp_path, kind):
    folder, run, result = made(kind)
    assert not result.fresh
    to_openvla(Stored(run), tmp_path / "out")
    before, after = read_back(folder), read_back(tmp_path / "out")
    assert before.keys() == after.keys()
    for file, state in before.items():
        assert state.keys() == after[file].keys(), file
        for name, x in state.items():
            # The plain towers of a model with FiLM are those inside its own.
            if not (kind == "film" and file == "model.safetensors" and "vision" in name):
                assert np.array_equal(after[file][name], x), name
    written = json.loads((tmp_path / "out/dataset_statistics.json").read_text())
    assert written == statistics()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not {"film", "featurizer", "image_crop"} & config.keys()
    if kind != "film":  # which has all that the others have
        return
    again = from_openvla(tmp_path / "out", raw_config(kind))
    for path, leaf in result.leaves.items():
        assert np.array_equal(again.leaves[path].read(), leaf.read()), path


def test_what_the_folder_says_becomes_the_config(made):
    findings = made("oft").found
    arch = findings.config.model.backbone.arch
    assert arch["featurizer"]["registers"] == 4
    assert arch["means"] == [[0.1, 0.2, 0.3], [0.5] * 3]
    assert (arch["image_crop"], findings.config.model.head.hidden) == (0.9, 16)
    units, entry = PolicyUnits.from_json(findings.meta["units"][SUITE]), statistics()[SUITE]
    assert list(units.actions.first) == entry["action"]["q01"]
    assert list(units.state.second) == entry["proprio"]["q99"]
    assert not units.actions.mask[-1]
    assert units.gripper is not None


def test_an_imported_policy_acts_in_the_robots_units(made):
    policy = Policy.from_checkpoint(made("oft").run, dataset=SUITE)
    image = np.zeros((40, 40, 3), np.uint8)
    obs = {key: image for key in policy.metadata["cameras"].values()}
    obs |= {"prompt": "Lift it", "observation/state": np.zeros(8)}
    policy.check(obs)
    reply, _ = policy.infer(policy.new_session(), obs)
    assert reply["actions"].shape == (8, 7)
    assert np.isfinite(reply["actions"]).all()
    # LIBERO's gripper: -1 opens, 1 closes.
    assert (np.abs(reply["actions"][:, -1]) <= 1).all()


def test_import_hf_reads_the_same_vlm(made):
    raw = raw_config("base")
    raw["model"]["backbone"]["arch"] = HEADS
    folder, _, result = made("base")
    again = from_hf(folder, raw)
    assert again.leaves.keys() == result.leaves.keys()
    for path, leaf in result.leaves.items():
        assert np.array_equal(again.leaves[path].read(), leaf.read()), path


def test_factors_beside_film_are_added_and_written_as_zeros(made, tmp_path):
    weights = tensors("film")
    shutil.copytree(made("film").folder, tmp_path / "in")
    path = next((tmp_path / "in").glob("vision_backbone--*.pt"))
    file, rng = TorchFile(path), np.random.default_rng(1)
    state = {name: file.read(name) for name in file.shapes}
    a, b = rng.normal(size=(2, 32)), rng.normal(size=(96, 2))
    plain = state.pop(f"{MODULE}.weight")
    state[f"{MODULE}.base_layer.weight"] = plain
    state[f"{MODULE}.base_layer.bias"] = state.pop(f"{MODULE}.bias")
    state[f"{MODULE}.lora_A.default.weight"] = a.astype(np.float32)
    state[f"{MODULE}.lora_B.default.weight"] = b.astype(np.float32)
    save_torch(path, state)
    imported(tmp_path / "in", tmp_path / "run", "film")
    to_openvla(Stored(tmp_path / "run"), tmp_path / "out")
    after = read_back(tmp_path / "out")[path.name]
    assert after.keys() == state.keys()
    assert not after[f"{MODULE}.lora_B.default.weight"].any()
    # Of rank 2 alpha is 2, as in the original's training.
    expected = weights[f"vision_backbone.{MODULE}.weight"] + b @ a
    np.testing.assert_allclose(after[f"{MODULE}.base_layer.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_run_with_film_starts_from_a_vlm_without(made, caplog):
    raw = raw_config("film")
    raw["model"]["backbone"]["arch"] = {"film": True}
    config = resolve(raw).model
    start = Start(config, made("base").run)
    shapes = shapes_of(vla.build(config, start.arch()))
    loaded = start.load(shapes, lambda _, x: x)
    left = {path for path in shapes if path not in loaded}
    assert {path.split("/")[-2] for path in left if "vision" in path} == {
        "film_scale",
        "film_shift",
    }
    assert "film_scale" in caplog.text
    assert not any(path.startswith("backbone/text") for path in left)


def test_a_trained_run_is_written_with_its_own_units(made, tmp_path):
    findings = made("oft").found
    units = dict(findings.meta["units"][SUITE])
    units["actions"] = {**units["actions"], "first": [-7.0] * 7}
    measured = {SUITE: {**statistics()[SUITE], "chunks": {}}}
    meta = {**findings.meta, "statistics": measured, "units": {SUITE: units}}
    dataclasses.replace(findings, meta=meta).save(tmp_path / "run", overwrite=False)
    to_openvla(Stored(tmp_path / "run"), tmp_path / "out")
    entry = json.loads((tmp_path / "out/dataset_statistics.json").read_text())[SUITE]
    assert entry["action"]["q01"] == [-7.0] * 7
    assert entry["action"]["q99"] == statistics()[SUITE]["action"]["q99"]
    assert "chunks" not in entry
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["norm_stats"][SUITE] == entry


def test_an_adapter_alone_is_added_to_its_base(made, tmp_path):
    weights = tensors("base")
    folder, name = tmp_path / "tuned", "language_model.model.layers.0.mlp.up_proj"
    (folder / "lora_adapter").mkdir(parents=True)
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((4, 32), (48, 4)))
    root = f"base_model.model.{name}.lora_"
    factors = {f"{root}A.weight": a, f"{root}B.weight": b}
    save_file(factors, folder / "lora_adapter/adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 2, "base_model_name_or_path": "openvla/openvla-7b"}
    (folder / "lora_adapter/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="--base=DIR"):
        from_openvla(folder, raw_config("base"))
    result = from_openvla(folder, raw_config("base"), base=made("base").folder)
    kernel = result.leaves["backbone/text/layers/mlp/up/kernel"].read()[0]
    expected = weights[f"{name}.weight"] + 0.5 * b @ a
    np.testing.assert_allclose(kernel, expected.T, rtol=1e-5, atol=1e-5)


def test_one_report_of_all_files(made, tmp_path):
    weights = tensors("oft")
    shutil.copytree(made("oft").folder, tmp_path / "in")
    path = next((tmp_path / "in").glob("action_head--*.pt"))
    state = {name.split("/")[1]: x for name, x in weights.items() if name.startswith(names.HEAD)}
    del state["model.fc2.bias"]
    save_torch(path, state | {"model.extra": np.zeros(2, np.float32)})
    main = load_file(tmp_path / "in/model.safetensors")
    main["projector.fc3.bias"] = np.zeros(5, np.float32)
    save_file(main, tmp_path / "in/model.safetensors")
    with pytest.raises(WeightError) as error:
        from_openvla(tmp_path / "in", raw_config())
    for words in ("fc2.bias [7]", "action_head/model.extra", "projector.fc3.bias: [5]"):
        assert words in str(error.value)


def test_mistakes_are_named(made, tmp_path):
    with pytest.raises(WeightError, match="no such folder"):
        from_openvla(tmp_path / "none", raw_config())
    shutil.copytree(made("oft").folder, tmp_path / "in")
    (tmp_path / "in/action_head--2_checkpoint.pt").write_bytes(b"")
    with pytest.raises(WeightError, match="several files of action_head"):
        from_openvla(tmp_path / "in", raw_config())
    (tmp_path / "in/action_head--2_checkpoint.pt").rename(
        tmp_path / "in/noisy_action_projector--2_checkpoint.pt"
    )
    with pytest.raises(ConfigError, match="diffusion"):
        from_openvla(tmp_path / "in", raw_config())
    raw = raw_config()
    raw["model"]["backbone"] = {"name": "llava", "hf_dir": "", "arch": {}}
    with pytest.raises(ConfigError, match="OpenVLA is 'prismatic'"):
        from_openvla(tmp_path / "in", raw)
