"""The contract's types: refused when wrongly made, and what jax puts into them goes through."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import TypeCheckError

from vla_jax.types import Actions, Batch, Observation

B, W, F, A, T = 2, 3, 4, 7, 5


def observation(**changes: Any) -> Observation:
    fields: dict[str, Any] = {
        "images": {"primary": np.zeros((B, W, 8, 6, 3), np.uint8)},
        "image_mask": {"primary": np.ones((B, W), bool)},
        "text": np.zeros((B, T), np.int32),
        "text_mask": np.ones((B, T), bool),
        "proprio": np.zeros((B, W, 2), np.float32),
    }
    return Observation(**{**fields, **changes})


def batch() -> Batch:
    actions = Actions(np.zeros((B, W, F, A), np.float32), np.ones((B, W, F), bool))
    return Batch(observation(), actions, np.zeros((B, 2), np.uint32), np.zeros(B, np.int32))


@pytest.mark.parametrize(
    "changes",
    [
        {"text": np.zeros((B, T))},  # dtype
        {"text_mask": np.ones((B, T + 1), bool)},  # as long as the text
        {"proprio": np.zeros((B, 2), np.float32)},  # of every step
        {"images": {"primary": np.zeros((B, W, 3, 8, 6), np.uint8)}},  # channels last
        {"image_mask": {"primary": np.ones((B, W + 1), bool)}},  # as many steps
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(changes):
    with pytest.raises(TypeCheckError):
        observation(**changes)


def test_rows_and_split_batches_are_of_the_same_type():
    row = jax.tree.map(lambda x: x[0], batch())
    split = jax.tree.map(lambda x: x.reshape(1, *x.shape), batch())
    for tree in (row, split):
        again = dataclasses.replace(tree.observation, text=tree.observation.text)
        assert jax.tree.structure(again) == jax.tree.structure(batch().observation)


def test_a_pytree_holds_whatever_jax_puts_there():
    full = batch()
    shardings = jax.tree.map(lambda _: PartitionSpec("data"), full)
    assert shardings.observation.images["primary"] == PartitionSpec("data")
    shapes = jax.eval_shape(lambda b: jax.tree.map(jnp.asarray, b), full)
    assert shapes.actions.chunk.shape == (B, W, F, A)
    mapped = jax.jit(jax.vmap(lambda b: b))(full)
    assert isinstance(mapped, Batch)
    assert mapped.captions is None
    np.testing.assert_array_equal(mapped.observation.text, full.observation.text)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(full)]
    assert ".observation.images['primary']" in paths
