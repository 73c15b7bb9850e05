"""Actions as FAST tokens that the VLM writes (pi0-FAST): `Action: `, the chunk's tokens, `|`, end.

The data pipeline writes the answers, `Actions.written`; `FastText` says how. What the model writes
is read on the device.

Legend: b batch · n columns of an answer · v vocabulary · f chunk · a action dimension
"""

from functools import cached_property

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.config import ConfigError, FastConfig
from vla_jax.models.fast_code import FastCode, Progress
from vla_jax.models.heads.common import Head
from vla_jax.models.heads.denoiser import as_prediction
from vla_jax.models.losses import cross_entropy, masked_mean, row_means
from vla_jax.types import Prediction


class Fast(Head):
    """No parameters: the VLM's scores of its next tokens are this head's features.

    Attributes:
        fast: the settings.
    """

    fast: FastConfig = FastConfig()

    reads = "tokens"
    reads_reason = "it reads tokens that the VLM writes, which only the discrete structure has"
    counted = False
    numbers = True

    @cached_property
    def code(self) -> FastCode:
        """What tokens mean.

        Raises:
            ConfigError: no tokenizer has been given yet.
        """
        if not self.fast.code:
            raise ConfigError(
                "model.fast.code: no FAST tokenizer, without which nothing can be written: name "
                "its folder in model.fast.dir when a run starts or a checkpoint is imported"
            )
        return FastCode.from_json(self.fast.code, self.sizes.chunk, self.sizes.action_dim)

    @property
    def ids(self) -> tuple[int, int]:
        """The ids of FAST tokens, from the first up to the second."""
        return self.code.token_end - self.code.size, self.code.token_end

    def choose(
        self, scores: Float[Array, "b v"], progress: Progress, key: PRNGKeyArray
    ) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
        """The next FAST token of those that may follow, and whether there was one.

        Args:
            scores: of `ids`.
            progress: of the chunks.
            key: see `draw`.
        """
        may = self.code.may_follow(progress)
        # Larger tokens have smaller ids.
        return self.draw(jnp.where(may, scores[:, ::-1], -jnp.inf), key), may.any(1)

    def draw(self, scores: Float[Array, "*b v"], key: PRNGKeyArray) -> Int[Array, "*b"]:
        """The likeliest one, or at a temperature one of the likely."""
        if not self.fast.temperature:
            return jnp.argmax(scores, axis=-1)
        # Tokens that may not follow have minus infinity here, which no temperature makes likely.
        return jax.random.categorical(key, scores / self.fast.temperature, axis=-1)

    def read(self, ids: Int[Array, "b n"]) -> Float[Array, "b f a"]:
        """Answers as they were written -> chunks, NaN where an answer is none."""
        code = self.code
        size = len(code.opening)
        # A model that chooses every word may write no opening; what follows is then no chunk, even
        # where its words can be read as one.
        begins = (ids[:, :size] == jnp.array(code.opening, ids.dtype)).all(1)
        body = ids[:, size:]
        # What lies behind the closing, or the end, is not read.
        stops = (body == code.stop) | (body == code.closing[0])
        chunk = code.decode(code.token_of(body), jnp.cumsum(stops, axis=1) == 0)
        return jnp.where(begins[:, None, None], chunk, jnp.nan)

    def prediction(self, chunk: Float[Array, "b f a"]) -> Prediction:
        """A chunk as a window of one step; a binary gripper is open above 0."""
        values = chunk[:, None]
        if self.head.gripper == "binary":
            return as_prediction(values, self.sizes.gripper)
        return Prediction(arm=values[..., :-1], gripper=values[..., -1])


def answer_loss(
    scores: Float[Array, "b n v"], written: Int[Array, "b n"], supervised: Bool[Array, "b"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of what the data pipeline has written, float32.

    Args:
        scores: of the token that each column of an answer holds.
        written: see `Actions`.
        supervised: False on windows that are not trained on.

    Returns:
        The mean over the answers of the mean over each one's tokens, as openpi has it; its parts:
        rows [b], loss_token (itself), acc_token (share of tokens that are the likeliest one).
    """
    # The -1 behind an answer's end would index the vocabulary from its end.
    is_token, safe = (written >= 0) & supervised[:, None], jnp.maximum(written, 0)
    rows = row_means(cross_entropy(scores, safe), is_token)
    # A row without a token has the mean 0, which would count as a perfect answer.
    loss = masked_mean(rows, is_token.any(1))
    right = (jnp.argmax(scores, axis=-1) == safe).astype(jnp.float32)
    return loss, {"rows": rows, "loss_token": loss, "acc_token": masked_mean(right, is_token)}
