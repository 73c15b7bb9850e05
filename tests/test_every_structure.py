"""Each structure the whole way, very small: demonstrations, training, serving its checkpoint."""

import json

import numpy as np
import pytest

from tests.models.test_matrix import CELLS
from tests.test_quickstart import TINY, execute
from vla_jax.inference.execution import Execution
from vla_jax.inference.policy import Policy

FLAGS = {
    **TINY,
    "model.head.heads": 2,
    "model.head.bins": 40,
    "model.structure.text_len": 32,
    "model.structure.proprio": 15,
    "train.steps": 4,
    "optim.ema_decay": 0.9,
}

EXPERT = {
    "model.expert.width": 16,
    "model.expert.hidden": 16,
    "model.expert.padded": 16,
    "model.expert.adaptive": False,
    "model.expert.state": "expert",
    "model.expert.prompt": "pi0",
}


FAST = {
    "model.fast.prompt": "pi0",
    "model.fast.images": "backbone",
    "model.fast.length": 48,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, one_device):
    folder = tmp_path_factory.mktemp("data") / "tabletop/1.0.0"
    execute(one_device, "launch/record_demos.py", "--out", folder, "--episodes", 50)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "head"), CELLS)
def test_trains_and_serves(data, tmp_path, one_device, structure, head):
    single = structure in ("one_step", "expert", "parallel") or head == "fast"
    flags = {
        **FLAGS,
        "model.structure.kind": structure,
        "model.head.kind": head,
        "model.structure.window": 1 if single else 2,
    }
    config = f"configs/quickstart.py:{data}"
    if head == "fast":  # with tokens of these data
        folder = tmp_path / "fast"
        fit = ["launch/fit_fast.py", f"--config={config}", "--out", folder, "--vocab", 120]
        execute(one_device, *fit, "--config.model.structure.chunk=2")
        vocab = {"model.backbone.arch.text_config.vocab_size": 256, "model.fast.dir": folder}
        flags |= FAST | vocab | {"model.structure.chunk": 2}
    backbone = {"expert": "paligemma", "parallel": "prismatic"}.get(structure)
    if backbone:  # one that it can read
        flags = {k: v for k, v in flags.items() if ".arch." not in k}
        flags |= EXPERT if structure == "expert" else {}
        config = f"configs/tiny.py:{backbone}:{data}"
    train_and_serve(config, flags, tmp_path, one_device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("structure", "head", "rule"),
    [("parallel", "l1", "oft_quantile"), ("discrete", "detokenizer", "openvla_quantile")],
)
def test_openvlas_units_train_and_serve(data, tmp_path, one_device, structure, head, rule):
    flags = {k: v for k, v in FLAGS.items() if ".arch." not in k} | {
        "model.structure.kind": structure,
        "model.head.kind": head,
        "model.structure.window": 1,
        "model.head.gripper": "number",
        "data.units": rule,
    }
    train_and_serve(f"configs/tiny.py:prismatic:{data}", flags, tmp_path, one_device)


def train_and_serve(config, flags, tmp_path, one_device):
    execute(
        one_device,
        "launch/train.py",
        f"--config={config}",
        "--workdir",
        tmp_path,
        *(f"--config.{key}={value}" for key, value in flags.items()),
    )
    result = json.loads((tmp_path / "eval.json").read_text())
    assert np.isfinite(result["loss"])
    assert np.isfinite(result["l1_mean"])
    policy = Policy.from_checkpoint(tmp_path, execution=Execution("ensemble"))
    policy.warmup()
    session, rng = policy.new_session(), np.random.default_rng(0)
    for _ in range(3):
        obs = {
            key: rng.integers(0, 255, (64, 64, 3), np.uint8)
            for key in policy.metadata["cameras"].values()
        }
        obs |= {"prompt": "lift the red block", "observation/state": rng.normal(size=15)}
        policy.check(obs)
        reply, session = policy.infer(session, obs)
        assert reply["actions"].shape == (1, 7)
        assert np.isfinite(reply["actions"]).all()
