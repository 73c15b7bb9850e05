"""`model.remat`: it reaches every stack of layers and changes no number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from tests.train.test_lora import observe
from vla_jax.config import resolve
from vla_jax.models import vla
from vla_jax.rules import flatten


def build(remat: str) -> Any:
    raw = quickstart.get_config()
    raw.model.structure.update({"window": 2, "chunk": 2, "text_len": 9})
    raw.model.backbone.arch["vision_config"].update({"hidden_size": 16, "intermediate_size": 24})
    raw.model.backbone.arch["text_config"].update({"embed_dim": 16, "ffn_dim": 24})
    raw.model.head.update({"hidden": 16})
    raw.model.remat = remat
    return vla.build(resolve(raw).model)


def total(model: Any) -> Any:
    def loss(params: Any) -> Any:
        out = model.apply({"params": params}, observe())
        return jnp.sum(out.arm * jnp.arange(6)) + jnp.sum(out.gripper)

    return loss


def checkpoints(jaxpr: Any) -> list[Any]:
    """Policies of every remat in a program, inner ones included."""
    collected = []
    for eqn in jaxpr.eqns:
        if "remat" in eqn.primitive.name or "checkpoint" in eqn.primitive.name:
            collected.append(eqn.params["policy"])
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                collected += checkpoints(inner)
    return collected


def products(jaxpr: Any) -> int:
    """Products with weights in a program, inner ones included; those of attention have batches."""
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            count += not eqn.params["dimension_numbers"][1][0]
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            count += products(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.fixture(scope="module")
def params():
    model = build("none")
    return jax.jit(lambda key: vla.initial_params(model, key))(jax.random.key(0))


def test_kept_products_are_not_computed_again():
    model = build("none")
    params = jax.eval_shape(lambda key: vla.initial_params(model, key), jax.random.key(0))
    none, dots, full = (
        products(jax.make_jaxpr(jax.grad(total(build(remat))))(params).jaxpr)
        for remat in ("none", "dots", "full")
    )
    assert dots == none
    # A layer has q, k, v, o and the first of the MLP; nothing needs the last one's value.
    assert full >= none + 10


@pytest.mark.slow
def test_every_stack_is_recomputed_as_asked(params):
    stacks = {path.split("/layers/")[0] for path in flatten(params) if "/layers/" in path}
    assert stacks == {"backbone/vision", "backbone/text"}
    for remat, retained in (("full", False), ("dots", True)):
        policies = checkpoints(jax.make_jaxpr(total(build(remat)))(params).jaxpr)
        # Both stacks, the entry of either tower, and the connector between them.
        assert len(policies) == len(stacks) + 3
        assert {policy is not None for policy in policies} == {retained}
    assert not checkpoints(jax.make_jaxpr(total(build("none")))(params).jaxpr)


@pytest.mark.slow
def test_recomputing_changes_no_gradient(params):
    plain = flatten(jax.jit(jax.grad(total(build("none"))))(params))
    again = flatten(jax.jit(jax.grad(total(build("full"))))(params))
    for path, x in plain.items():
        np.testing.assert_allclose(again[path], x, rtol=1e-4, atol=1e-6, err_msg=path)
