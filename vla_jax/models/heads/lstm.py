"""LSTM policy head (RoboVLMs' LSTMDecoder)."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.config import HeadConfig
from vla_jax.config.option import option
from vla_jax.models import sharding
from vla_jax.models import weights as w
from vla_jax.models.heads.common import ActionOutput, WindowHead, flatten, newest, trunk_weights
from vla_jax.models.whole_numbers import brought_back
from vla_jax.types import Prediction


class LSTMLayer(nn.Module):
    """One layer, torch's gates (i, f, g, o) and both of torch's biases.

    The biases stay apart: their sum is what counts, but each has its own optimizer state, and
    checkpoints go back out unchanged.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b w d"], valid: Bool[Array, "b w"]
    ) -> Float[Array, "b w h"]:
        """Outputs of every step; the state stays zero until the first valid one."""
        # Torch draws every weight of an LSTM from this range.
        bound = self.hidden**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        gates = 4 * self.hidden
        w_x = self.param("input_kernel", uniform, (x.shape[-1], gates)).astype(self.dtype)
        w_h = self.param("state_kernel", uniform, (self.hidden, gates)).astype(self.dtype)
        bias = self.param("input_bias", uniform, (gates,))
        bias = (bias + self.param("state_bias", uniform, (gates,))).astype(self.dtype)
        # All input products at once: inside the scan only the recurrent product remains.
        inputs = brought_back(self, x.astype(self.dtype) @ w_x, "input_kernel")
        inputs = sharding.rows(inputs + bias).swapaxes(0, 1)

        def step(carry, scanned):
            h, c = (sharding.rows(part) for part in carry)
            gate, ok = scanned
            # The cell adds up over the window, so it stays in float32; bfloat16 would lose small
            # terms.
            gate = gate + brought_back(self, h @ w_h, "state_kernel")
            i, f, g, o = jnp.split(gate.astype(jnp.float32), 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = (jax.nn.sigmoid(o) * jnp.tanh(c)).astype(self.dtype)
            # Steps before the episode leave the state at zero, as if the sequence began behind
            # them.
            c, h = jnp.where(ok[:, None], c, 0), jnp.where(ok[:, None], h, 0)
            return (h, c), h

        # The zero state takes its batch layout from the inputs, so a sharded batch stays sharded.
        zero = jnp.zeros_like(inputs[0, :, : self.hidden])
        start, unroll = (zero, zero.astype(jnp.float32)), sharding.unroll(len(inputs))
        _, outputs = jax.lax.scan(step, start, (inputs, valid.T), unroll=unroll)
        return outputs.swapaxes(0, 1)

    def kernels(self) -> dict[str, int]:
        """The names of the kernels -> how many of their axes are inputs."""
        return {"input_kernel": 1, "state_kernel": 1}


@dataclass(frozen=True)
class LSTMOptions(HeadConfig):
    """Options of the head `lstm`."""

    hidden: int = option(1024, "Width of the recurrent state, for each latent.", positive=True)
    layers: int = option(4, "Recurrent layers.", positive=True)


class LSTMHead(WindowHead):
    """Legend: b batch · w window · m tokens a step · d features.

    The output at a step is the last output over the features of at most W steps from a zero state.
    """

    head: LSTMOptions

    OPTIONS = LSTMOptions

    @nn.compact
    def __call__(
        self, features: Float[Array, "b w m d"], valid: Bool[Array, "b w"], last: bool = False
    ) -> Prediction:
        """Features of a window -> a chunk at each of its steps, or with `last` at the newest."""
        x = flatten(features)
        for i in range(self.head.layers):
            hidden = self.head.hidden * self.sizes.latents
            x = LSTMLayer(hidden, self.dtype, name=f"layer{i}")(x, valid)
        if last:
            x = newest(x)
        return ActionOutput(self.sizes, self.dtype, name="output")(x)

    @classmethod
    def weight_map(cls, head: LSTMOptions, width: int) -> list[w.Weight]:
        """RoboVLMs' names; targets relative to `head/`."""
        del width
        rows = []
        for i in range(head.layers):
            rows += [
                w.Weight(f"rnn.weight_ih_l{i}", f"layer{i}/input_kernel", "linear"),
                w.Weight(f"rnn.weight_hh_l{i}", f"layer{i}/state_kernel", "linear"),
                w.Weight(f"rnn.bias_ih_l{i}", f"layer{i}/input_bias"),
                w.Weight(f"rnn.bias_hh_l{i}", f"layer{i}/state_bias"),
            ]
        return rows + trunk_weights()
