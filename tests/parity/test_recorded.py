"""Actions that are rebuilt from ids become the same ids again, at the ends of the range too."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import discrete, original
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import HeadSizes
from vla_jax.types import Actions


@pytest.mark.parametrize(("bins", "low", "high"), [(256, -1.0, 1.0), (100, -0.5, 0.75)])
def test_every_id_comes_back(bins, low, high):
    config = original.head_config(
        "detokenizer", token_end=original.TOKEN_END, bins=bins, low=low, high=high
    )
    everything = np.arange(original.TOKEN_END - bins, original.TOKEN_END)
    # Each id once in every dimension, the gripper's included.
    ids = np.stack([np.roll(everything, i) for i in range(7)], axis=-1).reshape(1, bins, 7)
    head = HEADS["detokenizer"](config, HeadSizes(steps=1, latents=1, chunk=1, action_dim=7))
    values = discrete.recorded(ids, head.tokenizer)
    actions = Actions(jnp.asarray(values, jnp.float32), jnp.ones(values.shape[:-1], bool))
    np.testing.assert_array_equal(head.encode(actions), ids)
