"""One definition of another project's units, from the data to the robot and back."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import bridge_smoke
from configs.tiny import ARCHS
from vla_jax.config import ConfigError, resolve
from vla_jax.data.language.prompts import Writer
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.inference.policy import Policy
from vla_jax.models import vla

FOLDER = Path(__file__).parents[1] / "fixtures/bridge_dataset/1.0.0"


def raw_config(cache: Path) -> Any:
    c = bridge_smoke.get_config(str(FOLDER))
    c.data.update({"cache_dir": str(cache), "units": "openpi_quantile", "relative": (6, -1)})
    c.model.backbone = {"name": "paligemma", "hf_dir": "", "arch": ARCHS["paligemma"]}
    c.model.backbone["arch"]["text_config"]["vocab_size"] = 400
    c.model.structure.update(
        {"kind": "expert", "window": 1, "chunk": 3, "text_len": 40, "proprio": 7}
    )
    c.model.head.update({"kind": "expert_flow", "sampling_steps": 2, "gripper": "number"})
    c.model.expert.update({"width": 16, "hidden": 16, "padded": 8})
    return c


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = resolve(raw_config(tmp_path_factory.mktemp("index")))
    mixture = open_datasets(config.data, config.model.structure, 7, "train")
    words = [*mixture.instructions, "Task: , State: ; Action:", *map(str, range(-1, 256))]
    tokenizer = Tokenizer.build(words, 400)
    write = Writer(tokenizer, 40, vla.prompt(config.model), vla.prompt_form(config.model))
    with Loader(mixture, write, 8, seed=0, shuffle=False) as loader:
        batch = next(loader)
    return config, mixture, tokenizer, write, batch


def test_the_loader_scales_chunks_by_the_state_they_start_from(world):
    _, mixture, _, _write, batch = world
    (dataset,) = mixture.datasets
    units = mixture.units[dataset.name]
    recorded, states = dataset.actions[:3], dataset.proprio[:1]
    expected = units.prepare_actions(recorded.astype(np.float64), states[0])
    np.testing.assert_allclose(batch.actions.chunk[0, 0], expected, atol=1e-5)
    state = units.prepare_state(states[0])
    np.testing.assert_allclose(batch.observation.proprio[0, 0], state, atol=1e-6)
    # About the middle 98 % of all chunks lie within the range.
    assert np.mean(np.abs(batch.actions.chunk) <= 1.2) > 0.9


def test_every_window_is_told_its_own_state(world):
    _, mixture, _, write, batch = world
    text = mixture.instructions[0]
    single, two = (write(text, batch.observation.proprio[i, 0])[0] for i in (0, 7))
    assert (single != two).any()
    rows = {tuple(row) for row in batch.observation.text}
    assert len(rows) > 1


def test_the_policy_takes_and_gives_the_robots_numbers(world):
    config, mixture, tokenizer, *_ = world
    (dataset,) = mixture.datasets
    units, model = mixture.units[dataset.name], vla.build(config.model)
    shapes = jax.eval_shape(lambda k: vla.initial_params(model, k), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(x.dtype), shapes)
    spec = mixture.action_specs[dataset.name]
    policy = Policy(config, params, tokenizer, spec, dataset.name, units=units)
    key = next(iter(policy.metadata["cameras"].values()))
    obs = {key: np.zeros((28, 28, 3), np.uint8), "prompt": "put it there"}
    with pytest.raises(Exception, match="expected 7 numbers"):
        policy.check(obs)
    obs["observation/state"] = np.asarray(dataset.proprio[0])
    policy.check(obs)
    moved = obs | {"observation/state": obs["observation/state"] + np.float32(0.5)}
    (first, _), (second, _) = (policy.infer(policy.new_session(), o) for o in (obs, moved))
    assert first["actions"].shape == (3, 7)
    # Relative actions follow the state; the gripper is a command between closed and open.
    assert np.abs(second["actions"][:, :6] - first["actions"][:, :6] - 0.5).mean() < 0.5
    low, high = sorted(spec.gripper_env)
    assert (first["actions"][:, 6] >= low).all()
    assert (first["actions"][:, 6] <= high).all()


def test_units_and_structure_go_together(tmp_path):
    raw = raw_config(tmp_path)
    raw.model.head.gripper = "binary"
    with pytest.raises(ConfigError, match=r"data\.units: only where"):
        resolve(raw)
    raw = raw_config(tmp_path)
    raw.data.units = ""
    with pytest.raises(ConfigError, match=r"data\.relative: has no effect"):
        resolve(raw)
    raw = raw_config(tmp_path)
    raw.data.units = "openpi"
    config = resolve(raw)
    with pytest.raises(ConfigError, match="none of"):
        open_datasets(config.data, config.model.structure, 7, "train")


def test_an_action_spec_is_kept_for_the_robots_commands(world):
    _, mixture, *_ = world
    (spec,) = mixture.action_specs.values()
    assert isinstance(spec, ActionSpec)
