"""The originals load what we export, hold the same tensors and give the same actions.

Each runs in a Python of its own, which an environment variable names:

    VLA_JAX_OPENPI_PYTHON   openpi at 15a9616 with its pinned jax 0.5.3, flax 0.10.2, orbax 0.11.13
    VLA_JAX_LEROBOT_PYTHON  lerobot[smolvla] 0.6.1
    VLA_JAX_OPENVLA_PYTHON  openvla at c8f03f4, the folder prismatic/extern/hf alone; transformers
                            4.40.1, timm 0.9.10, tokenizers 0.19.1
    VLA_JAX_OFT_PYTHON      openvla-oft at 213c5ff without its __init__ files, diffusers, and
                            in transformers the modeling_llama.py of its fork, bc339d9

    VLA_JAX_LEROBOT_PYTHON=lerobot/bin/python pytest -m slow tests/originals -s

The models are small ones of the originals' own classes, made from a config; nothing is downloaded.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, openvla_libero, openvla_oft_libero, smolvla
from launch import convert
from tests.parity import openvla, pi0, pi0fast
from vla_jax.convert.lerobot.importing import from_lerobot
from vla_jax.convert.openpi.importing import from_openpi
from vla_jax.convert.openvla.importing import from_openvla
from vla_jax.data.language.prompts import Writer
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models import image, vla
from vla_jax.rules import unflatten
from vla_jax.types import Observation

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
# Of sampled actions, whose values are about 1 to 3.
TOLERANCE = 5e-4


def side(name: str, modules: str, *arguments: Any, script: str = "") -> None:
    """Run a script, NAME_side.py, in the Python that has the original.

    Skips the test where no Python is named, or where it cannot import the modules.
    """
    variable = f"VLA_JAX_{name.upper()}_PYTHON"
    python = os.environ.get(variable, "")
    if not python:
        pytest.skip(f"{variable} names no Python with {modules}")
    tried = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"{variable}: cannot import {modules}: {tried.stderr.strip().splitlines()[-1]}")
    command = [python, HERE / (script or f"{name}_side.py"), *map(str, arguments)]
    # Neither may look for anything on a hub; flags for our jax are none of an older one's, whose
    # cache of compiled programs has given wrong random numbers.
    settings = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    settings |= {"XLA_FLAGS": "", "PYTHONPATH": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **settings}, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-4000:]


def run_convert(*arguments: Any) -> None:
    assert convert.main([str(a) for a in arguments]) == 0


def params_of(imported: Any) -> dict[str, Any]:
    return unflatten({path: jnp.asarray(leaf.read()) for path, leaf in imported.leaves.items()})


def sampled(imported: Any, seen: Observation, noise: np.ndarray) -> np.ndarray:
    model = vla.build(imported.config.model)
    start = jnp.asarray(noise)
    run: Any = jax.jit(lambda p: model.apply({"params": p}, seen, start, method="sample"))
    return np.asarray(run(params_of(imported)))


def show(what: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, which is printed beside the largest value."""
    result = float(np.abs(ours - theirs).max())
    print(f"\n{what}: actions differ by {result:.1e}, of values up to {np.abs(theirs).max():.1f}")
    return result


# ---- openpi

# pi0-FAST in the sizes of openpi_side.py, as the parity runner has them.
FAST: dict[str, Any] = {
    "paligemma": {
        "width": 64, "depth": 4, "mlp_dim": 128, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16,
    },
    "siglip": {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768, "patch_size": (14, 14)},
    "vocab_size": 1024, "image_resolution": (224, 224), "action_dim": 8, "action_horizon": 6,
    "cameras": (0, 1, 2), "max_decoding_steps": 12,
}  # fmt: skip


def openpi_config(kind: str) -> dict[str, Any]:
    """Ours of the sizes in openpi_side.py; what the tensors tell is left to them."""
    raw = base.get_config().to_dict()
    raw["data"] |= {"datasets": ({"spec": "tiny", "dir": "none"},), "units": "openpi_quantile"}
    model = raw["model"]
    model["backbone"] = {"name": "paligemma", "hf_dir": "", "arch": {}}
    model["structure"] |= {
        "kind": "expert", "window": 1, "chunk": 6, "text_len": 20, "proprio": 8,
        "cameras": tuple(pi0.CAMERAS.values()),
    }  # fmt: skip
    model |= {"action_dim": 8, "dtype": "float32", "remat": "none"}
    if kind == "fast":
        model["structure"] |= {"kind": "discrete", "cameras": pi0fast.CAMERAS}
        model["head"] |= {"kind": "fast", "gripper": "number"}
        model["fast"]["length"] = 12
        return raw
    model["head"] |= {"kind": "expert_flow", "gripper": "number"}
    model["expert"]["adaptive"] = kind == "pi05"
    model["expert"]["state"] = "none" if kind == "pi05" else "expert"
    return raw


def through_openpi(kind: str, folder: Path) -> tuple[Any, dict[str, np.ndarray], np.ndarray, str]:
    """Openpi's own model, in and out of ours and into openpi again.

    Returns:
        what was imported; the observations; what openpi makes of the export; a line about it.
    """
    modules, out = "openpi.models.model", folder / "out.npz"
    side("openpi", modules, "make", kind, folder)
    imported = from_openpi(folder, openpi_config(kind))
    imported.save(folder / "run", overwrite=False)
    run_convert("export-openpi", folder / "run", folder / "exported")
    side("openpi", modules, "load", kind, folder, folder / "exported", out)
    reference = np.load(out)
    report = json.loads(str(reference["report"]))
    assert report["differing"] == []
    line = f"openpi on jax {report['jax']}, {kind}, {report['tensors']} tensors to the bit"
    return imported, dict(np.load(folder / "io.npz")), reference["actions"], line


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_openpi_loads_its_parameters_again(kind, tmp_path):
    imported, io, reference, line = through_openpi(kind, tmp_path)
    observation = pi0.observation(io, vla.build(imported.config.model).image.size)
    assert show(line, sampled(imported, observation, io["sample/noise"]), reference) < TOLERANCE


def test_openpi_loads_pi0_fast_again(tmp_path):
    imported, io, reference, line = through_openpi("fast", tmp_path)
    arch = imported.config.model.backbone.arch
    written = pi0fast.model_config(FAST, io["obs/tokenized_prompt"].shape[1])
    written = dataclasses.replace(
        written, backbone=dataclasses.replace(written.backbone, arch=arch)
    )
    model: Any = vla.build(written)
    text = io["obs/tokenized_prompt"], io["obs/tokenized_prompt_mask"]
    observation = pi0fast.observation(io, model.image.size, text)
    run: Any = jax.jit(
        lambda p: model.apply({"params": p}, observation, jax.random.key(0), method="write")
    )
    ours = np.asarray(run(params_of(imported)))
    print(f"\n{line}: {ours.size} tokens written, {(ours != reference).sum()} differ")
    np.testing.assert_array_equal(ours, reference)


# ---- LeRobot


def smolvla_config(vlm: Path) -> dict[str, Any]:
    """Ours of the sizes in lerobot_side.py, whose VLM's config.json says its own."""
    raw = smolvla.get_config("tiny:none").to_dict()
    model, sizes = raw["model"], json.loads((vlm / "config.json").read_text())
    text = {
        k: v for k, v in sizes["text_config"].items() if k.startswith(("num_", "vocab", "hidden"))
    }
    text |= {k: sizes["text_config"][k] for k in ("head_dim", "intermediate_size", "rms_norm_eps")}
    text.pop("hidden_act", None)
    vision = sizes["vision_config"]
    model["backbone"]["arch"] = {
        "scale_factor": sizes["scale_factor"],
        "text_config": {**text, "rope_theta": 10000.0},
        "vision_config": {
            k: vision[k]
            for k in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "patch_size", "image_size",
            )
        },
    }  # fmt: skip
    model["structure"] |= {"chunk": 8}
    model["expert"] |= {"width": 36, "hidden": 256}
    model |= {"dtype": "float32", "remat": "none"}
    return raw


def test_lerobot_loads_its_policy_again(tmp_path):
    modules = "lerobot.policies.smolvla.modeling_smolvla, transformers, num2words"
    side("lerobot", modules, "make", tmp_path)
    policy, vlm = tmp_path / "policy", tmp_path / "vlm"
    imported = from_lerobot(policy, smolvla_config(vlm), vlm)
    imported.save(tmp_path / "run", overwrite=False)
    run_convert("export-lerobot", tmp_path / "run", tmp_path / "exported")
    out = tmp_path / "out.npz"
    side("lerobot", modules, "load", tmp_path, tmp_path / "exported", out)
    reference, io = np.load(out), dict(np.load(tmp_path / "io.npz"))
    report = json.loads(str(reference["report"]))
    assert report["differing"] == []
    assert report["settings"] == {}
    np.testing.assert_array_equal(reference["ours/ids"], reference["theirs/ids"])
    np.testing.assert_array_equal(reference["ours/actions"], reference["theirs/actions"])
    # And ours, from the pixels, the words and the robot's numbers to the robot's numbers.
    model: Any = vla.build(imported.config.model)
    units = PolicyUnits.from_json(imported.meta["units"]["tiny"])
    write = Writer(Tokenizer.from_json(imported.meta["tokenizer"]), 48, "", "smolvla")
    texts = [write(str(task), None) for task in io["tasks"]]
    ids, mask = (np.stack(parts) for parts in zip(*texts, strict=True))
    length = reference["theirs/ids"].shape[1]
    np.testing.assert_array_equal(ids[:, :length], reference["theirs/ids"])
    cameras = [k for k in io if k.startswith("observation.images")]
    images = {
        ours: image.preprocess(jnp.asarray(np.moveaxis(io[name], 1, -1)), model.image)[:, None]
        for ours, name in zip(("primary", "wrist"), cameras, strict=True)
    }
    state = units.prepare_state(io["observation.state"]).astype(np.float32)
    observed = Observation(
        images=images,
        image_mask={name: jnp.ones((2, 1), bool) for name in images},
        text=jnp.asarray(ids[:, :length].astype(np.int32)),
        text_mask=jnp.asarray(mask[:, :length]),
        proprio=jnp.asarray(state)[:, None],
    )
    ours = units.restore(sampled(imported, observed, io["noise"]), io["observation.state"])
    text = f"LeRobot {report['lerobot']}, SmolVLA, {report['tensors']} tensors to the bit"
    assert show(text, ours, reference["ours/actions"]) < TOLERANCE


# ---- OpenVLA and OpenVLA-OFT

SUITE = "libero_spatial_no_noops"


def openvla_config(kind: str) -> dict[str, Any]:
    """Ours; sizes come from the folder but for the towers' heads."""
    c = (openvla_oft_libero if kind == "oft" else openvla_libero).get_config("none")
    with c.unlocked():
        heads = {"featurizer": 4, "fused_featurizer": 3}
        arch: dict[str, Any] = {k: {"num_attention_heads": n} for k, n in heads.items()}
        c.model.backbone.arch = {**arch, "image_crop": 1.0}
        c.model.structure.cameras = ("primary",)
        c.model.update({"dtype": "float32", "remat": "none"})
        # A random model's likeliest ids are no actions, which the original then reads as the ends.
        c.model.head.parity = {"vocabulary": "all"}
    return c.to_dict()


@pytest.mark.parametrize("kind", ["base", "oft"])
def test_openvla_loads_its_folder_again(kind, tmp_path):
    name = "oft" if kind == "oft" else "openvla"
    modules = "prismatic.extern.hf.modeling_prismatic"
    folder, out = tmp_path / "theirs", tmp_path / "out.npz"
    folder.mkdir()
    side(name, modules, "make", kind, folder, script="openvla_side.py")
    # Theirs brings no words, of which none is read here.
    (folder / "tokenizer.json").write_text(Tokenizer.build(["In: Out:"], 64).to_json())
    imported = from_openvla(folder, openvla_config(kind))
    imported.save(tmp_path / "run", overwrite=False)
    run_convert("export-openvla", tmp_path / "run", tmp_path / "exported")
    args = "load", kind, folder, tmp_path / "exported", out
    side(name, modules, *args, script="openvla_side.py")
    reference, io = np.load(out), dict(np.load(folder / "io.npz"))
    report = json.loads(str(reference["report"]))
    assert report["differing"] == []
    assert report["loading"] == {"missing_keys": [], "unexpected_keys": []}
    np.testing.assert_array_equal(reference["ours"], reference["theirs"])
    model: Any = vla.build(imported.config.model)
    # The blank before the actions and the stop behind them are the prompt's here.
    text = np.concatenate([io["ids"], [[openvla.BLANK, openvla.STOP]]], axis=1)
    state = io["state"][None].astype(np.float32) if kind == "oft" else None
    inputs = model, io["image"][:, None], text, np.ones(text.shape, bool), state
    observation = openvla.observation(*inputs)
    run: Any = jax.jit(
        lambda p: model.apply(
            {"params": p}, observation, model.empty_history(1), None, method="step"
        )[0]
    )
    result = run(params_of(imported))
    values = np.concatenate([result.arm, result.gripper[..., None]], -1)[:, 0].astype(np.float64)
    units = PolicyUnits.from_json(imported.meta["units"][SUITE])
    # The gripper's command is the robot's affair there.
    units = dataclasses.replace(units, gripper=None)
    ours = units.restore(values, np.zeros((1, 1)))[0].reshape(reference["ours"].shape)
    case = (
        f"{name} on transformers {report['transformers']}, {report['tensors']} tensors to the bit"
    )
    assert show(case, ours, reference["ours"]) < TOLERANCE
