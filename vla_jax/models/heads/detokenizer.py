"""Actions as tokens that the VLM writes (RoboVLMs' DiscreteDecoder, after RT-2).

A step's chunk is f * a tokens, action by action, a gripper last in each; then the prompt's own
last column follows as a stop token where the tokenizer has one.

Legend: b batch · w window · c columns that predict a token · v vocabulary · f chunk
a action dimension
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.config import HeadConfig, StructureConfig
from vla_jax.config.option import group, option
from vla_jax.models.action_tokenizer import ActionTokenizer
from vla_jax.models.heads.common import Head, newest
from vla_jax.models.losses import NO_LABEL, token_loss
from vla_jax.types import Actions, Guide, Prediction


@dataclass(frozen=True)
class DetokenizerParity:
    """What the detokenizer does only to repeat a reference implementation."""

    vocabulary: str = option(
        "actions",
        "Ids it may choose from: those that stand for actions, or all, as in RoboVLMs.",
        "actions",
        "all",
    )


@dataclass(frozen=True)
class DetokenizerOptions(HeadConfig):
    """Options of the head `detokenizer`."""

    bins: int = option(256, "Ids of an action dimension.")
    token_end: int = option(
        0, "First id above those that stand for actions; 0 = the backbone's own."
    )
    low: float = option(-1.0, "Value of the first bin.")
    high: float = option(1.0, "Value of the last bin.")
    parity: DetokenizerParity = group(DetokenizerParity)


class Detokenizer(Head):
    """No parameters: the VLM's scores of its next tokens are this head's features."""

    head: DetokenizerOptions

    OPTIONS = DetokenizerOptions
    reads = "tokens"
    reads_reason = (
        "it reads tokens that the VLM writes, which only the structures discrete and parallel have"
    )
    numbers = True

    @classmethod
    def refusals(cls, head: DetokenizerOptions, structure: StructureConfig) -> list[str]:
        """There is something to choose from, and a range to divide."""
        del structure
        if head.bins >= 2 and head.low < head.high:
            return []
        return ["head: bins must be at least 2 and low below high"]

    @property
    def tokenizer(self) -> ActionTokenizer:
        """The code between ids and values."""
        h = self.head
        return ActionTokenizer(h.token_end, h.bins, h.low, h.high)

    @property
    def length(self) -> int:
        """Tokens of one step."""
        return self.sizes.chunk * self.sizes.action_dim

    def encode(self, actions: Actions) -> Int[Array, "b w fa"]:
        """Ids of every step's chunk; an open binary gripper is `high`, a closed one `low`."""
        low, high, values = self.head.low, self.head.high, actions.chunk
        if self.sizes.gripper and self.head.gripper == "binary":
            # Labels of the gripper are 0 and 1, and the code knows the range of the arm alone.
            gripper = low + (high - low) * values[..., -1:]
            values = jnp.concatenate([values[..., :-1], gripper], axis=-1)
        ids = self.tokenizer.encode(values)
        return ids.reshape(*ids.shape[:2], self.length)

    def labels(self, actions: Actions, stop: Int[Array, "b s"]) -> Int[Array, "b w c"]:
        """What the columns read should predict; `NO_LABEL` where nothing is supervised.

        Args:
            actions: of the window.
            stop: id of the stop token, s = 1, or s = 0 where there is none. It is supervised where
                the whole chunk is.
        """
        mask, ids = actions.mask, self.encode(actions)
        ids = jnp.where(jnp.repeat(mask, self.sizes.action_dim, axis=-1), ids, NO_LABEL)
        stop = jnp.broadcast_to(stop[:, None], (*mask.shape[:2], stop.shape[1]))
        # After a chunk that is cut off the true next token is unknown.
        stop = jnp.where(mask.all(-1, keepdims=True), stop, NO_LABEL)
        return jnp.concatenate([ids, stop], axis=-1)

    def loss(
        self,
        features: Float[Array, "b w c v"],
        valid: Bool[Array, "b w"],
        labels: Int[Array, "b w c"],
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Cross-entropy over the whole vocabulary; arm and gripper weigh the same."""
        del valid, key, gripper_weight
        return token_loss(
            features, labels, self.tokenizer, self.sizes.action_dim, self.sizes.gripper
        )

    def predict(
        self,
        features: Float[Array, "b w c v"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray | None = None,
        last: bool = False,
        guide: Guide | None = None,
    ) -> Prediction:
        """Best action tokens, each given the true ones before it (teacher forcing)."""
        del valid, key, guide
        # The column behind the chunk predicts the stop, which is no action.
        scores = features[:, :, : self.length, slice(*self.ids) if self.ids else slice(None)]
        prediction = self.decode(self.choose(scores))
        return newest(prediction) if last else prediction

    @property
    def ids(self) -> tuple[int, int] | None:
        """The ids that may be written, from the first up to the second; None = all."""
        if self.head.parity.vocabulary != "actions":
            return None
        # A word that is no action would be read as an end of the range, and the robot would move as
        # far as it can.
        return self.head.token_end - self.head.bins, self.head.token_end

    def choose(self, scores: Float[Array, "*b v"]) -> Int[Array, "*b"]:
        """The best id, by the scores of `ids`."""
        best = jnp.argmax(scores, axis=-1)
        return best if self.ids is None else self.ids[0] + best

    def decode(self, ids: Int[Array, "b w fa"]) -> Prediction:
        """Ids -> values; a binary gripper above the middle of its range is open."""
        values = self.tokenizer.decode(ids).reshape(*ids.shape[:2], -1, self.sizes.action_dim)
        if not self.sizes.gripper:
            return Prediction(arm=values, gripper=None)
        if self.head.gripper == "number":
            return Prediction(arm=values[..., :-1], gripper=values[..., -1])
        # A `Prediction` has a binary gripper as a logit, open above 0.
        middle = (self.head.low + self.head.high) / 2
        return Prediction(arm=values[..., :-1], gripper=values[..., -1] - middle)
