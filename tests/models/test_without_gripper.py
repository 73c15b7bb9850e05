"""Robots whose actions end in no gripper: every number is the arm's, in every head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import tiny
from vla_jax.models import vla
from vla_jax.models.heads import HEADS
from vla_jax.models.losses import action_loss, huber
from vla_jax.train import evaluate
from vla_jax.types import Actions, Prediction

A = 5
# Of the heads that the policy head's structure does not take.
STRUCTURE = {"detokenizer": "discrete", "expert_flow": "expert", "l1": "parallel"}


# FAST's tokens say all numbers of a chunk alike, whatever they are.
@pytest.mark.parametrize("head", sorted(set(HEADS) - {"fast"}))
def test_no_parameter_no_loss_and_no_answer_is_a_grippers(head):
    structure = STRUCTURE.get(head, "policy_head")
    backbone = "paligemma" if structure in ("expert", "parallel") else "kosmos2"
    config = tiny.config(structure, head, backbone, **{"action_dim": A, "gripper": "none"})
    model = vla.build(config)
    params = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert not [path for path in paths if "gripper" in path]
    observation = tiny.observe(window=config.structure.window, size=model.image.size)
    shape = observation.text.shape[0], config.structure.window, config.structure.chunk
    actions = Actions(jnp.zeros((*shape, A)), jnp.ones(shape, bool))

    def evaluated(params):
        args = (observation, actions, jax.random.key(1), 0.1)
        return model.apply({"params": params}, *args, method="evaluate")

    total, parts, prediction = jax.eval_shape(evaluated, params)
    assert prediction.arm.shape[-2:] == (config.structure.chunk, A)
    assert prediction.gripper is None
    assert not [name for name in parts if "gripper" in name]
    assert total.shape == ()


def test_the_loss_is_hubers_over_all_numbers():
    rng = np.random.default_rng(0)
    arm, chunk = rng.normal(size=(2, 2, 3, 4, A)).astype(np.float32)
    mask = np.ones((2, 3, 4), bool)
    mask[0, 0, 1:] = False
    prediction, actions = Prediction(jnp.asarray(arm), None), Actions(chunk, mask)
    total, parts = action_loss(prediction, jax.tree.map(jnp.asarray, actions), gripper_weight=9.0)
    expected = np.asarray(huber(jnp.asarray(arm - chunk))).mean(-1)[mask].mean()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert set(parts) == {"rows", "loss_arm", "l1_arm"}


def test_the_mean_action_and_the_report_leave_it_out(tmp_path):
    baseline = evaluate.mean_actions([np.array([0.5, 3.0])], [0.5], gripper=False)
    assert baseline.arm.tolist() == [[0.5, 3.0]]
    assert baseline.gripper is None
    sums = {
        "count": 4.0, "l1": [1.0, 3.0], "baseline_l1": [2.0, 4.0],
        "datasets": [[3.0, 1.5], [1.0, 2.0]],
    }  # fmt: skip
    result = evaluate.means([{k: jnp.asarray(v) for k, v in sums.items()}], ["a", "b"])
    assert result["l1_mean"] == 0.5
    assert (result["l1_mean/a"], result["l1_mean/b"]) == (0.5, 2.0)
    assert not [key for key in result if "gripper" in key]
    assert "gripper" not in evaluate.report(result, tmp_path)
