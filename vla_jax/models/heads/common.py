"""What a head is, and the pieces heads share.

Legend: b batch · w window · c tokens of a step · m latents · d features · f chunk
a action dimension
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import HeadConfig, StructureConfig
from vla_jax.models import weights as w
from vla_jax.models.losses import action_loss
from vla_jax.models.towers.layers import Dense
from vla_jax.types import Guide, Prediction

# Widths of both output trunks, fixed in the original whatever the head's own width.
TRUNK = (1024, 512, 256)


@dataclass(frozen=True)
class HeadSizes:
    """What a structure tells its head of what goes in and comes out.

    Attributes:
        steps: steps the head sees: those of the window, or 1.
        latents: features of a step.
        chunk: actions of a prediction.
        action_dim: numbers of an action.
        gripper: whether the last of them is a gripper.
    """

    steps: int
    latents: int
    chunk: int
    action_dim: int
    gripper: bool = True

    @property
    def arm_dim(self) -> int:
        """Numbers of an action that are no gripper."""
        return self.action_dim - self.gripper


class Head(nn.Module):
    """Base class of the heads; a head is one subclass in a file of its own and a line in `HEADS`.

    Features are [b, w, m, d], `valid` [b, w] is False on steps before the episode's start, and
    `key` feeds the heads that draw noise. Each step's output depends on that step and the valid
    ones before it, so keeping the features of the last w steps is all that a control step takes.

    A head that maps features straight to a `Prediction` defines `__call__(features, valid)` and
    inherits `loss` and `predict`; others define these two.

    Attributes:
        OPTIONS: dataclass of `model.head` for this head: a `HeadConfig`, with options of its own.
        reads: what it needs of a structure, see `Structure.gives`: "features", or "tokens", scores
            of the VLM's next tokens, or "places", a hidden state for each number of the chunk.
        reads_reason: why nothing else will do, for heads that do not read features.
        numbers: whether its gripper may be a number like the others, see `head.gripper`.
        counted: of heads that read tokens, whether every chunk is as many of them.
        needs_steps: whether it remembers earlier steps, so that one step makes no sense.
        ignore: regexes of names in RoboVLMs' checkpoints that carry nothing.
        guidable: whether its samples can be made to agree with an earlier chunk's.
    """

    head: HeadConfig
    sizes: HeadSizes
    dtype: Any = jnp.float32

    OPTIONS: ClassVar[type[HeadConfig]] = HeadConfig
    reads: ClassVar[str] = "features"
    reads_reason: ClassVar[str] = ""
    numbers: ClassVar[bool] = False
    counted: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = False
    ignore: ClassVar[tuple[str, ...]] = ()
    guidable: ClassVar[bool] = False

    @classmethod
    def refusals(cls, head: HeadConfig, structure: StructureConfig) -> list[str]:
        """Problems of its settings, one line each."""
        del structure
        if head.gripper == "binary" or cls.numbers:
            return []
        return [f"head.gripper: {head.kind} predicts whether the gripper is open: 'binary'"]

    @classmethod
    def weight_map(cls, head: HeadConfig, width: int) -> list[w.Weight]:
        """RoboVLMs' names on features of a width, targets below `head/`; [] of heads it lacks."""
        del head, width
        return []

    def loss(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        targets: Any,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The float32 loss and its parts; "rows" [b] is each window's mean, the others scalars.

        Args:
            features: of every step.
            valid: False on padding.
            targets: the `Actions` of the steps; of heads that read tokens, the labels.
            key: of the noise, for heads that draw some.
            gripper_weight: weight of the gripper's part.
        """
        del key
        return action_loss(self(features, valid), targets, gripper_weight)

    def predict(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray | None = None,
        last: bool = False,
        guide: Guide | None = None,
    ) -> Prediction:
        """The chunk at every step, or with `last` at the newest alone.

        `guide` says what a sample of the newest is to agree with; heads that are not `guidable`
        draw no samples and leave it.
        """
        del key, guide
        if last and not self.needs_steps:
            # Such a head computes every step by itself, so the older ones would be in vain.
            features, valid = newest((features, valid))
        prediction = self(features, valid)
        return newest(prediction) if last else prediction


class WindowHead(Head):
    """A head with a memory over the window, whose `__call__` takes `last`.

    Behind the memory it goes on with the newest step alone: the outputs of the older ones would be
    thrown away, and are most of such a head's work.
    """

    needs_steps = True

    def predict(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray | None = None,
        last: bool = False,
        guide: Guide | None = None,
    ) -> Prediction:
        """See `Head.predict`."""
        del key, guide
        return self(features, valid, last)


def width_refusals(head: Any, structure: StructureConfig) -> list[str]:
    """Problems of heads whose attention splits the width hidden x latent among `head.heads`."""
    if head.hidden * structure.latent % head.heads == 0:
        return []
    return [
        f"head.heads: {head.heads} does not divide the width, hidden {head.hidden} x latent "
        f"{structure.latent}"
    ]


def largest(x: Float[Array, "*b c d"]) -> Float[Array, "*b d"]:
    """The largest over the tokens, of each number; a gradient goes to the first that is.

    Picked by its place, like torch's. The gradient of `max` asks anew which number is the maximum,
    and XLA may compute the numbers once more for that, rounded otherwise: then none is, and the
    gradient is NaN.
    """
    return jnp.take_along_axis(x, x.argmax(axis=-2, keepdims=True), axis=-2)[..., 0, :]


def pool_tokens(
    x: Float[Array, "b w c d"], read: Bool[Array, "b w c"], latents: int
) -> Float[Array, "b w m d"]:
    """Max over `latents` spans of a step's tokens; torch's adaptive max pooling without a mask.

    Of the n tokens that `read` selects, in order, span i holds floor(i n / latents) up to
    ceil((i + 1) n / latents). A step without tokens gives zeros.
    """
    # Tokens that are read count, not columns: padding between them must not move a span.
    rank = jnp.cumsum(read, axis=-1) - 1
    # Steps may hold different numbers of tokens, so every step has its own spans.
    n = read.sum(-1, keepdims=True)
    spans = []
    for i in range(latents):
        inside = read & (rank >= i * n // latents) & (rank < -(-(i + 1) * n // latents))
        # Minus infinity cannot win a maximum; a span without tokens is replaced by zeros below.
        masked = jnp.where(inside[..., None], x, -jnp.inf)
        spans.append(jnp.where(inside.any(-1, keepdims=True), largest(masked), 0.0))
    return jnp.stack(spans, axis=2).astype(x.dtype)


def flatten(x: Float[Array, "b w m d"]) -> Float[Array, "b w e"]:
    """The latents of a step as one vector, latent-major."""
    return x.reshape(*x.shape[:2], -1)


class Trunk(nn.Module):
    """Four linear layers with ReLU between; float32, as the outputs go into a loss."""

    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b out"]:
        """Features -> raw outputs."""
        xavier = nn.initializers.xavier_uniform()
        for i, size in enumerate(TRUNK):
            x = jax.nn.relu(Dense((size,), dtype=self.dtype, init=xavier, name=f"fc{i}")(x))
        return Dense((self.out,), dtype=jnp.float32, init=xavier, name=f"fc{len(TRUNK)}")(x)


class ActionOutput(nn.Module):
    """Arm trunk (tanh) and, where there is a gripper, its trunk (logits)."""

    sizes: HeadSizes
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b w d"]) -> Prediction:
        """Features of every step -> the chunk predicted there."""
        chunk, size = self.sizes.chunk, self.sizes.arm_dim
        arm = Trunk(chunk * size, self.dtype, name="arm")(x)
        # No tanh for the gripper: its loss takes logits.
        gripper = Trunk(chunk, self.dtype, name="gripper")(x) if self.sizes.gripper else None
        # Actions are normalized to [-1, 1], and tanh cannot leave that range.
        arm = jnp.tanh(arm).reshape(*x.shape[:2], chunk, size)
        return Prediction(arm=arm, gripper=gripper)


def newest(tree: Any) -> Any:
    """The last step of every [b, w, ...] array."""
    return jax.tree.map(lambda x: x[:, -1:], tree)


def trunk_weights() -> list[w.Weight]:
    """RoboVLMs' names of both trunks; targets relative to the head."""
    rows = []
    for name, path in (("actions", "arm"), ("gripper", "gripper")):
        # Their trunk is a Sequential that counts its ReLUs too, so linear layers have even numbers.
        for i in range(len(TRUNK) + 1):
            rows += w.pair(f"{name}.mlp.{2 * i}", f"output/{path}/fc{i}")
    return rows
