"""Every golden folder against our code: `pytest tests/parity -s [--fixtures DIR]`."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.parity import (
    data,
    discrete,
    fast,
    flamingo,
    heads,
    kosmos,
    llava,
    lm,
    moondream,
    names,
    ofa,
    openpi_data,
    openvla,
    paligemma,
    pi0,
    pi0fast,
    qwen_next,
    qwen_vl,
    robo,
    rtc,
    simpler,
    smolvla,
    spliced,
    uform,
    vision,
)
from tests.parity.table import Row
from vla_jax.convert.robovlms import source as robovlms
from vla_jax.models.towers.text_families import LANGUAGES

Runner = Callable[[Path], Iterator[Row]]

# model_type of config.json, or cls of meta.json -> what runs a VLM by itself
MODELS: dict[str | None, Runner] = {
    "kosmos-2": kosmos.hf,
    "Flamingo": flamingo.hf,
    "Moondream": moondream.hf,
    "OFAModel": ofa.hf,
    "llava": spliced.hf,
    "smolvlm": spliced.hf,
    "paligemma": paligemma.hf,
    "QWenLMHeadModel": qwen_vl.hf,
    "VisionTransformer": qwen_vl.tower,
    "VLMForCausalLM": uform.hf,
    "qwen2_vl": qwen_next.hf,
    "qwen2_5_vl": qwen_next.hf,
    "qwen3_vl": qwen_next.hf,
}
# kind of config.json -> what runs a whole policy of today
KINDS: dict[str, Runner] = {
    "pi0": pi0.run,
    "pi05": pi0.run,
    "pi0_fast": pi0fast.run,
    "smolvla": smolvla.run,
    "rtc_kinetix": rtc.run,
    "openvla": openvla.run,
    "openvla_oft": openvla.run,
}
# End of an array's name that only one kind of folder has -> what runs the data side of it
MODERN: dict[str, Runner] = {
    "delta/aloha_f64": openpi_data.transforms,
    "0/client_pil": openpi_data.images,
    "fast/garbage": openpi_data.tokenizer,
    "/robot_actions_f64": openpi_data.pipeline,
    "resize-naive/pixel_values_corner": openpi_data.openvla_images,
}
# robovlm_name -> what reads the backbone of a policy off its folder
POLICIES: dict[str, robo.Describe] = {
    "RoboKosMos": kosmos.describe,
    "RoboPaligemma": paligemma.describe,
    "RoboFlamingo": flamingo.describe,
    "RoboLLaVA": llava.mpt,
    "RoboLLaVAVicuna": llava.vicuna,
    "RoboMoonDream": moondream.describe,
    "RoboQwen": qwen_vl.describe,
    "RoboUform": uform.describe,
}


def find_runner(folder: Path) -> Runner | str:
    """The code that runs a folder, or why there is none yet."""
    config, meta = (_read(folder / name) for name in ("config.json", "meta.json"))
    if (folder / "tables.npz").is_file():
        return heads.tokenizer
    kind = config.get("model_type", meta.get("cls"))
    if runner := MODELS.get(kind) or vision.find(folder) or data.find(folder):
        return runner
    if not (folder / "io.npz").is_file():
        return "no case of this kind yet"
    if config.get("model_type") in LANGUAGES:
        return lm.run
    if meta.get("cls") in robovlms.HEADS:
        return heads.continuous
    names = np.load(folder / "io.npz").files
    if runner := KINDS.get(config.get("kind", "")):
        if (folder / "model.safetensors").is_file():
            return pi0.torch
        # A checkpoint without observations is read in tests/convert.
        is_run = {"obs/state", "obs", "train/input_ids"} & set(names)
        return runner if is_run else "no case of this kind yet"
    if {"dct_rounded", "bad/tokens"} <= set(names):
        return fast.run
    for ending, runner in MODERN.items():
        if any(name.endswith(ending) for name in names):
            return runner
    if {"google_robot/gripper", "widowx_bridge/gripper"} & set(names):
        return simpler.run
    if "in/reconstructed" in names:
        return moondream.hf_2025
    if "robovlm_name" in config and "batch/rgb" in names:
        describe = POLICIES.get(config["robovlm_name"])
        if describe is None:
            return f"robovlm_name {config['robovlm_name']}"
        discretely = config["act_head"].get("action_space") == "discrete"
        return functools.partial(discrete.run if discretely else robo.run, describe)
    if {"logits", "labels", "loss.loss_arm"} <= set(names):
        return heads.discrete
    return "no case of this kind yet"


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def pytest_generate_tests(metafunc: pytest.Metafunc):
    folders: list[Path] = metafunc.config.stash[metafunc.config.parity_folders]  # type: ignore[attr-defined]
    waiting = metafunc.config.stash[metafunc.config.parity_waiting]  # type: ignore[attr-defined]
    cases, met = [], False
    for folder in folders:
        runner = find_runner(folder)
        # Of whole policies, the fast suite runs the first; of VLMs not those slow to compile.
        policy = isinstance(runner, functools.partial)
        late = (policy and met) or runner in (ofa.hf, flamingo.hf)
        marks = [pytest.mark.slow] if late else []
        met |= policy
        named = folder.name in names.FULL
        if named:
            cases.append(pytest.param(folder, names.run, id=f"{folder.name}-names"))
        if not isinstance(runner, str):
            cases.append(pytest.param(folder, runner, id=folder.name, marks=marks))
        elif not named:
            waiting[folder.name] = runner
    metafunc.parametrize(("folder", "runner"), cases)


def test_parity(folder: Path, runner: Runner, parity_rows: list[tuple[str, Row]]):
    rows = list(runner(folder))
    parity_rows += [(folder.name, row) for row in rows]
    failed = [row for row in rows if not row.passed]
    assert rows
    assert not failed, failed
