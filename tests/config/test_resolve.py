import pytest

from configs import (
    base,
    bridge_smoke,
    calvin_smoke,
    flamingo_ph,
    kosmos_discrete,
    kosmos_interleaved,
    kosmos_one_step,
    kosmos_ph,
    libero_smoke,
    moondream_ph,
    pi0_aloha,
    pi0_libero,
    pi0fast_libero,
    pi05_droid,
    pi05_libero,
    quickstart,
    quickstart_expert,
    quickstart_fast,
    qwen2_5_vl_ph,
    qwen2_vl_ph,
    qwen3_vl_ph,
    smolvla,
    uform_ph,
)
from vla_jax.config import ConfigError, resolve, to_dict
from vla_jax.models import vla

SHIPPED = (
    quickstart,
    bridge_smoke,
    calvin_smoke,
    libero_smoke,
    kosmos_ph,
    kosmos_one_step,
    kosmos_discrete,
    kosmos_interleaved,
    qwen2_vl_ph,
    qwen2_5_vl_ph,
    qwen3_vl_ph,
    flamingo_ph,
    moondream_ph,
    uform_ph,
    pi0_libero,
    pi05_libero,
    pi05_droid,
    pi0_aloha,
    pi0fast_libero,
    quickstart_expert,
    quickstart_fast,
    smolvla,
)


def _valid():
    config = quickstart.get_config()
    config.unlock()
    return config


@pytest.mark.parametrize("module", SHIPPED)
def test_shipped_configs_resolve(module):
    config = resolve(module.get_config())
    vla.build(config.model)


def test_libero_smoke_with_an_expert():
    config = resolve(libero_smoke.get_config("expert:data"))
    assert (config.model.head.kind, config.data.datasets[0].dir) == ("expert_flow", "data")
    vla.build(config.model)


def test_round_trip():
    config = resolve(_valid())
    assert resolve(to_dict(config)) == config


def test_base_alone_lacks_data():
    with pytest.raises(ConfigError, match="at least one dataset"):
        resolve(base.get_config())


def test_all_problems_at_once_with_suggestions():
    config = _valid()
    config.model.structure.windw = 3
    config.model.dtype = "fp16"
    config.model.chunk = 3
    config.train.batchsize = 4
    config.train.anything = 0
    with pytest.raises(ConfigError) as error:
        resolve(config)
    text = str(error.value)
    assert "model.structure.windw: unknown key; did you mean 'window'?" in text
    assert "model.chunk: unknown key; did you mean 'model.structure.chunk'?" in text
    assert "train.batchsize: unknown key; did you mean 'batch_size'?" in text
    assert "train.anything: unknown key; legal keys: ['accumulate', 'batch_size'," in text
    assert "model.dtype: 'fp16' is none of ['float32', 'bfloat16']" in text
    assert text.startswith("5 problem(s)")


def test_keys_that_are_not_there_take_their_defaults():
    raw = to_dict(resolve(_valid()))
    del raw["optim"]["eps"], raw["data"]["parity"], raw["mesh"]
    config = resolve(raw)
    assert (config.optim.eps, config.mesh.fsdp) == (1e-8, -1)
    assert config == resolve(_valid())


def test_a_dataset_needs_a_spec_and_a_folder():
    raw = to_dict(resolve(_valid()))
    raw["data"]["datasets"] = [{"weight": 2.0}]
    with pytest.raises(ConfigError) as error:
        resolve(raw)
    assert "data.datasets[0].spec: missing" in str(error.value)
    assert "data.datasets[0].dir: missing" in str(error.value)


def test_keys_that_have_moved_are_read_at_their_old_place(caplog):
    raw = to_dict(resolve(_valid()))
    raw["data"]["left_pad"] = False
    raw["augment"]["draws"] = "shared"
    del raw["augment"]["parity"]
    config = resolve(raw)
    assert not config.data.parity.left_pad
    assert config.augment.parity.draws == "shared"
    (record,) = caplog.records
    assert "data.left_pad -> data.parity.left_pad, augment.draws -> augment.p" in record.message


def test_values_are_checked():
    config = _valid()
    config.train.batch_size = 0
    config.model.structure.cameras = ("primary", "top")
    config.mesh.data = -1
    config.optim.ema_decay = 1.0
    config.optim.learning_rate, config.optim.clip_norm = -1.0, -0.5
    with pytest.raises(ConfigError) as error:
        resolve(config)
    text = str(error.value)
    assert "train.batch_size: must be positive" in text
    assert "'top' is none of ['primary', 'secondary', 'wrist']" in text
    assert "only one axis may be -1" in text
    assert "optim.ema_decay: must be in [0, 1), not 1.0" in text
    assert "optim.learning_rate: must be positive, not -1.0" in text
    assert "optim.clip_norm: must not be negative, -0.5 is" in text


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"steps": 1.5}, "train.steps: expected int, not 1.5"),
        ({"steps": True}, "train.steps: expected int, not True"),
        ({"wandb": 3}, "train.wandb: expected str, not 3"),
    ],
)
def test_types_are_checked(value, problem):
    raw = to_dict(resolve(_valid()))
    raw["train"].update(value)
    with pytest.raises(ConfigError, match=problem):
        resolve(raw)


def test_pairs_are_checked():
    raw = to_dict(resolve(_valid()))
    raw["optim"]["trained"] = [["^head/", -1], ["^head/"], ["^head/", "two"]]
    with pytest.raises(ConfigError) as error:
        resolve(raw)
    assert "optim.trained[1]: expected ['str', 'int'], not ['^head/']" in str(error.value)
    assert "optim.trained[2][1]: expected int, not 'two'" in str(error.value)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_that_is_none(weight):
    raw = to_dict(resolve(_valid()))
    raw["data"]["datasets"] = [{"spec": "calvin", "dir": "data", "weight": weight}]
    raw["data"]["val_fraction"] = -0.5
    with pytest.raises(ConfigError) as error:
        resolve(raw)
    assert f"data.datasets[0].weight: must be positive, not {weight}" in str(error.value)
    assert "data.val_fraction: must be in [0, 1), not -0.5" in str(error.value)
