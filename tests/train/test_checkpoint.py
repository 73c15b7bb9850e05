import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_step import compiled, set_up
from tests.train.toy import make_batch, make_config
from vla_jax.config import ConfigError, to_dict
from vla_jax.train.checkpoint import CheckpointError, Checkpoints, load_meta, load_params
from vla_jax.train.mesh import shard_batch
from vla_jax.train.resume import check_resume

META = {
    "config": to_dict(make_config()),
    "statistics": {"toy": {"q01": [0.0, -1.5]}},
    "action_specs": {"toy": {"kind": "delta"}},
    "tokenizer": "{}",
}


def bits(state) -> list[np.ndarray]:
    raw = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    return [np.array(x) for x in raw]


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_a_restored_run_goes_on_to_the_bit_although_buffers_were_donated(tmp_path, ema):
    _, mesh, template, state = set_up((2, 2, 2), ema=ema)
    step = compiled((2, 2, 2), ema=ema)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        retained = []
        for i in range(5):
            if i == 2:
                retained = bits(state)
                checkpoints.save(2, state, {"samples": 16}, META)
            # Donates the state while the save is being written.
            state, metrics = step(state, shard_batch(make_batch(i), mesh))
            jax.block_until_ready(metrics)  # see train.mesh.InFlight
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
        again, data = checkpoints.restore(template)
    assert data == {"samples": 16}
    assert bool(again.ema) == (ema > 0)
    assert_same(bits(again), retained)
    for i in range(2, 5):
        again, metrics = step(again, shard_batch(make_batch(i), mesh))
        jax.block_until_ready(metrics)  # see train.mesh.InFlight
    assert_same(bits(again), bits(state))


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 4, 2)])
def test_any_mesh_reads_what_another_wrote(tmp_path, shape):
    *_, state = set_up((2, 2, 2), ("vision",))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, META)
        checkpoints.wait()
        _, _, template, _ = set_up(shape, ("vision",))
        again, _ = checkpoints.restore(template)
    assert_same(bits(again), bits(state))
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, template)


def test_a_policy_loads_parameters_and_meta_alone(tmp_path):
    *_, state = set_up((2, 2, 2), ("vision",))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {}, META)
    for place in (tmp_path, tmp_path / "checkpoints"):
        params = load_params(place)
        assert jax.tree.structure(params) == jax.tree.structure(state.params)
        assert_same(bits(params), bits(state.params))
        assert load_meta(place, 7)["statistics"] == META["statistics"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["7"]  # as it was
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[3])
        ),
        state.params,
    )
    params = load_params(tmp_path, template=half)
    kernel = params["head"]["arm"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.devices() == {jax.devices()[3]}
    np.testing.assert_array_equal(
        kernel, state.params["head"]["arm"]["kernel"].astype(jnp.bfloat16)
    )


def test_a_policy_loads_the_average_and_a_run_cannot_switch_it(tmp_path):
    _, mesh, template, state = set_up((2, 2, 2), ("vision",), 0.9)
    state, _ = compiled((2, 2, 2), ("vision",), 0.9)(state, shard_batch(make_batch(), mesh))
    state, _ = compiled((2, 2, 2), ("vision",), 0.9)(state, shard_batch(make_batch(1), mesh))
    with Checkpoints(tmp_path / "on") as checkpoints:
        checkpoints.save(2, state, {}, META)
    params = load_params(tmp_path / "on")
    assert_same(bits(params), bits(state.averaged))
    assert not np.array_equal(
        params["head"]["arm"]["kernel"], state.params["head"]["arm"]["kernel"]
    )
    _, _, without, plain = set_up((2, 2, 2), ("vision",))
    with Checkpoints(tmp_path / "off") as checkpoints:
        checkpoints.save(2, plain, {}, META)
        checkpoints.wait()
        with pytest.raises(CheckpointError, match="holds no average of the weights"):
            checkpoints.restore(template)
    with (
        Checkpoints(tmp_path / "on") as checkpoints,
        pytest.raises(CheckpointError, match="holds an average of the weights"),
    ):
        checkpoints.restore(without)


def test_only_the_newest_are_kept_and_a_step_saves_once(tmp_path):
    *_, state = set_up((1, 1, 1))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 2, 3):
            checkpoints.save(step, state, {}, META)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3]


def test_a_save_that_was_killed_leaves_the_step_before(tmp_path):
    *_, template, state = set_up((1, 1, 1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {"samples": 40}, META)
    # What `kill -9` during an asynchronous save leaves behind.
    left = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp" / "params.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "d").write_bytes(b"half")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert checkpoints.restore(template)[1] == {"samples": 40}
        checkpoints.save(10, state, {}, META)
        checkpoints.wait()
        assert checkpoints.latest_step() == 10


def test_unusable_folders_say_what_is_wrong(tmp_path):
    *_, template, state = set_up((1, 1, 1))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_meta(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither checkpoints/ nor numbered steps"):
        load_params(tmp_path / "empty")
    foreign = tmp_path / "foreign" / "checkpoints"
    foreign.mkdir(parents=True)
    (foreign / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="which are not checkpoints"):
        Checkpoints(tmp_path / "foreign")
    half = tmp_path / "half"
    with Checkpoints(half) as checkpoints:
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            checkpoints.restore(template)
        with pytest.raises(ValueError, match="'tokenizer'"):
            checkpoints.save(3, state, {}, {k: v for k, v in META.items() if k != "tokenizer"})
        checkpoints.save(3, state, {}, META)
    with pytest.raises(CheckpointError, match=r"no step 4; there are \[3\]"):
        load_meta(half, 4)
    os.rename(half / "checkpoints" / "3" / "train", half / "train")
    with Checkpoints(half) as checkpoints, pytest.raises(CheckpointError, match="'train'"):
        checkpoints.restore(template)


def test_another_model_is_refused_with_all_differences(tmp_path):
    *_, template, state = set_up((1, 1, 1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, META)
        checkpoints.wait()
        other = dict(template.trainable)
        like = other.pop("head/arm/kernel")
        other["head/new/kernel"] = like
        other["head/gripper/kernel"] = jax.ShapeDtypeStruct(
            (3, 3), jnp.float32, sharding=like.sharding
        )
        wrong = type(template)(
            template.step, other, template.frozen, {}, template.opt_state, template.rng
        )
        with pytest.raises(CheckpointError, match="3 parameters do not fit") as error:
            checkpoints.restore(wrong)
    for part in (
        "missing in the checkpoint: head/new",
        "not in the model: head/arm",
        "shape of head/gr",
    ):
        assert part in str(error.value)


def test_resume_refuses_another_run_and_notes_other_changes(tmp_path: Path):
    stored = json.loads(json.dumps(to_dict(make_config())))
    changed = to_dict(
        make_config(**{
            "train.steps": 99, "mesh.fsdp": 4, "data.threads": 9, "optim.learning_rate": 3.0,
            "model.remat": "none",
        })
    )  # fmt: skip
    assert check_resume(stored, to_dict(make_config())) == []
    assert check_resume(stored, changed) == [
        "optim.learning_rate: stored 0.01, now 3.0",
        "train.steps: stored 20, now 99",
    ]
    refused = make_config(**{
        "model.head.layers": 1, "data.clip": 0.65, "optim.frozen": ("x",), "seed": 1,
        "lora.rank": 4, "optim.trained": (("^backbone/text/", 2),),
    })  # fmt: skip
    with pytest.raises(ConfigError) as error:
        check_resume(stored, to_dict(refused))
    for key in ("model.head.layers: stored 4, now 1", "data.clip", "optim.frozen", "seed",
                "lora.rank: stored 0, now 4", "optim.trained: stored []"):  # fmt: skip
        assert key in str(error.value)
    moved = to_dict(make_config())
    moved["data"]["datasets"] = [{**moved["data"]["datasets"][0], "dir": "elsewhere"}]
    assert check_resume(stored, moved) == []
    moved["data"]["datasets"][0]["spec"] = "other"
    with pytest.raises(ConfigError, match=r"data.datasets\[0\].spec"):
        check_resume(stored, moved)
